"""Generate with a model: streams of tokens and text, and requests that join and leave while others run."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch

from ..attention import Backend
from ..cache import Cache
from ..interp.capture import Capture
from ..interp.edits import Edit
from ..interp.probes import as_tuple
from ..kernels.kv_cache import KVDtype, check_kv_dtype, kv_dtype_of
from ..logits.parameters import Sampling, with_seed
from ..masks.layout import BLOCK
from ..masks.mask import Mask
from ..masks.scores import ScoreMod
from ..model import Llama
from ..tokenizer import Tokenizer
from ..usercode.arguments import check_options, whole_number
from . import explain
from .beams import BeamOptions, BeamSearch, PromptBeams
from .drafting import Drafter
from .fusion import AnyPrompt, as_requests
from .graphs import Graphs
from .limits import RequestLimits
from .model_runner import ModelRunner
from .output import Completion, NonFiniteLogitsError, OutputProcessor, ScoredCompletion, Step
from .request import Request, TokenSequence, longest_of, tokens_of
from .request_masks import AttentionSpec, plan_of_rows
from .scheduler import Scheduler
from .speculation import Speculation
from .verification import new_stream

# Compiled graphs have static shapes, so caches come in few sizes: powers of two, from this many slots in total.
MIN_SLOTS = 8192


class Engine:
    """Text generation with one model. Holds its compiled steps: keep the engine, and later calls compile nothing.

    The model's weights may change between calls. During a stream they may change in place; a parameter that is replaced
    takes effect with the next stream.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        compile: bool | Literal["auto"] = False,
        backend: Backend = "flex",
        kv_dtype: KVDtype = None,
        speculate: Literal["lookup", "self"] | Llama | Drafter | None = None,
        max_batch_size: int | None = None,
        max_slots: int | None = None,
        max_length: int | None = None,
        memory_fraction: float = 0.9,
        prefill_tokens: int | None = None,
    ) -> None:
        """tokenizer: for text and stop strings. compile: run compiled steps (a fixed cost of seconds, then fast);
        "auto": not on a CPU, where uncompiled steps of backend "dense" are faster; on a GPU, but streams under the
        package's own masks begin with such steps there too, and compiled ones take over after 2,048, so that nobody
        waits for a compiler. Steps are recorded and replayed: of what changes in the model during a stream, such as
        hooks and modules, they may see the values of parameters alone. Compiled steps refuse forward hooks.
        backend: of attention; "dense" is its definition, see `attention.attention_weights`.
        kv_dtype: of the keys and values of all caches that the engine makes, see `Llama.new_cache`.
        speculate: let each step verify several drafted tokens. "lookup" drafts what followed before in the text, see
        `drafting.prompt_lookup`; "self" with a copy of the model in 4 bits, without its adapters; a smaller `Llama`
        with the same vocabulary; or a function from the ids so far and the most to draft to ids. It changes no token,
        but for what rounds differently in 16 bits. Requests with no_repeat_ngram_size, grammar or processors have no
        drafts. In a caller's cache, another model has none, nor has "self" if it is a rolling one. `submit` refuses
        another model.

        The rest configures `submit`, before which it takes no memory. max_batch_size: the most sequences that run at a
        time, default 8 on a CPU, 256 on a GPU. max_slots: KV cache slots for the tokens of all of them; default enough
        for all to reach max_length, as far as they fit in memory_fraction of the free memory. max_length: the most
        tokens of a sequence, default the model's context. prefill_tokens: prompt tokens per step (default 512, on a GPU
        2048): fewer delay running requests less, more finish prompts sooner.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.kv_dtype = kv_dtype = kv_dtype_of(model, kv_dtype)
        check_kv_dtype(kv_dtype, model.device)
        self.runner = ModelRunner(model, compile=compile, backend=backend)
        self.speculation = Speculation.of(speculate, self.runner)
        self.limits = RequestLimits(model, tokenizer)
        self._scheduler: Scheduler | None = None
        self._making = threading.Lock()  # guards making the scheduler: the first requests may come from several threads
        self._new_scheduler = functools.partial(
            Scheduler,
            self.runner,
            tokenizer,
            self.limits,
            kv_dtype=kv_dtype,
            max_batch_size=max_batch_size,
            max_slots=max_slots,
            max_length=max_length,
            memory_fraction=memory_fraction,
            prefill_tokens=prefill_tokens,
            speculation=self.speculation,
        )

    @property
    def compile(self) -> bool:
        """Whether steps are compiled; may be set between calls, to "auto" too. Raises ValueError on a CPU before torch
        2.13, whose compiled reductions of booleans write out of bounds."""
        return self.runner.compile

    @compile.setter
    def compile(self, on: bool | Literal["auto"]) -> None:
        self.runner.compile = on

    @property
    def graphs(self) -> Graphs:
        """The compiled parts of steps."""
        return self.runner.graphs

    def generate(self, prompts: Sequence[AnyPrompt], **options: Any) -> list[Completion]:
        """Complete every prompt; see `stream` for the options.

        Raises as `stream` does; a NonFiniteLogitsError carries the completions of all prompts so far as `completions`.
        """
        check_options("generate", self.stream, options)
        prompts = list(prompts)
        completions = [Completion.empty(self.tokenizer) for _ in prompts]
        try:
            for step in self.stream(prompts, **options):
                completions[step.row].add(step)
        except NonFiniteLogitsError as error:
            raise error.with_completions(completions) from None
        return completions

    def stream(
        self,
        prompts: Sequence[AnyPrompt],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | Sequence[Sampling] | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Iterable[int] | None = None,
        mask: Mask | Sequence[Mask | None] | None = None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None = None,
        cache: Cache | None = None,
        cached_ids: Sequence[Sequence[int]] | None = None,
        capture: Capture | Sequence[Capture] | None = None,
        edit: Edit | Sequence[Edit] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Iterator[Step]:
        """Complete prompts of any lengths together, yielding every token as it is sampled.

        prompts: lists of token ids; or the result of `fuse`, several prompts that one text continues; or an `Ensemble`.
        max_new_tokens: default that of generation_config.json, else 256, but no more than fit in the context and in
        that file's max_length.
        sampling: one for all prompts or one each; default what generation_config.json recommends, else greedy.
        stop: strings that end a text; searched for in the new text only. stop_token_ids: default the model's
        end-of-text ids. Neither appears in the text, but their tokens are yielded.
        mask: default `Llama.default_masks`, combined with `masks.fused()` if a prompt is fused.
        score_mod: default none. One for all layers or one each. Masks of the same code share compiled steps, whatever
        the values of their tensors.
        cache: continue after its tokens; default a new one. It must have a row per prompt (for an ensemble, one per
        member). It lacks the last generated token, which was never fed: begin the next prompt with that token. With
        `speculate` it may be ahead of the last token taken: close a stream that is left early before going on with it.
        cached_ids: for each prompt the ids of the tokens in the cache, which does not store ids: the repetition penalty
        then counts them too, and the text continues from them.
        capture: tensors inside the layers to keep, for prompts and new tokens; edit: changes to them; one or several of
        each. Their rows are the prompts, or the members of ensembles.
        adapter: the name of a loaded LoRA adapter, one for all prompts or one each; None for the active one, "__base__"
        for none; see `Llama.adapters`. Changing the active one changes no stream that has begun.
        Raises ValueError, before any work, for an empty prompt, an id outside the vocabulary, and tokens beyond the
        model's context. If the logits for a prompt's next token are NaN or infinite, that prompt ends there, without
        that token; once the others are done, NonFiniteLogitsError names it. A cache that was passed in may then hold
        NaN: do not reuse it. In the same way a prompt ends whose logits processor raises, or for which no token is left
        to sample, and the error is raised in the end.
        """
        model, ensembles = self.model, as_requests(prompts)
        limits = self.limits.check(ensembles, max_new_tokens, cache)
        if not isinstance(sampling, Sequence):
            sampling = [sampling or Sampling.recommended(model.generation_config)] * len(ensembles)
        if len(sampling) != len(ensembles):
            raise ValueError(f"{len(sampling)} samplings for {len(ensembles)} prompts; give one, or one per prompt")
        named = [adapter] * len(ensembles) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(named) != len(ensembles):
            raise ValueError(f"{len(named)} adapters for {len(ensembles)} prompts; give one, or one per prompt")
        adapters = [model.adapters.of_request(name) for name in named]
        before = self.limits.cached_ids(cached_ids, cache, len(ensembles))
        plan = plan_of_rows(model, [p for each in ensembles for p in each.prompts], mask, score_mod, cache)
        if mask is not None or score_mod is not None:
            plan.check_last_token(longest_of(ensembles, limits, cache), model.dims.num_heads)
        stop_ids, spec = self.limits.stop_ids(stop_token_ids), AttentionSpec(None, None, plan, False)
        captures, edits = as_tuple(capture, Capture, "capture"), as_tuple(edit, Edit, "edit")
        requests = []
        for q, (each, limit) in enumerate(zip(ensembles, limits, strict=True)):
            text, chosen = [*before[q], *each.prompts[0].ids], with_seed(sampling[q])
            request = Request(
                q,
                chosen,
                ensemble=each,
                output_processor=OutputProcessor(q, self.tokenizer, text, stop, stop_ids, limit),
                spec=spec,
                captures=captures,
                edits=edits,
                cache=cache,
                cached_ids=before[q],
                processors=self.limits.processors(chosen, text, stop_ids, limit),
                adapter=adapters[q],
            )
            request.sequences = [TokenSequence(prompt, tokens_of(prompt, []), None) for prompt in each.prompts]
            requests.append(request)
        rows = [len(s.prompt.ids) + limits[r.number] for r in requests for s in r.sequences]
        model.probes(captures, edits, len(rows), stepwise=True)  # raises what the stream would raise later
        return self._steps(requests, self.new_cache(len(rows), max(rows)) if cache is None else cache)

    @torch.no_grad()
    def _steps(self, requests: Sequence[Request], cache: Cache) -> Iterator[Step]:
        """Yield the steps of requests that run together."""
        row = 0
        for request in requests:
            request.prepare(row)
            row += len(request.sequences)
        stream = new_stream(self.runner, requests, cache, self.speculation)
        failed = []
        try:
            for output in stream.outputs():
                for request, sampled in output.tokens():
                    if request.finished:
                        continue
                    if not sampled.finite or sampled.error is not None:
                        request.finish_reason, request.error = "error", sampled.error
                        if not sampled.finite:
                            failed.append((request.number, len(request.steps) + 1))
                        continue
                    step = request.add(sampled.token, sampled.logprob, sampled.top_logprobs)
                    request.finish_reason = step.finish_reason
                    yield step
        finally:
            if self.speculation is not None:
                self.speculation.finish(requests)
        if failed:
            raise NonFiniteLogitsError(failed, self.model.dtype)
        for request in requests:
            if request.error is not None:
                raise request.error

    def beam_search(
        self,
        prompts: Sequence[AnyPrompt],
        *,
        num_beams: int,
        max_new_tokens: int | None = None,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        num_return_sequences: int = 1,
        repetition_penalty: float | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Iterable[int] | None = None,
        mask: Mask | Sequence[Mask | None] | None = None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None = None,
    ) -> list[list[ScoredCompletion]]:
        """Search for the likeliest texts after each prompt; return the best `num_return_sequences`, the best first.

        As in transformers, a text's score is the sum of its log-probabilities divided by length ** length_penalty, so a
        positive penalty favours long ones; early_stopping: see `BeamOptions`. repetition_penalty: default that of
        generation_config.json; it changes the score, not the log-probabilities. All else is as in `stream`; a mask that
        reads `batch` sees the number of the prompt. All beams of all prompts run together, in a cache of their own.
        Raises ValueError as `stream` does, for an ensemble, and for options out of range; NonFiniteLogitsError at
        once.
        """
        options = BeamOptions(
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
        )
        model, requests = self.model, as_requests(prompts)
        for number, request in enumerate(requests):
            if len(request.prompts) > 1:
                raise ValueError(
                    f"prompt {number} is an ensemble, which has no beams: use generate, or fuse its prompts"
                )
        limits = self.limits.check(requests, max_new_tokens)
        options.check_length(max(limits))
        recommended = Sampling.recommended(model.generation_config, repetition_penalty=repetition_penalty)
        names = {name: name for name in ("no_repeat_ngram_size", "min_new_tokens")}
        names["banned_tokens"] = "suppress_tokens"  # as the file has it
        if asked := [key for name, key in names.items() if getattr(recommended, name) != getattr(Sampling, name)]:
            raise ValueError(
                f"generation_config.json recommends {', '.join(asked)}, which beam search lacks; delete it there"
            )
        each = [request.prompts[0] for request in requests]
        plan = plan_of_rows(model, each, mask, score_mod, None)
        if mask is not None or score_mod is not None:
            plan.check_last_token(longest_of(requests, limits), model.dims.num_heads)
        stop_ids = self.limits.stop_ids(stop_token_ids)
        beams = []
        for n, (prompt, limit) in enumerate(zip(each, limits, strict=True)):
            processor = OutputProcessor(n, self.tokenizer, prompt.ids, stop, stop_ids, limit)
            beams.append(PromptBeams(options, processor, stop))
        slots = max(len(prompt.ids) + limit for prompt, limit in zip(each, limits, strict=True))
        slots = self.slots(len(each) * num_beams, slots)
        BeamSearch(self.runner, each, beams, plan, slots, self.kv_dtype, recommended.repetition_penalty).run()
        return [found.completions(self.tokenizer) for found in beams]

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of submitted requests; first access allocates its slots. Raises ValueError for bad sizes."""
        with self._making:
            if self._scheduler is None:
                self._scheduler = self._new_scheduler()
            return self._scheduler

    def submit(self, prompt: AnyPrompt, **options: Any) -> Request:
        """Queue a prompt for completion by `step` or `run`, many at a time; requests may be submitted at any time.

        prompt, max_new_tokens, sampling, stop, stop_token_ids, mask, score_mod, cache, cached_ids, capture, edit,
        adapter: as in `stream`, for one prompt; a mask that reads `batch` sees the rows of this request only. priority:
        higher ones go first, equal ones in order of arrival. callback: called with each `Step`; an exception in it ends
        this request; if Ctrl-C interrupts it, it is called again with the same step.
        In float32 a request gets the tokens that it would get alone; bfloat16 rounds differently in another batch.
        Prompts with a common prefix share its keys and values, a block of 128 tokens at a time, unless they have a mask
        or score function of their own, or different adapters. At most 8 different masks and score functions run at a
        time. A mask that looks ahead sees what is appended in the same step.
        A request with a cache, captures or edits is computed in steps of its own beside those of the others: an edit
        sees the rows of its request, a cache is the request's until it has finished, and so is a capture.
        Can be called from any thread. Raises ValueError as `stream` does, for a request that does not fit in the slots,
        for a cache or capture of an unfinished request, and for a mask or score function that fails for its last token,
        or whose Python code reads a tensor's value.
        """
        check_options("submit", Scheduler.submit, options)
        return self.scheduler.submit(prompt, **options)

    def submit_samples(self, prompt: AnyPrompt, n: int, *, sampling: Sampling, **options: Any) -> list[Request]:
        """Submit `n` requests for one prompt, which share its computation; sample i has the seed of `sampling` + i."""
        check_options("submit_samples", Scheduler.submit, options)
        if n > 1 and (held := [name for name in ("cache", "capture") if options.get(name) is not None]):
            raise ValueError(
                f"{' and '.join(held)}: only one request at a time can have it; submit each sample by itself"
            )
        first = with_seed(sampling)
        return [
            self.submit(prompt, sampling=with_seed(first, i), **options) for i in range(whole_number("n", n, least=1))
        ]

    def best_of(
        self,
        prompts: Sequence[AnyPrompt],
        n: int,
        *,
        num_return_sequences: int = 1,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> list[list[ScoredCompletion]]:
        """Sample `n` completions of each prompt and return the `num_return_sequences` best, the best first.

        A completion's score is the mean of its tokens' log-probabilities, the model's own, as in OpenAI's `best_of`.
        They are submitted, so those of a prompt share its computation; options: as in `submit`. Sample i of prompt p
        has the seed of `sampling` + p * n + i. Steps until all have finished; other submitted requests take part.
        Raises ValueError as `submit` does, for greedy sampling, and what ended a request.
        """
        check_options("best_of", Scheduler.submit, options)
        if whole_number("num_return_sequences", num_return_sequences, least=1) > whole_number("n", n, least=1):
            raise ValueError(f"num_return_sequences {num_return_sequences} is more than the {n} samples of a prompt")
        first = with_seed(Sampling.recommended(self.model.generation_config) if sampling is None else sampling)
        if n > 1 and not first.divisor:
            raise ValueError(f"{n} greedy samples would be equal; give a sampling with a temperature above 0")
        requests, samples = as_requests(prompts), list[list[Request]]()
        if not requests:
            raise ValueError("no prompts given")
        if options.get("cache") is None:
            self.limits.check(requests, options.get("max_new_tokens"))  # names the prompt by its number here
        try:
            for number, prompt in enumerate(requests):
                samples.append(self.submit_samples(prompt, n, sampling=with_seed(first, number * n), **options))
            while not all(request.finished for each in samples for request in each):
                self.step()
        finally:
            for request in [request for each in samples for request in each]:
                self.cancel(request)  # if an error or Ctrl-C came first
        for number, each in enumerate(samples):
            for error in (request.error for request in each if request.error is not None):
                if isinstance(error, NonFiniteLogitsError):  # it has the number of a sample
                    raise NonFiniteLogitsError([(number, token) for _, token in error.where], self.model.dtype)
                raise error
        return [sorted(map(_scored, each), key=lambda done: -done.score)[:num_return_sequences] for each in samples]

    def step(self) -> list[Request]:
        """Run one step: prefill chunks of the submitted prompts, and one token for each running request.

        Returns the requests that have ended since the last call. If it fails or is interrupted, running requests wait
        again, and no delivered token is lost. Concurrent calls take turns. Raises ValueError if called in a callback.
        """
        return self.scheduler.step()

    def run(self) -> None:
        """Step until all submitted requests are done."""
        while not self.scheduler.idle:
            self.step()

    def cancel(self, request: Request) -> None:
        """End a request, keeping its steps so far. Can be called from any thread. Raises ValueError for a request of
        another engine."""
        self.scheduler.cancel(request)

    def forget(self) -> None:
        """Forget the keys and values of computed prompts, so that requests submitted from now on share none of them.

        Changed weights are detected, unless they are written through `parameter.data` or were created in
        `torch.inference_mode()`: call this after such a change.
        """
        self.scheduler.forget()

    def explain(self, bytes_per_second: float | None = None) -> str:
        """Explain the last run in lines of text: kernels and why, precision, graphs, and the blocks that the last
        query visits; and what came of drafts so far. bytes_per_second: the read rate of decoding (see
        `explain.bytes_per_step`); if given, measure how fast memory can be read, and report the fraction reached.

        Raises ValueError if nothing has run.
        """
        lines = [explain.explain(self.runner, bytes_per_second)]
        lines += [] if self.speculation is None else [self.speculation.describe()]
        return "\n".join(lines)

    @property
    def compile_seconds(self) -> float:
        """The seconds spent compiling so far, including the first run of compiled code."""
        return self.graphs.seconds

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Return a cache for this engine; if it compiles, rounded up to one of few sizes, so that graphs are shared."""
        return self.model.new_cache(batch_size, self.slots(batch_size, max_length), kv_dtype=self.kv_dtype)

    def slots(self, batch_size: int, max_length: int) -> int:
        """Return the number of slots per row for rows of up to `max_length` tokens."""
        if not self.compile:
            return max_length
        usual = min(MIN_SLOTS // batch_size, self.model.context)
        return 1 << (max(usual, max_length, BLOCK) - 1).bit_length()

    def check(
        self, prompts: Sequence[AnyPrompt], max_new_tokens: int | None = None, cache: Cache | None = None
    ) -> list[int]:
        """Return the most new tokens that each prompt can get; raises the ValueErrors of `stream`."""
        return self.limits.check(as_requests(prompts), max_new_tokens, cache)


def _scored(request: Request) -> ScoredCompletion:
    """Return a request's completion with its mean log-probability."""
    done = request.completion
    mean = sum(done.logprobs) / len(done.logprobs) if done.logprobs else -math.inf
    return ScoredCompletion(**vars(done), score=mean)
