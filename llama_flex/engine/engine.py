"""Generate with a model: chunked prefill, streams of tokens and text, requests in batches."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import Backend
from ..cache import Cache
from ..interp.capture import Capture
from ..interp.edits import Edit
from ..interp.hook_points import Captured, Probe
from ..interp.probes import as_tuple
from ..masks.layout import BLOCK
from ..masks.mask import Mask
from ..masks.plan import AttentionPlan
from ..masks.scores import ScoreMod
from ..model import Llama, last_tokens
from ..sampling import Sampling, stack, with_seed
from ..tokenizer import Tokenizer
from ..tokens import Tokens
from ..usercode.arguments import check_options, whole_number
from . import explain
from .decoding import Batch, Decoding
from .fusion import AnyPrompt, Prompt, as_requests, token_ids
from .graphs import Graphs
from .limits import RequestLimits
from .output import Completion, NonFiniteLogitsError, OutputProcessor, Step
from .request import Request, longest_of
from .scheduler import Scheduler
from .step_runner import LastRun, StepRunner
from .transfer import pad_rows

# Prefill chunk sizes in tokens: the largest that the prompt still fills, the last one padded. A GPU needs large ones.
CHUNKS = {"cpu": (512, 128), "cuda": (2048, 512, 128)}
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
        compile: bool = False,
        backend: Backend = "flex",
        max_batch_size: int | None = None,
        max_slots: int | None = None,
        max_length: int | None = None,
        memory_fraction: float = 0.9,
        prefill_tokens: int | None = None,
    ) -> None:
        """tokenizer: for text and stop strings. compile: run compiled steps (a fixed cost of seconds, then fast).
        backend: of attention; "dense" is its definition, see `attention.attention_weights`.

        The rest configures `submit`, before which it takes no memory. max_batch_size: the most sequences that run at a
        time, default 8 on a CPU, 256 on a GPU. max_slots: KV cache slots for the tokens of all of them; default enough
        for all to reach max_length, as far as they fit in memory_fraction of the free memory. max_length: the most
        tokens of a sequence, default the model's context. prefill_tokens: prompt tokens per step (default 512, on a GPU
        2048): fewer delay running requests less, more finish prompts sooner.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.runner = StepRunner(model, compile=compile, backend=backend)
        self.limits = RequestLimits(model)
        self._scheduler: Scheduler | None = None
        self._making = threading.Lock()  # guards making the scheduler: the first requests may come from several threads
        self._new_scheduler = functools.partial(
            Scheduler,
            self.runner,
            tokenizer,
            self.limits,
            max_batch_size=max_batch_size,
            max_slots=max_slots,
            max_length=max_length,
            memory_fraction=memory_fraction,
            prefill_tokens=prefill_tokens,
        )

    @property
    def compile(self) -> bool:
        """Whether steps are compiled; may be set between calls. Raises ValueError on a CPU before torch 2.13, whose
        compiled reductions of booleans write out of bounds."""
        return self.runner.compile

    @compile.setter
    def compile(self, on: bool) -> None:
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
        member). It lacks the last generated token, which was never fed: begin the next prompt with that token.
        cached_ids: for each prompt the ids of the tokens in the cache, which does not store ids: the repetition penalty
        then counts them too, and the text continues from them.
        capture: tensors inside the layers to keep, for prompts and new tokens; edit: changes to them; one or several of
        each. Their rows are the prompts, or the members of ensembles.
        Raises ValueError, before any work, for an empty prompt, an id outside the vocabulary, and tokens beyond the
        model's context. If the logits for a prompt's next token are NaN or infinite, that prompt ends there, without
        that token; once the others are done, NonFiniteLogitsError names it. A cache that was passed in may then hold
        NaN: do not reuse it.
        """
        model = self.model
        requests = as_requests(prompts)
        limits = self.limits.check(requests, max_new_tokens, cache)
        if not isinstance(sampling, Sequence):
            sampling = [sampling or Sampling.recommended(model.generation_config)] * len(requests)
        if len(sampling) != len(requests):
            raise ValueError(f"{len(sampling)} samplings for {len(requests)} prompts; give one, or one per prompt")
        sampling = [with_seed(one) for one in sampling]
        stop_ids = self.limits.stop_ids(stop_token_ids)
        before = self._cached_ids(cached_ids, cache, len(requests))
        outputs = [
            OutputProcessor(q, self.tokenizer, [*before[q], *request.prompts[0].ids], stop, stop_ids, limit)
            for q, (request, limit) in enumerate(zip(requests, limits, strict=True))
        ]
        seen_ids = [
            [*ids, *(id for prompt in request.prompts for id in prompt.ids)]
            for ids, request in zip(before, requests, strict=True)
        ]
        batch = Batch(requests, model.device)
        # A caller's cache must not run ahead: when a token is yielded, it holds the tokens before that one.
        ahead = cache is None and model.device.type == "cuda"
        if cache is None:
            longest = max(len(p.ids) + limits[q] for p, q in zip(batch.rows, batch.requests, strict=True))
            cache = self.new_cache(len(batch.rows), longest)
        plan = batch.attention_plan(model, mask, score_mod, cache)
        if mask is not None or score_mod is not None:
            tokens = longest_of(batch.rows, [limits[q] for q in batch.requests])
            tokens = tokens._replace(
                index=torch.where(tokens.index < 0, -1, tokens.index + cache.length[:, None].cpu())
            )
            plan.check_last_token(tokens, model.dims.num_heads)
        captures = as_tuple(capture, Capture, "capture")
        probes = model.probes(captures, edit, len(batch.rows), stepwise=True)
        ahead = ahead and not captures  # captures may be copied to the host, which waits
        return self._run(batch, outputs, sampling, stop_ids, seen_ids, plan, cache, ahead, captures, probes)

    @torch.no_grad()
    def _run(
        self,
        batch: Batch,
        outputs: list[OutputProcessor],
        sampling: Sequence[Sampling],
        stop_ids: frozenset[int],
        seen_ids: Sequence[Sequence[int]],
        plan: AttentionPlan,
        cache: Cache,
        ahead: bool,
        captures: Sequence[Capture],
        probes: Mapping[int, Probe],
    ) -> Iterator[Step]:
        held, limits = cache.tokens, [output.limit for output in outputs]
        self.runner.last = LastRun(plan, lambda: held)

        def keep(captured: Captured | None) -> None:
            for each in captures:
                assert captured is not None
                each.add(captured, plan, cache)

        parameters = stack(sampling, self.model.device)
        decoding = Decoding(self.runner, batch, plan, cache, parameters, limits, stop_ids, seen_ids, probes)
        decoding.first(_ends(batch.rows, self.outputs(batch.rows, plan, cache, probes, keep)))
        alive, failed = set(range(len(limits))), []
        for count in range(1, max(limits) + 1):
            read = decoding.result()
            # Enqueue the next step before reading this one's tokens, unless the caller holds the cache or captures.
            if ahead and any(limits[q] > count for q in alive):
                keep(decoding.next())
            tokens, logprobs, finite = read()
            for q in sorted(alive):
                if not finite[q]:
                    alive.remove(q)
                    decoding.stop(q)
                    failed.append((q, count))
                    continue
                new = outputs[q].put(int(tokens[q]), logprobs[q])
                if new.finish_reason is not None:
                    alive.remove(q)
                if new.finish_reason == "stop" and new.token not in stop_ids:
                    decoding.stop(q)  # a stop string, which only the host sees
                yield new
            if not alive:
                break
            if not ahead:
                keep(decoding.next())
        if failed:
            raise NonFiniteLogitsError(failed, self.model.dtype)

    def _cached_ids(
        self, given: Sequence[Sequence[int]] | None, cache: Cache | None, count: int
    ) -> Sequence[Sequence[int]]:
        if given is None:
            return [[]] * count
        if cache is None:
            raise ValueError("cached_ids needs the cache that it describes; pass cache=...")
        rule = f"cached_ids must hold a list of token ids for each of {count} prompts, such as {[[1, 2, 3]] * count}"
        wrong = ValueError(f"{rule}, not {given!r:.100}")
        try:
            ids = [token_ids(each) for each in given]
        except (TypeError, ValueError):
            raise wrong from None
        if len(ids) != count:
            raise wrong
        for n, each in enumerate(ids):
            if each:
                self.limits.check_ids(f"cached_ids {n}", each)
        return ids

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of submitted requests; first access allocates its slots. Raises ValueError for bad sizes."""
        with self._making:
            if self._scheduler is None:
                self._scheduler = self._new_scheduler()
            return self._scheduler

    def submit(self, prompt: AnyPrompt, **options: Any) -> Request:
        """Queue a prompt for completion by `step` or `run`, many at a time; requests may be submitted at any time.

        prompt, max_new_tokens, sampling, stop, stop_token_ids, mask, score_mod: as in `stream`, for one prompt; a mask
        that reads `batch` sees the rows of this request only. priority: higher ones go first, equal ones in order of
        arrival. callback: called with each `Step`; an exception in it ends this request; if Ctrl-C interrupts it, it is
        called again with the same step.
        In float32 a request gets the tokens that it would get alone; bfloat16 rounds differently in another batch.
        Prompts with a common prefix share its keys and values, a block of 128 tokens at a time, unless they have a mask
        or score function of their own. At most 8 different ones run at a time. A mask that looks ahead sees what is
        appended in the same step.
        Can be called from any thread. Raises ValueError as `stream` does, for a request that does not fit in the slots,
        and for a mask or score function that fails for its last token, or whose Python code reads a tensor's value.
        """
        check_options("submit", Scheduler.submit, options)
        return self.scheduler.submit(prompt, **options)

    def submit_samples(self, prompt: AnyPrompt, n: int, *, sampling: Sampling, **options: Any) -> list[Request]:
        """Submit `n` requests for one prompt, which share its computation; sample i has the seed of `sampling` + i."""
        check_options("submit_samples", Scheduler.submit, options)
        first = with_seed(sampling)
        return [
            self.submit(prompt, sampling=with_seed(first, i), **options) for i in range(whole_number("n", n, least=1))
        ]

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
        query visits. bytes_per_second: the read rate of decoding (see `explain.bytes_per_step`); if given, measure how
        fast memory can be read, and report the fraction reached.

        Raises ValueError if nothing has run.
        """
        return explain.explain(self.runner, bytes_per_second)

    @property
    def compile_seconds(self) -> float:
        """The seconds spent compiling so far, including the first run of compiled code."""
        return self.graphs.seconds

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Return a cache for this engine; if it compiles, rounded up to one of few sizes, so that graphs are shared."""
        return self.model.new_cache(batch_size, self.slots(batch_size, max_length))

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

    def outputs(
        self,
        rows: Sequence[Prompt],
        plan: AttentionPlan,
        cache: Cache,
        probes: Mapping[int, Probe] | None = None,
        keep: Callable[[Captured | None], None] = lambda captured: None,
    ) -> Iterator[Tensor]:
        """Append prompts to the cache in chunks of fixed sizes; yield the last layer's output of each, `[R, T, E]`.

        If any token sees one of a later chunk, all are computed in one chunk. Shorter rows are padded at the end.
        keep: called with the tensors that probes captured.
        """
        device = self.model.device
        sizes = CHUNKS[device.type]
        length = torch.tensor([len(prompt.ids) for prompt in rows], dtype=torch.int32, device=device)
        longest = max(len(prompt.ids) for prompt in rows)
        whole = 1 << (-(-longest // sizes[-1]) * sizes[-1] - 1).bit_length()
        width = max(whole, longest + 2 * sizes[-1])  # if chunks are split, the last one reaches further
        ids = pad_rows([prompt.ids for prompt in rows], width, torch.int64).to(device)
        positions = pad_rows([prompt.positions for prompt in rows], width, torch.int32).to(device)
        positions += cache.next_position[:, None]
        segments = pad_rows([prompt.segments for prompt in rows], width, torch.int32).to(device)
        chunks = _chunks(longest, sizes, cache.largest_append)
        column = torch.arange(width, dtype=torch.int32, device=device)
        index = torch.where(column < length[:, None], cache.length[:, None] + column, -1)
        if self._looks_ahead(plan, Tokens(index, positions, segments), chunks, whole):
            chunks = _chunks(longest, (whole,), cache.largest_append)
        for start, size, count in chunks:
            here = (length - start).clamp(0, count)
            chunk = [_part(x, start, start + size) for x in (ids, positions, segments)]
            with cache.appending(count):
                output, captured = self.runner.step(chunk[0], here, chunk[1], chunk[2], plan, cache, probes)
            keep(captured)
            yield output[:, :count]

    def _looks_ahead(
        self, plan: AttentionPlan, tokens: Tokens, chunks: Sequence[tuple[int, int, int]], width: int
    ) -> bool:
        """Return whether any of these tokens sees one of a later chunk, among the first `width`.

        Masks marked `never_looks_ahead` are skipped. Any other is evaluated, at the cost of making the block lists of
        the chunks: compiled if steps are, else only for the cells in question.
        """
        masks = tuple(v.mask for v in plan.variants if not v.mask.never_looks_ahead)
        if not masks:
            return False
        heads, found, longest = self.model.dims.num_heads, [], sum(chunks[-1][::2])
        column = torch.arange(tokens.index.shape[1], device=tokens.index.device)
        for start, size, count in chunks[:-1]:
            end = start + count
            here, later = (
                tokens._replace(index=tokens.index.masked_fill(out, -1)) for out in (column >= end, column < end)
            )
            q = Tokens(*(_part(x, start, start + size) for x in here))
            kv = Tokens(*(_part(x, 0, width) if self.compile else _part(x, end, longest) for x in later))
            run = self.runner.run_for(q.index.shape, kv.index.shape, *(mask.structure() for mask in masks))
            found.append(run("looks ahead", _sees_any, masks, q, kv, heads))
        return bool(found) and bool(torch.stack(found).any())


def _chunks(longest: int, sizes: Sequence[int], most: int) -> list[tuple[int, int, int]]:
    """Split prompts of up to `longest` tokens into chunks: for each its start, its size with padding, and how many of
    its tokens are appended, at most `most`, since a rolling cache may have less room than a chunk."""
    padded, start, chunks = -(-longest // sizes[-1]) * sizes[-1], 0, []
    while start < longest:
        size = next((size for size in sizes if start + size <= padded), sizes[-1])
        chunks.append((start, size, min(size, longest - start, most)))
        start += max(chunks[-1][2], 1)  # a full cache appends none, and raises an error on the attempt
    return chunks


def _part(x: Tensor, start: int, end: int) -> Tensor:
    """Copy columns of `[R, T]`: a slice keeps the strides of the whole, and every new stride would recompile."""
    return x[:, start:end].clone(memory_format=torch.contiguous_format)


def _sees_any(masks: Sequence[Mask], q: Tokens, kv: Tokens, num_heads: int) -> Tensor:
    """Return whether any query q, padding aside, sees any key kv under any of the masks, as a boolean tensor."""
    real = Mask(lambda q, kv: q.index >= 0)
    return torch.stack([(real & mask).blocks(q, kv, num_heads)[1].any() for mask in masks]).any()


def _ends(rows: Sequence[Prompt], outputs: Iterable[Tensor]) -> Tensor:
    """Return the output `[R, 1, E]` at each prompt's last token, given the outputs of the chunks."""
    ends, start = torch.empty(0), 0
    for x in outputs:
        left = torch.tensor([len(prompt.ids) - start for prompt in rows], device=x.device)
        end = last_tokens(x, left.clamp(0, x.shape[1]), 1)
        here = (left > 0) & (left <= x.shape[1])
        ends = end if start == 0 else torch.where(here[:, None, None], end, ends)
        start += x.shape[1]
    return ends
