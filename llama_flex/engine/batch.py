"""Sequences in batch slots, which keep their sampling state from step to step; a step's rows pick slots.

The host describes a step by filling a few tensors; sampled tokens stay on the device for the next step, so the host
need not wait for them. Dimensions: R rows of a step, N batch slots, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.reductions import all_finite
from ..model import Llama
from ..sampling import SamplingTensors, sample
from .fusion import combined
from .model_runner import ModelRunner, RecordedSteps
from .request import Request, TokenSequence
from .transfer import StagingBuffer, read_async, to_device_async

# The host's inputs for sampling the next token of each row of a step; _INTS as int64, _REALS as float32.
_INTS = ("batch_slot", "position", "segment", "done", "top_k", "seed", "leader", "members", "is_max")
_FOLLOWING = slice(1, 4)  # those of _INTS that change from token to token
_REALS = ("temperature", "tail", "min_p", "repetition_penalty")
Kinds = tuple[bool, ...]  # of sampling in a step; see `kinds_of`


class PendingOutput(NamedTuple):
    """The sampled tokens of a step, which may not be computed yet, and the row of each request."""

    read: Callable[[], list[list[float]]]
    rows: list[tuple[Request, int]]

    def tokens(self) -> Iterator[tuple[Request, int, float, bool]]:
        """Wait for the step; yield each request, its new token and log-probability, and whether its logits were
        finite."""
        tokens, logprobs, finite = self.read()
        for request, row in self.rows:
            yield request, int(tokens[row]), logprobs[row], bool(finite[row])


class StepBuffers(NamedTuple):
    """The memory that steps of one shape work on: inputs from the host, newest tokens `[R, 1]`, and results."""

    inputs: StagingBuffer
    ids: Tensor
    result: Tensor  # [3, R], float64: tokens, their log-probabilities, and whether all logits were finite


class Batch:
    """Sequences in batch slots, and their steps. The last batch slot is a dummy, for unused rows."""

    def __init__(self, runner: ModelRunner, batch_slots: int) -> None:
        """batch_slots: the most sequences at a time."""
        self.runner, self.model, self.batch_slots = runner, runner.model, batch_slots
        self.recorded = RecordedSteps(runner)
        self._ints = np.zeros((batch_slots + 1, len(_INTS)), np.int64)
        self._reals = np.ones((batch_slots + 1, len(_REALS)), np.float32)
        self._ints[:, _INTS.index("batch_slot")] = np.arange(batch_slots + 1)
        self._newest = torch.zeros(batch_slots + 1, dtype=torch.int64, device=self.model.device)
        self._seen: Tensor | None = None  # [N + 1, V], once a request has a repetition penalty

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
        }
        self._ints[slot] = [row.get(name, 0) for name in _INTS]
        self._reals[slot] = s.divisor, 1 - s.top_p, s.min_p, s.repetition_penalty
        self._newest[slot].fill_(int(sequence.tokens[0, -1]))  # assigning a number would wait for the device
        if s.repetition_penalty != 1:
            if self._seen is None:
                shape = self.batch_slots + 1, self.model.dims.vocab_size
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self.model.device)
            ids = np.concatenate([request.cached_ids, *(other.tokens[0] for other in request.sequences)])
            known = to_device_async(torch.from_numpy(ids.astype(np.int64)), self.model.device)
            self._seen[slot].fill_(False).index_fill_(0, known, True)

    def _new_buffers(self, rows: int, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> StepBuffers:
        """Make the buffers of a step of R rows, with inputs of the given shapes and those of sampling."""
        device = self.model.device
        sampled = {"ints": (torch.int64, (len(_INTS), rows)), "reals": (torch.float32, (len(_REALS), rows))}
        return StepBuffers(
            StagingBuffer(device, {**sampled, **shapes}),
            torch.zeros(rows, 1, dtype=torch.int64, device=device),
            torch.zeros(3, rows, dtype=torch.float64, device=device),
        )

    def _fill_state(self, host: Mapping[str, np.ndarray], rows: Mapping[int, tuple[Request, TokenSequence]]) -> None:
        """Copy each sequence's state into its row; unused rows point at the dummy slot."""
        count = host["ints"].shape[1]
        slots = [rows[row][1].batch_slot if row in rows else self.batch_slots for row in range(count)]
        host["ints"][:] = self._ints[slots].T
        host["reals"][:] = self._reals[slots].T
        host["ints"][_INTS.index("leader")] = np.arange(count)

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
        """Sample the next token of each row from the last layer's output `[R, 1, E]`, or packed if "last" is given.
        adapters: see `Llama.step`."""
        given = buffers.inputs.on_device
        ints = dict(zip(_INTS, given["ints"].unbind(0), strict=True))
        reals = dict(zip(_REALS, given["reals"].unbind(0), strict=True))
        state = _State(**ints, **reals, last=given.get("last"), newest=self._newest, seen=self._seen)
        run = self.runner.run_for("sample", x.shape, len(buffers.ids), self.batch_slots, kinds, adapters is not None)
        run("sample_next", _sample_next, self.model, x, state, buffers.result, kinds, adapters)

    def _sampled(self, buffers: StepBuffers, rows: list[tuple[Request, int]]) -> PendingOutput:
        """Count the tokens that a step has sampled, and return them."""
        following = []
        for request, _ in rows:
            request.num_scheduled = done = request.num_scheduled + 1
            for sequence in request.sequences:
                prompt = sequence.prompt
                position = (prompt.generated_position or 0) + done - 1
                following.append((sequence.batch_slot, position, prompt.generated_segment, done))
        slots, *columns = np.array(following).T
        self._ints[slots, _FOLLOWING] = np.array(columns).T
        return PendingOutput(read_async(buffers.result), rows)


def kinds_of(requests: Iterable[Request]) -> Kinds:
    """Return whether any request needs: temperature, top_k or top_p, min_p, repetition_penalty, several rows."""
    each = [
        (
            s.temperature > 0,
            s.temperature > 0 and (s.top_k > 0 or s.top_p < 1),
            s.temperature > 0 and s.min_p > 0,
            s.repetition_penalty != 1,
            len(r.sequences) > 1,
        )
        for r in requests
        for s in [r.sampling]
    ]
    return tuple(map(any, zip(*each, strict=True)))


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
    temperature: Tensor
    tail: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    last: Tensor | None  # where each row's last token is among the packed ones; None if not packed
    newest: Tensor  # [N + 1]
    seen: Tensor | None  # [N + 1, V]


def _sample_next(
    model: Llama, x: Tensor, s: _State, result: Tensor, kinds: Kinds, adapters: Tensor | None = None
) -> None:
    """Sample the next token of each row, and update the newest tokens and those seen."""
    random, cut, least, penalty, several = kinds
    parameters = SamplingTensors(
        s.temperature if random else None,
        s.top_k if cut else None,
        s.tail if cut else None,
        s.min_p if least else None,
        s.repetition_penalty if penalty else None,
        s.seed if random else None,
    )
    x = x if s.last is None else x[0, s.last, None]
    logits = model.head(x, adapters)[:, 0].float()
    finite = all_finite(logits).double()
    if several:
        finite = torch.ones_like(finite).scatter_reduce(0, s.leader, finite, "amin")
        logits = combined(logits, s.leader, s.is_max > 0, s.members)
    seen = s.seen[s.batch_slot] if penalty and s.seen is not None else None
    token, logprob = sample(logits, parameters, s.done, seen)
    if several:
        token = token[s.leader]
    if seen is not None and s.seen is not None:
        s.seen[s.batch_slot, token] = torch.ones_like(token, dtype=torch.bool)  # a number would come from the host
    s.newest[s.batch_slot] = token
    result.copy_(torch.stack((token.double(), logprob.double(), finite)))
