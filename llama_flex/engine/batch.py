"""Sequences in batch slots, which keep their sampling state from step to step; a step's rows pick slots.

The host describes a step by filling a few tensors; sampled tokens stay on the device for the next step, so the host
need not wait for them. Dimensions: R rows of a step, N batch slots, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.reductions import all_finite, logsumexp
from ..logits.parameters import SamplingTensors
from ..logits.processors import apply_masks
from ..masks.layout import SlotCache
from ..model import Llama
from ..sampling import adjust_logits, draw, logprob_of
from .fusion import combined
from .kinds import Kinds, compiled_for, union
from .model_runner import ModelRunner, RecordedSteps
from .processing import process
from .request import Request, TokenSequence
from .slot_tables import SlotTables
from .transfer import StagingBuffer, read_async

# The host's inputs for sampling the next token of each row of a step; _INTS as int64, _REALS as float32.
_INTS = ("batch_slot", "position", "segment", "done", "top_k", "seed", "leader", "members", "is_max", "min_new")
_FOLLOWING = slice(1, 4)  # those of _INTS that change from token to token
_REALS = (
    *("temperature", "tail", "min_p", "repetition_penalty", "typical_p"),
    *("presence_penalty", "frequency_penalty"),
)
# The outcome of a row: the model's own logits are not finite; all is well; no token was left to draw; a processor
# returned NaN or positive infinity.
_NON_FINITE, _FINE, _NOTHING_LEFT, _INVALID = range(4)


class Sampled(NamedTuple):
    """A request's new token, its log-probability, and the most likely ones with theirs, if asked for. finite: whether
    the model's own logits were. error: what a processor raised or returned, or that no token was left."""

    token: int
    logprob: float
    top_logprobs: list[tuple[int, float]] | None
    finite: bool
    error: Exception | None


class PendingOutput:
    """A step that is under way on the device, and the row of each request in it.

    On CUDA it is enqueued before the tokens of the step before are read, and finished after that.
    """

    def __init__(
        self,
        rows: list[tuple[Request, int]],
        finish: Callable[
            [list[tuple[Request, int]]], tuple[Callable[[], list[list[float]]], Mapping[Request, Exception]]
        ],
        width: int = 1,
    ) -> None:
        """finish: samples the tokens of rows, unless the step has; returns a function that reads them, and errors.
        width: how many tokens a row may have at most; with more than one, the last result says how many it has."""
        self.rows, self._finish, self._width = rows, finish, width

    def finish(self) -> None:
        """Enqueue what is left of the step. Its requests' tokens so far must have been read."""
        self._read, self._errors = self._finish(self.rows)

    def counts(self) -> dict[Request, int]:
        """Wait for the step, which was finished; return the number of tokens of each request."""
        if self._width == 1:
            return {request: 1 for request, _ in self.rows}
        return {request: int(self._read()[-1][row * self._width]) for request, row in self.rows}

    def spoiled(self) -> bool:
        """Wait for the step, which was finished; return whether logits after drafts were not finite, so that their keys
        and values may not be, either."""
        return self._width > 1 and _NON_FINITE in self._read()[2]

    def tokens(self) -> Iterator[tuple[Request, Sampled]]:
        """Wait for the step, which was finished; yield each request and what was sampled, until something is wrong."""
        tokens, logprobs, outcomes, *more = self._read()
        counts = self.counts()
        ids, values = more[: len(more) // 2], more[len(more) // 2 :]
        for request, row in self.rows:
            first, k = row * self._width, request.sampling.top_logprobs
            for at in range(first, first + counts[request]):
                top, error = None, self._errors.get(request)
                if k:
                    top = [(int(i[at]), v[at]) for i, v in zip(ids[:k], values[:k], strict=True)]
                if outcomes[at] > _FINE and error is None:
                    error = ValueError(_nothing_left(request) if outcomes[at] == _NOTHING_LEFT else _invalid(request))
                yield request, Sampled(int(tokens[at]), logprobs[at], top, outcomes[at] != _NON_FINITE, error)
                if outcomes[at] != _FINE:
                    break


def _nothing_left(request: Request) -> str:
    s = request.sampling
    by: dict[str, object] = {
        "its logits processors": s.processors,
        "grammar": s.grammar,
        "banned_tokens": s.banned_tokens,
    }
    by |= {"no_repeat_ngram_size": s.no_repeat_ngram_size, "min_new_tokens": s.min_new_tokens}
    names = " with ".join(name for name, value in by.items() if value)
    return f"no token is left to sample as new token {len(request.steps) + 1}: all are ruled out by {names}"


def _invalid(request: Request) -> str:
    return f"a logits processor returned NaN or positive infinity for new token {len(request.steps) + 1}"


@dataclass
class StepBuffers:
    """The memory that steps of one shape work on: inputs from the host, and newest tokens `[R, T]`; what they leave is
    made when it is first needed."""

    inputs: StagingBuffer
    ids: Tensor
    _results: dict[int, Tensor] = field(default_factory=dict)
    _logits: Tensor | None = None
    _masks: StagingBuffer | None = None

    def result(self, top: int) -> Tensor:
        """Return the results `[3 + 2 * top, R]`, float64: tokens, their log-probabilities, outcomes, then the most
        likely tokens and their log-probabilities; of T tokens a row `[3 + 2 * top + 1, R * T]`, see `PendingOutput`."""
        if top not in self._results:
            shape = 3 + 2 * top + (self.ids.shape[1] > 1), self.ids.numel()
            self._results[top] = torch.zeros(shape, dtype=torch.float64, device=self.ids.device)
        return self._results[top]

    def logits(self, vocab_size: int) -> Tensor:
        """Return the logits `[2, R, V]`, float32, that split steps hold: the model's own, and those adjusted."""
        if self._logits is None:
            self._logits = torch.zeros(2, len(self.ids), vocab_size, device=self.ids.device)
        return self._logits

    def masks(self, vocab_size: int) -> StagingBuffer:
        """Return the masks of grammars and n-grams, "bits", int32 `[R, V // 32 + 1]`; see `process`."""
        if self._masks is None:
            shape = len(self.ids), vocab_size // 32 + 1
            self._masks = StagingBuffer(self.ids.device, {"bits": (torch.int32, shape)})
        return self._masks


class Batch:
    """Sequences in batch slots, and their steps. The last batch slot is a dummy, for unused rows."""

    def __init__(self, runner: ModelRunner, batch_slots: int) -> None:
        """batch_slots: the most sequences at a time."""
        self.runner, self.model, self.batch_slots = runner, runner.model, batch_slots
        self.recorded, self._draws = RecordedSteps(runner), RecordedSteps(runner)
        self._ints = np.zeros((batch_slots + 1, len(_INTS)), np.int64)
        self._reals = np.ones((batch_slots + 1, len(_REALS)), np.float32)
        self._ints[:, _INTS.index("batch_slot")] = np.arange(batch_slots + 1)
        self._newest = torch.zeros(batch_slots + 1, dtype=torch.int64, device=self.model.device)
        self._tables = SlotTables()
        self._compiled_kinds: set[Kinds] = set()

    def assign_batch_slot(self, request: Request, sequence: TokenSequence) -> None:
        """Initialise the batch slot of a sequence."""
        s, slot = request.sampling, sequence.batch_slot
        row = {
            "batch_slot": slot,
            "position": sequence.tokens[1, -1],
            "segment": sequence.tokens[2, -1],
            "done": len(request.steps),
            "top_k": s.top_k,
            "seed": s.seed,
            "members": len(request.sequences),
            "is_max": request.ensemble.combine == "max",
            "min_new": s.min_new_tokens,
        }
        reals = s.divisor, 1 - s.top_p, s.min_p, s.repetition_penalty, s.typical_p
        self._ints[slot] = [row.get(name, 0) for name in _INTS]
        self._reals[slot] = *reals, s.presence_penalty, s.frequency_penalty
        self._newest[slot].fill_(int(sequence.tokens[0, -1]))  # assigning a number would wait for the device
        self._make_tables(request.kinds)
        self._tables.assign(request, slot)

    def _make_tables(self, kinds: Kinds) -> None:
        """Make the tables that some kinds of sampling need."""
        shape = self.batch_slots + 1, self.model.dims.vocab_size
        self._tables = self._tables.with_those_of(kinds, shape, self.model.device)

    def kinds_of(self, requests: Iterable[Request], split: bool | None = None) -> Kinds:
        """Return the kinds of sampling in a step of some requests. split: whether it is split, default: if any of the
        requests needs that."""
        kinds = union(request.kinds for request in requests)
        split = kinds.split if split is None else split
        top = min(kinds.top, self.model.dims.vocab_size)
        kinds = kinds._replace(top=top, split=split, masked=split and kinds.masked)
        return compiled_for(kinds, self._compiled_kinds) if self.runner.compile else kinds

    def _new_buffers(
        self, rows: int, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], width: int = 1
    ) -> StepBuffers:
        """Make the buffers of a step of R rows, with inputs of the given shapes and those of sampling. width: the most
        tokens that it samples in a row."""
        device = self.model.device
        sampled = {"ints": (torch.int64, (len(_INTS), rows)), "reals": (torch.float32, (len(_REALS), rows))}
        return StepBuffers(
            StagingBuffer(device, {**sampled, **shapes}),
            torch.zeros(rows, width, dtype=torch.int64, device=device),
        )

    def _fill_state(
        self, host: Mapping[str, np.ndarray], rows: Mapping[int, tuple[Request, TokenSequence]], ahead: int = 0
    ) -> None:
        """Copy each sequence's state into its row; unused rows point at the dummy slot. ahead: the number of drafts
        after the newest token."""
        count = host["ints"].shape[1]
        slots = [rows[row][1].batch_slot if row in rows else self.batch_slots for row in range(count)]
        host["ints"][:] = self._ints[slots].T
        host["reals"][:] = self._reals[slots].T
        host["ints"][_INTS.index("leader")] = np.arange(count)
        for name in ("position", "done"):
            host["ints"][_INTS.index(name)] += ahead

    def _fill_leaders(
        self, host: Mapping[str, np.ndarray], rows: Mapping[int, tuple[Request, TokenSequence]]
    ) -> list[tuple[Request, int]]:
        """Let the rows of each request sample together; return the requests, each with its first row."""
        leaders: dict[Request, int] = {}
        for row, (request, _) in rows.items():
            host["ints"][_INTS.index("leader"), row] = leaders.setdefault(request, row)
        return list(leaders.items())

    def _newest_tokens(self, buffers: StepBuffers) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ids, positions and segments that a decode step computes, each `[R, 1]`."""
        ints = buffers.inputs.on_device["ints"]
        torch.index_select(self._newest, 0, ints[_INTS.index("batch_slot")], out=buffers.ids[:, 0])
        return buffers.ids, ints[_INTS.index("position")][:, None], ints[_INTS.index("segment")][:, None]

    def _sample(self, x: Tensor, buffers: StepBuffers, kinds: Kinds, adapters: Tensor | None = None) -> None:
        """Sample the next token of each row from the last layer's output `[R, 1, E]`, or packed if "last" is given; if
        the step is split, compute the logits only. adapters: see `Llama.step`."""
        state, result = self._state(buffers, kinds), buffers.result(kinds.top)
        run = self.runner.run_for("sample", x.shape, len(buffers.ids), self.batch_slots, kinds, adapters is not None)
        if kinds.split:
            logits = buffers.logits(self.model.dims.vocab_size)
            run("adjust_next", _adjust_next, self.model, x, state, logits, result, kinds, adapters)
        else:
            run("sample_next", _sample_next, self.model, x, state, result, kinds, adapters)

    def _new_draft_buffers(
        self, rows: int, width: int, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] | None = None
    ) -> StepBuffers:
        """Make the buffers of a step that verifies drafts in R rows of `width` tokens; see `_fill_drafts`."""
        own = {"tokens": (torch.int64, (3, rows, width)), "count": (torch.int32, (rows,))}
        return self._new_buffers(rows, own | dict(shapes or {}), width)

    def _fill_drafts(
        self,
        host: Mapping[str, np.ndarray],
        rows: Mapping[int, tuple[Request, TokenSequence]],
        drafts: Mapping[Request, Sequence[int]],
    ) -> None:
        """Fill "tokens" `[3, R, T]` and "count" `[R]` with each row's newest token and the drafts after it."""
        host["count"].fill(0)
        host["tokens"].fill(0)  # a mask may index a table by padding
        for row, (request, sequence) in rows.items():
            newest = request.new_tokens[-1] if request.steps else sequence.tokens[0, -1]
            ids, state = [newest, *drafts[request]], self._ints[sequence.batch_slot]
            first, segment = state[_FOLLOWING][:2]
            host["tokens"][:, row, : len(ids)] = ids, first + np.arange(len(ids)), [segment] * len(ids)
            host["count"][row] = len(ids)

    def _verify(
        self, x: Tensor, buffers: StepBuffers, kinds: Kinds, cache: SlotCache, adapters: Tensor | None = None
    ) -> None:
        """Sample after every token of the rows, from the last layer's output `[R, T, E]`; keep what follows accepted
        drafts, and drop the others from the cache."""
        state, result = self._state(buffers, kinds), buffers.result(kinds.top)
        given = buffers.inputs.on_device
        run = self.runner.run_for("verify", x.shape, self.batch_slots, type(cache), kinds, adapters is not None)
        drafts = given["tokens"][0, :, 1:], given["count"]
        run("verify_next", _verify_next, self.model, x, state, *drafts, cache, result, kinds, adapters)

    def _verified(self, buffers: StepBuffers, rows: list[tuple[Request, int]], kinds: Kinds) -> PendingOutput:
        """Wait for a step that verified drafts, count the tokens that it has sampled, and return them."""
        values = read_async(buffers.result(kinds.top))()
        output = PendingOutput(rows, lambda _: (lambda: values, {}), buffers.ids.shape[1])
        output.finish()
        self._count(rows, list(output.counts().values()))
        return output

    def _state(self, buffers: StepBuffers, kinds: Kinds) -> _State:
        given = buffers.inputs.on_device
        ints = dict(zip(_INTS, given["ints"].unbind(0), strict=True))
        reals = dict(zip(_REALS, given["reals"].unbind(0), strict=True))
        tables = self._tables.only(kinds)
        return _State(**ints, **reals, last=given.get("last"), newest=self._newest, tables=tables)

    def _draw(
        self, buffers: StepBuffers, kinds: Kinds, rows: list[tuple[Request, int]], *, replays: bool
    ) -> Mapping[Request, Exception]:
        """Finish a step that is split: let the host process the logits, then draw; return the errors."""
        vocab_size = self.model.dims.vocab_size
        logits, result = buffers.logits(vocab_size), buffers.result(kinds.top)
        masks = buffers.masks(vocab_size) if kinds.masked else None
        errors = process(logits[1], rows, None if masks is None else masks.fill()["bits"])
        if masks is not None:
            masks.send()

        def step() -> None:
            run = self.runner.run_for("draw", len(buffers.ids), self.batch_slots, kinds)
            bits = None if masks is None else masks.on_device["bits"]
            run("draw_next", _draw_next, self._state(buffers, kinds), logits, result, kinds, bits)

        self._draws.run((id(buffers), kinds), step, replays=replays)
        return errors

    def _pending(
        self, buffers: StepBuffers, rows: list[tuple[Request, int]], kinds: Kinds, *, replays: bool
    ) -> PendingOutput:
        """Return a step that was enqueued, to be finished. replays: see `ModelRunner.replays`."""
        return PendingOutput(rows, lambda rows: self._finish(buffers, rows, kinds, replays=replays))

    def _finish(
        self, buffers: StepBuffers, rows: list[tuple[Request, int]], kinds: Kinds, *, replays: bool
    ) -> tuple[Callable[[], list[list[float]]], Mapping[Request, Exception]]:
        """Draw the tokens if the step is split, and count them; return what `PendingOutput` takes."""
        errors = self._draw(buffers, kinds, rows, replays=replays) if kinds.split else {}
        self._count(rows, [1] * len(rows))
        return read_async(buffers.result(kinds.top)), errors

    def _count(self, rows: list[tuple[Request, int]], counts: Sequence[int]) -> None:
        """Count the tokens that a step samples for each request."""
        following = []
        for (request, _), count in zip(rows, counts, strict=True):
            if not count:
                continue
            request.num_scheduled = done = request.num_scheduled + count
            for sequence in request.sequences:
                prompt = sequence.prompt
                position = (prompt.generated_position or 0) + done - 1
                following.append((sequence.batch_slot, position, prompt.generated_segment, done))
        slots, *columns = np.array(following, np.int64).reshape(-1, 4).T  # there may be none
        self._ints[slots, _FOLLOWING] = np.array(columns).T


class _State(NamedTuple):
    """The tensors that sampling reads and updates: `[R]`, in the order of _INTS and _REALS, unless noted."""

    batch_slot: Tensor
    position: Tensor
    segment: Tensor
    done: Tensor
    top_k: Tensor
    seed: Tensor
    leader: Tensor
    members: Tensor
    is_max: Tensor
    min_new: Tensor
    temperature: Tensor
    tail: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    typical_p: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    last: Tensor | None  # where each row's last token is among the packed ones; None if not packed
    newest: Tensor  # [N + 1]
    tables: SlotTables


def _sample_next(
    model: Llama, x: Tensor, s: _State, result: Tensor, kinds: Kinds, adapters: Tensor | None = None
) -> None:
    """Sample the next token of each row, and update the newest tokens and the tables."""
    logits, finite = _next_logits(model, x, s, kinds, adapters)
    parameters, seen = _parameters(s, kinds)
    adjusted = adjust_logits(logits, parameters, seen)
    outcome = _outcome(finite, adjusted) if kinds.bias or kinds.stops else finite.double()
    _write(s, logits, draw(adjusted, parameters, s.done), outcome, result, kinds)


def _adjust_next(
    model: Llama,
    x: Tensor,
    s: _State,
    buffer: Tensor,
    result: Tensor,
    kinds: Kinds,
    adapters: Tensor | None = None,
) -> None:
    """Write the next logits of each row, the model's own and those adjusted, and whether its own are finite."""
    logits, finite = _next_logits(model, x, s, kinds, adapters)
    buffer[0] = logits
    buffer[1] = adjust_logits(logits, *_parameters(s, kinds))
    result[2] = finite.double()


def _draw_next(s: _State, buffer: Tensor, result: Tensor, kinds: Kinds, bits: Tensor | None) -> None:
    """Draw the next token of each row from logits that were processed, and update the newest tokens and the tables.
    bits: see `apply_masks`."""
    logits, processed = buffer.unbind(0)
    if bits is not None:
        processed = apply_masks(processed, bits)
    outcome = _outcome(result[2] == _FINE, processed)
    processed = torch.where((outcome == _FINE)[:, None], processed, logits)
    _write(s, logits, draw(processed, _parameters(s, kinds)[0], s.done), outcome, result, kinds)


def _verify_next(
    model: Llama,
    x: Tensor,
    s: _State,
    drafts: Tensor,
    count: Tensor,
    cache: SlotCache,
    result: Tensor,
    kinds: Kinds,
    adapters: Tensor | None = None,
) -> None:
    """Sample after each row's newest token and its drafts `[R, T - 1]`, `count` `[R]` tokens in all, as steps of one
    token would; keep the tokens up to the first that is not the draft there, update the newest tokens and the tables,
    and drop the other drafts from the cache."""
    r, t = x.shape[:2]
    column = torch.arange(t, device=x.device)
    rows = {name: f for name, f in s._asdict().items() if name not in ("last", "newest", "tables")}
    each = s._replace(**{name: f.repeat_interleave(t) for name, f in rows.items()})
    each = each._replace(done=(s.done[:, None] + column).flatten(), leader=(s.leader[:, None] * t + column).flatten())
    numbers = None if adapters is None else adapters.expand(r, t).reshape(-1, 1)
    logits, finite = _next_logits(model, x.reshape(r * t, 1, -1), each, kinds, numbers)
    parameters, seen = _parameters(each, kinds)
    if seen is not None or parameters.counts is not None:
        # Each draft is followed by itself and those after it.
        fed = torch.where((column[:, None] > column[: t - 1]), 1, 0).expand(r, t, t - 1)
        times = torch.zeros(r, t, logits.shape[-1], dtype=torch.int32, device=x.device)
        times = times.scatter_add(2, drafts[:, None].expand(r, t, t - 1), fed.to(torch.int32)).flatten(0, 1)
        seen = None if seen is None else seen | (times > 0)
        if parameters.counts is not None:
            parameters = parameters._replace(counts=parameters.counts + times)
    adjusted = adjust_logits(logits, parameters, seen)
    outcome = _outcome(finite, adjusted) if kinds.bias or kinds.stops else finite.double()
    token = draw(adjusted, parameters, each.done)
    logprob = logprob_of(logits, token)
    token = (token[each.leader] if kinds.several else token).view(r, t)
    agreed = (token[:, :-1] == drafts) & (column[: t - 1] < count[:, None] - 1)
    new = (agreed.int().cumprod(1).sum(1, dtype=torch.int32) + 1).minimum(count)
    # Values of a draft that are not finite spoil the tokens before it, too: 0 * NaN is NaN. Another step will tell.
    spoiled = ((finite.view(r, t) < 1) & (column < new[:, None])).any(1) & (count > 1)
    new = new.masked_fill(spoiled[s.leader], 0)
    kept = column < new[:, None]
    last = token.gather(1, (new - 1).clamp(min=0)[:, None].long())
    last = torch.where(new[:, None] == 0, s.newest[s.batch_slot][:, None], last)
    slots = s.batch_slot[:, None].expand(r, t)
    if s.tables.seen is not None:
        s.tables.seen[slots, torch.where(kept, token, last)] = torch.ones_like(kept)
    if s.tables.counts is not None:
        s.tables.counts.index_put_((slots, token), kept.to(s.tables.counts.dtype), accumulate=True)
    s.newest[s.batch_slot] = last[:, 0]
    cache.drop(count - new)
    results = torch.stack((token.flatten().double(), logprob.double(), outcome))
    if kinds.top:
        results = torch.cat((results, _top_logprobs(logits, kinds.top)))
    result.copy_(torch.cat((results, new.repeat_interleave(t).double()[None])))


def _next_logits(model: Llama, x: Tensor, s: _State, kinds: Kinds, adapters: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the next logits `[R, V]`, combined in a request's first row, and whether the model's own are finite."""
    x = x if s.last is None else x[0, s.last, None]
    logits = model.head(x, adapters)[:, 0].float()
    finite = all_finite(logits)
    if kinds.several:
        finite = torch.ones_like(finite, dtype=torch.float64).scatter_reduce(0, s.leader, finite.double(), "amin") > 0
        logits = combined(logits, s.leader, s.is_max > 0, s.members)
    return logits, finite


def _parameters(s: _State, kinds: Kinds) -> tuple[SamplingTensors, Tensor | None]:
    """Return the parameters of each row, and the tokens seen in it if there is a repetition penalty."""
    tables = SlotTables(*(None if table is None else table[s.batch_slot] for table in s.tables))
    counted = tables.counts is not None
    parameters = SamplingTensors(
        temperature=s.temperature if kinds.random else None,
        top_k=s.top_k if kinds.cut else None,
        tail=s.tail if kinds.cut else None,
        min_p=s.min_p if kinds.min_p else None,
        repetition_penalty=None if tables.seen is None else s.repetition_penalty,
        seed=s.seed if kinds.random else None,
        typical_p=s.typical_p if kinds.typical_p else None,
        presence_penalty=s.presence_penalty if counted else None,
        frequency_penalty=s.frequency_penalty if counted else None,
        counts=tables.counts,
        bias=tables.bias,
        forbidden=None if tables.stops is None else tables.stops & (s.done < s.min_new)[:, None],
    )
    return parameters, tables.seen


def _outcome(finite: Tensor, adjusted: Tensor) -> Tensor:
    """Return the outcome of each row `[R]`, float64, from logits `[R, V]` that may be ruled out, or be a user's."""
    most = adjusted.amax(-1)  # NaN if any is
    wrong = torch.where(most == -torch.inf, float(_NOTHING_LEFT), float(_INVALID))
    return torch.where(finite, torch.where(most.isfinite(), float(_FINE), wrong), float(_NON_FINITE)).double()


def _write(s: _State, logits: Tensor, token: Tensor, outcome: Tensor, result: Tensor, kinds: Kinds) -> None:
    """Write the results of a step, and update the newest tokens and the tables."""
    logprob = logprob_of(logits, token)
    if kinds.several:
        token = token[s.leader]
    if s.tables.seen is not None:
        s.tables.seen[s.batch_slot, token] = torch.ones_like(
            token, dtype=torch.bool
        )  # a number would come from the host
    if s.tables.counts is not None:
        s.tables.counts[s.batch_slot, token] = s.tables.counts[s.batch_slot, token] + 1
    s.newest[s.batch_slot] = token
    rows = torch.stack((token.double(), logprob.double(), outcome))
    if kinds.top:
        rows = torch.cat((rows, _top_logprobs(logits, kinds.top)))
    result.copy_(rows)


def _top_logprobs(logits: Tensor, count: int) -> Tensor:
    """Return the most likely tokens of each row and their log-probabilities, float64 `[2 * count, R]`."""
    values, ids = logits.topk(count)
    return torch.cat((ids.T.double(), (values - logsumexp(logits)[:, None]).T.double()))
