"""Beam search: several hypotheses of each prompt, a row each, of which every step keeps the likeliest continuations.

The device computes the candidates of a step and the host, which reads them once, chooses among them as transformers
does. Rows are never copied as a whole: the hypotheses of a prompt share its tokens and have the same number of new
ones, so a row that goes on from another takes over the keys and values of the new ones alone.
Dimensions: P prompts, N beams, R = P * N rows, C candidates of a prompt, V vocabulary, E hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cache import Cache
from ..kernels.kv_cache import KV
from ..kernels.reductions import all_finite
from ..logits.parameters import SamplingTensors
from ..masks.plan import AttentionPlan
from ..model import Llama
from ..sampling import adjust_logits
from ..tokenizer import Tokenizer
from ..usercode.arguments import whole_number
from .fusion import Prompt
from .model_runner import LastRun, ModelRunner, RecordedSteps
from .output import NonFiniteLogitsError, OutputProcessor, ScoredCompletion, Step
from .prefill import newest_outputs, prefill
from .request import tokens_of
from .request_masks import plan_of_beams
from .transfer import StagingBuffer, read_async

_LEAST_MOVED = 32  # slots of a row that a step moves: a power of two from here on, so that graphs are few


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """The options of a beam search, with the names and the meaning that they have in transformers.

    early_stopping: when a prompt with `num_beams` finished hypotheses is done: True, at once; False, when the best
    unfinished one, divided by its length so far, is no better than the worst of them; "never", when it could not
    become better with a length penalty for the longest text. Raises ValueError for values out of range.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        whole_number("num_beams", self.num_beams, least=2)
        if whole_number("num_return_sequences", self.num_return_sequences, least=1) > self.num_beams:
            raise ValueError(
                f"num_return_sequences {self.num_return_sequences} is more than num_beams {self.num_beams}"
            )
        if not any(self.early_stopping is choice for choice in (True, False)) and self.early_stopping != "never":
            raise ValueError(f"early_stopping must be True, False or 'never', not {self.early_stopping!r}")
        if type(self.length_penalty) not in (int, float) or not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a number, such as 1.0, not {self.length_penalty!r:.60}")

    def check_length(self, longest: int) -> None:
        """Raise ValueError if the penalty for a text of so many tokens is too large or too small for float32."""
        if abs(self.length_penalty) * math.log(longest) > 80:
            raise ValueError(f"length_penalty {self.length_penalty} is too large for texts of up to {longest} tokens")

    def normalised(self, score: np.float32, length: int) -> np.float32:
        """Return a sum of log-probabilities divided by length ** length_penalty, in float32."""
        return np.float32(score / np.float32(length**self.length_penalty))


class Hypothesis(NamedTuple):
    """A text so far. score: the sum of its log-probabilities; normalised, once it has finished. beam: the one of its
    prompt that it continues."""

    score: np.float32
    tokens: list[int]
    logprobs: list[float]
    beam: int


class PromptBeams:
    """The hypotheses of one prompt: up to N running ones and the N best finished ones, each the best first."""

    def __init__(self, options: BeamOptions, processor: OutputProcessor, stop: Sequence[str]) -> None:
        """processor: of the prompt's tokens, for limit, stop tokens and text; it searches for the strings `stop`."""
        self.options, self.done = options, False
        self._processor, self._has_stop_strings = processor, bool(stop)
        self.running = [Hypothesis(np.float32(0), [], [], 0)]
        self.finished: list[Hypothesis] = []

    @property
    def limit(self) -> int:
        """The most new tokens."""
        return self._processor.limit

    @property
    def candidates(self) -> int:
        """The number of candidates among which N go on even if as many as possible end with a stop token."""
        return max(2, 1 + len(self._processor.stop_ids)) * self.options.num_beams

    def advance(self, candidates: np.ndarray, vocab_size: int) -> None:
        """Choose among candidates, the best first: scores, places in `[N * V]`, log-probabilities of the tokens,
        `[3, C]`."""
        beams, length = self.options.num_beams, len(self.running[0].tokens) + 1
        running: list[Hypothesis] = []
        ended: list[Hypothesis] = []
        for rank, (total, place, logprob) in enumerate(candidates.T):
            if total == -math.inf or (rank >= beams and len(running) == beams):
                break
            beam, token = divmod(int(place), vocab_size)
            before, score = self.running[beam], np.float32(total)
            new = Hypothesis(score, [*before.tokens, token], [*before.logprobs, float(logprob)], beam)
            if not self._ends(new.tokens):
                running.append(new)
            elif rank < beams:  # the others are there to go on
                ended.append(new._replace(score=self.options.normalised(score, length)))
        self.running = running[:beams]
        self.finished = sorted([*self.finished, *ended], key=lambda hypothesis: -hypothesis.score)[:beams]
        self.done = not self.running or (len(self.finished) == beams and not self._goes_on(length))

    def _goes_on(self, length: int) -> bool:
        """Return whether more is computed although N hypotheses have finished."""
        options = self.options
        if options.early_stopping is True:
            return False
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = self.limit
        return bool(options.normalised(self.running[0].score, length) > self.finished[-1].score)

    def _ends(self, tokens: list[int]) -> bool:
        if len(tokens) == self.limit or tokens[-1] in self._processor.stop_ids:
            return True
        return self._has_stop_strings and self._steps(tokens)[-1].finish_reason is not None

    def _steps(self, tokens: list[int], logprobs: Sequence[float] | None = None) -> list[Step]:
        self._processor.rewind([])
        return [self._processor.put(*each) for each in zip(tokens, logprobs or [0.0] * len(tokens), strict=True)]

    def completions(self, tokenizer: Tokenizer | None) -> list[ScoredCompletion]:
        """Return the best finished hypotheses; fewer than asked for if there were no more."""
        found = []
        for hypothesis in self.finished[: self.options.num_return_sequences]:
            completion = ScoredCompletion(text=None if tokenizer is None else "", score=float(hypothesis.score))
            for step in self._steps(hypothesis.tokens, hypothesis.logprobs):
                completion.add(step)
            found.append(completion)
        return found


class BeamSearch:
    """The beams of several prompts, computed together."""

    def __init__(
        self,
        runner: ModelRunner,
        prompts: Sequence[Prompt],
        beams: Sequence[PromptBeams],
        plan: AttentionPlan,
        slots: int,
        kv_dtype: Literal["fp8"] | None,
        repetition_penalty: float,
    ) -> None:
        """plan: for a row of each prompt. slots: of a row's cache."""
        self.model, self.prompts, self.beams, self.plan = runner.model, prompts, beams, plan
        self.num_beams, device = beams[0].options.num_beams, runner.model.device
        rows, self.vocab_size = len(prompts) * self.num_beams, runner.model.dims.vocab_size
        self._slots, self._kv_dtype, self._adapters = slots, kv_dtype, self.model.adapters.number
        self._ids = [tokens_of(prompt, []) for prompt in prompts]
        self._shape = "beams", rows, slots, kv_dtype, plan.structure
        self._main, self.runner = runner, self._runner_for(runner)
        self._candidates = max(each.candidates for each in beams)
        integers = dict.fromkeys(("ids", "parents", "starts"), (torch.int64, (rows,)))
        narrow = dict.fromkeys(("positions", "segments", "count"), (torch.int32, (rows,)))
        self._inputs = StagingBuffer(device, {**integers, **narrow, "scores": (torch.float32, (rows,))})
        self._penalty = self._seen = None
        if repetition_penalty != 1:
            self._penalty = torch.full((rows,), repetition_penalty, device=device)
            seen = torch.zeros(len(prompts), self.vocab_size, dtype=torch.bool)
            for row, (ids, *_) in zip(seen, self._ids, strict=True):
                row[torch.from_numpy(ids)] = True
            self._seen = seen.repeat_interleave(self.num_beams, 0).to(device)

    def _runner_for(self, runner: ModelRunner) -> ModelRunner:
        """Return the runner of all steps: where "auto" compiles, the uncompiled one, if it may run that many."""
        first = runner.for_prompts(self.plan, sum(ids.shape[1] for ids in self._ids), {})
        longest = max(each.limit for each in self.beams)
        return first if first is runner or first.steps_left(self._shape) >= longest else runner

    @torch.no_grad()
    def run(self) -> None:
        """Search until all prompts are done. Raises NonFiniteLogitsError as soon as logits are NaN or infinite."""
        cache = self.model.new_cache(len(self.prompts), self._slots, kv_dtype=self._kv_dtype)
        self._choose(self._prefill(cache))
        cache = cache.expand(self.num_beams)
        self.plan = plan_of_beams(self.model, self.plan, len(self.prompts), self.num_beams)
        held, replays, recorded = cache.tokens, self.runner.replays(self.plan), RecordedSteps(self.runner)
        self._main.last = LastRun(self.plan, lambda: held, self._kv_dtype)
        while not all(each.done for each in self.beams):
            moved = self._fill()
            key = "beams", moved, None if self.runner.compile else cache.slots_in_use
            with cache.appending(1):
                result = recorded.run(
                    key, functools.partial(self._step, cache, moved), replays=replays, memory=cache.layers
                )
            if self.runner is not self._main:
                self.runner.steps[self._shape] += 1
            self._choose(result)

    def _prefill(self, cache: Cache) -> Tensor:
        """Append the prompts to a cache, a row each, and return the candidates for the first new token."""
        chunks = prefill(self.runner, self._ids, self.plan, cache, adapters=self._adapters)
        x = next(end for end in newest_outputs(self._ids, chunks) if end is not None)
        scores = torch.zeros(len(self.prompts), device=self.model.device)
        penalty, seen = (
            None if each is None else each[:: self.num_beams].clone() for each in (self._penalty, self._seen)
        )
        return self._best(x, scores, penalty, seen)

    def _fill(self) -> int:
        """Send the newest tokens of all beams; return how many slots after its prompt a row may take over."""
        host, length = self._inputs.fill(), 0
        for name, value in (("scores", -math.inf), ("ids", 0), ("positions", 0), ("segments", 0), ("count", 0)):
            host[name][:] = value
        host["parents"][:] = np.arange(len(host["parents"]))
        for n, (prompt, beams) in enumerate(zip(self.prompts, self.beams, strict=True)):
            rows = slice(n * self.num_beams, (n + 1) * self.num_beams)
            host["starts"][rows] = len(prompt.ids)
            if beams.done:
                continue
            length = len(beams.running[0].tokens)
            # A row without a hypothesis appends a token, too: it may get one later, which has as many.
            host["count"][rows] = 1
            host["positions"][rows] = (prompt.generated_position or 0) + length - 1
            host["segments"][rows] = prompt.generated_segment
            for row, hypothesis in enumerate(beams.running, start=rows.start):
                host["ids"][row], host["scores"][row] = hypothesis.tokens[-1], hypothesis.score
                host["parents"][row] = rows.start + hypothesis.beam
        self._inputs.send()
        return max(_LEAST_MOVED, 1 << (length - 1).bit_length())

    def _step(self, cache: Cache, moved: int) -> Tensor:
        """Let each row go on from its parent, compute its newest token, and return the next candidates."""
        given, kv = self._inputs.on_device, cache.layers[0]
        run = self.runner.run_for("move", kv.k.shape, kv.kv_dtype, moved)
        for kv in cache.layers:
            run("move", _move, kv, given["parents"], given["starts"], moved)
        ids, positions, segments = (given[name][:, None] for name in ("ids", "positions", "segments"))
        x, _ = self.runner.step(ids, given["count"], positions, segments, self.plan, cache, adapters=self._adapters)
        return self._best(x, given["scores"], self._penalty, self._seen, given["parents"], given["ids"])

    def _best(
        self,
        x: Tensor,
        scores: Tensor,
        penalty: Tensor | None,
        seen: Tensor | None,
        parents: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Return the candidates of each prompt from the last layer's output `[R, 1, E]`; see `_best_candidates`."""
        each = len(x) // len(self.prompts) * self.vocab_size
        state = _State(scores, penalty, seen, parents, ids)
        shape = len(self.prompts), min(self._candidates, each)
        run = self.runner.run_for("candidates", x.shape, *shape, seen is None, self._adapters is None)
        found: Tensor = run("candidates", _best_candidates, self.model, x, state, *shape, self._adapters)
        return found

    def _choose(self, result: Tensor) -> None:
        """Read the candidates and let each prompt choose among its own."""
        values = np.array(read_async(result)())
        going = [(n, beams) for n, beams in enumerate(self.beams) if not beams.done]
        if failed := [(n, len(beams.running[0].tokens) + 1) for n, beams in going if not values[n, -1]]:
            raise NonFiniteLogitsError(failed, self.model.dtype)
        for n, beams in going:
            beams.advance(values[n, :-1].reshape(3, -1), self.vocab_size)


class _State(NamedTuple):
    """The rows' state in a step, each `[R]` or None: scores, and what the repetition penalty takes."""

    scores: Tensor  # -inf: no hypothesis
    penalty: Tensor | None
    seen: Tensor | None  # [R, V]
    parents: Tensor | None
    ids: Tensor | None


def _move(kv: KV, parents: Tensor, starts: Tensor, count: int) -> KV:
    """Let each row take over what its parent holds in `count` slots from its start on. All rows of a prompt hold tokens
    of the same attributes in the same slots, so these need not move."""
    slots = starts[:, None] + torch.arange(count, device=starts.device)
    return kv.move(parents, slots.clamp(max=kv.k.shape[2] - 1))  # the last slot is one of padding


def _best_candidates(model: Llama, x: Tensor, s: _State, prompts: int, count: int, adapters: Tensor | None) -> Tensor:
    """Return the best continuations of each prompt, the best first, float64 `[P, 3 * count + 1]`: their scores, places
    in `[N * V]`, log-probabilities of the tokens, and whether the logits of all its hypotheses were finite."""
    logits = model.head(x, adapters)[:, 0].float()
    logprobs = logits.log_softmax(-1)
    changed, none = logprobs, s.scores == -torch.inf
    if s.penalty is not None and s.seen is not None:
        if s.parents is not None and s.ids is not None:
            new = torch.arange(logits.shape[-1], device=x.device) == s.ids[:, None]
            s.seen.copy_(s.seen[s.parents] | new)
        changed = adjust_logits(logprobs, SamplingTensors(repetition_penalty=s.penalty), s.seen)
    total = (changed + s.scores[:, None]).masked_fill(none[:, None], -torch.inf)
    scores, places = total.view(prompts, -1).topk(count)
    own = logprobs.view(prompts, -1).gather(1, places)
    finite = (all_finite(logits) | none).double().view(prompts, -1).amin(1, keepdim=True)
    return torch.cat((scores.double(), places.double(), own.double(), finite), 1)
