"""Run the steps of many requests in a few sizes, each always in the same memory, so that they can be replayed.

The host describes a step by filling a few tensors; sampled tokens stay on the device for the next step, so the host
need not wait for them. Dimensions: R rows of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..masks.plan import AttentionPlan
from ..model import Llama
from ..sampling import SamplingTensors, all_finite, sample
from .fusion import combined
from .paged_cache import PagedCache, PagedCacheView
from .request import Request, TokenSequence
from .request_masks import MaskRegistry, RowSpec
from .step_runner import LastRun, StepRunner
from .transfer import StagingBuffer, read_async, to_device_async

WIDTH = 64  # the most prompt tokens in a row of a step
_ROW_MEAN = 32  # a step of N tokens has N // 32 rows: room for short prompts, whose rows are half empty
# The host's inputs for sampling the next token of each row of a step; _INTS as int64, _REALS as float32.
_INTS = ("batch_slot", "id", "position", "segment", "done", "top_k", "seed", "leader", "members", "is_max")
_REALS = ("temperature", "tail", "min_p", "repetition_penalty")


class PendingOutput(NamedTuple):
    """The sampled tokens of a step, which may not be computed yet, and the row of each request."""

    read: Callable[[], list[list[float]]]
    rows: list[tuple[Request, int]]


class PrefillChunk(NamedTuple):
    """The prompt tokens that one row of a step computes: `length` of them, from `start` on."""

    request: Request
    sequence: TokenSequence
    start: int
    length: int


class ModelRunner:
    """The runner of steps over sequences with batch slots, which keep their sampling state from step to step."""

    def __init__(self, step_runner: StepRunner, cache: PagedCache, batch_slots: int, tokens: int, blocks: int) -> None:
        """batch_slots: the most sequences at a time. tokens: the most prompt tokens in a step, a multiple of WIDTH.
        blocks: the most blocks of slots of a sequence."""
        self.step_runner, self.model, self.cache = step_runner, step_runner.model, cache
        self.batch_slots, self.blocks = batch_slots, blocks
        # Compiled for each size that occurs. Up to 64 rows take no longer: products are bound by reading weights.
        sizes = 1, 8, *(64 << i for i in range(batch_slots.bit_length()))
        self.decode_sizes = sorted({min(size, batch_slots) for size in sizes})
        self.prefill_sizes = sorted({min(WIDTH << i, tokens) for i in range(tokens.bit_length())})
        self.max_chunks = tokens // _ROW_MEAN
        self.masks = MaskRegistry(self.model, max(batch_slots, self.max_chunks))
        device = self.model.device
        # The last batch slot is a dummy, for unused rows.
        self._ints = np.zeros((batch_slots + 1, len(_INTS)), np.int64)
        self._reals = np.ones((batch_slots + 1, len(_REALS)), np.float32)
        self._ints[:, _INTS.index("batch_slot")] = np.arange(batch_slots + 1)
        self._newest = torch.zeros(batch_slots + 1, dtype=torch.int64, device=device)
        self._seen: Tensor | None = None  # [batch_slots + 1, V], once a request has a repetition penalty
        self._results = {
            width: torch.zeros(3, rows, dtype=torch.float64, device=device)
            for width, rows in ((WIDTH, self.max_chunks), (1, batch_slots))
        }
        self._buffers: dict[tuple[int, int], StagingBuffer] = {}
        self._steps: dict[tuple[Any, ...], Callable[[], object]] = {}
        self._recorded: set[tuple[Any, ...]] = set()
        self._generation = self.masks.generation

    def forget_recorded(self, keep: Iterable[AttentionPlan] = ()) -> None:
        """Drop recorded steps, except those of the plans to keep, once parameters or masks have been replaced."""
        kept = set(keep)
        self._steps = {key: step for key, step in self._steps.items() if key[-1] in kept}
        self._recorded &= self._steps.keys()

    def assign_batch_slot(self, request: Request, sequence: TokenSequence, done: int) -> None:
        """Initialise the batch slot of a sequence that has `done` new tokens already."""
        s = request.sampling
        slot, (id, position, segment) = sequence.batch_slot, sequence.tokens[:, -1].tolist()
        row = {
            "batch_slot": slot,
            "id": id,
            "position": position,
            "segment": segment,
            "done": done,
            "top_k": s.top_k,
            "seed": s.seed,
            "members": len(request.sequences),
            "is_max": request.ensemble.combine == "max",
        }
        self._ints[slot] = [row.get(name, 0) for name in _INTS]
        self._reals[slot] = s.divisor, 1 - s.top_p, s.min_p, s.repetition_penalty
        if s.repetition_penalty != 1:
            if self._seen is None:
                shape = self.batch_slots + 1, self.model.dims.vocab_size
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self.model.device)
            ids = torch.from_numpy(np.concatenate([other.tokens[0] for other in request.sequences]))
            self._seen[slot] = False
            self._seen[slot, to_device_async(ids, self.model.device)] = True

    def prefill(self, chunks: Sequence[PrefillChunk], running: Iterable[Request]) -> list[PendingOutput]:
        """Enqueue prefill chunks, and the next token of each prompt that ends in one, sampled with the filters of all
        running requests, so that few graphs are compiled."""
        count = sum(chunk.length for chunk in chunks)
        size = next(s for s in self.prefill_sizes if s >= count and s // _ROW_MEAN >= len(chunks))
        buffer, host = self._fill(size, WIDTH)
        # Spread the chunks: a CPU's threads get adjacent rows, and all of them should have work.
        at = {n * (size // _ROW_MEAN) // len(chunks): chunk for n, chunk in enumerate(chunks)}
        for row, (_, sequence, start, length) in at.items():
            host["rows"][:, row] = start, sequence.num_computed_tokens, length
            host["tokens"][:, row, :length] = sequence.tokens[:, start : start + length]
        lengths = host["rows"][2]
        padding = np.arange(WIDTH) >= lengths[:, None]
        host["token_indices"][:] = np.argsort(padding.ravel(), kind="stable")[:size]
        host["last"][:] = np.maximum(lengths.cumsum() - 1, 0)
        ends = {row: c for row, c in at.items() if c.start + c.length == c.sequence.tokens.shape[1]}
        self._copy_state(host, {row: c.sequence for row, c in ends.items()})
        rows = {row: (c.request, c.sequence) for row, c in at.items()}
        scheduled = [(c.request, row) for row, c in ends.items()]
        self._run(size, WIDTH, buffer, host, rows, scheduled, _kinds(running) if scheduled else ())
        return [PendingOutput(read_async(self._results[WIDTH]), scheduled)] if scheduled else []

    def decode(self, requests: Sequence[Request]) -> PendingOutput:
        """Enqueue a decode step: one token for each request."""
        rows = dict(enumerate((request, sequence) for request in requests for sequence in request.sequences))
        size = next(s for s in self.decode_sizes if s >= len(rows))
        buffer, host = self._fill(size, 1)
        self._copy_state(host, {row: sequence for row, (_, sequence) in rows.items()})
        leaders: dict[int, int] = {}
        for row, (request, sequence) in rows.items():
            computed = sequence.num_computed_tokens
            host["rows"][:, row] = computed, computed + 1, 1
            sequence.num_computed_tokens += 1
            host["ints"][_INTS.index("leader"), row] = leaders.setdefault(request.number, row)
        scheduled = [(request, leaders[request.number]) for request in requests]
        self._run(size, 1, buffer, host, rows, scheduled, _kinds(requests))
        return PendingOutput(read_async(self._results[1]), scheduled)

    def _copy_state(self, host: dict[str, np.ndarray], sequences: Mapping[int, TokenSequence]) -> None:
        """Copy each sequence's state into its row; unused rows point at the dummy slot."""
        rows = host["ints"].shape[1]
        slots = [sequences[row].batch_slot if row in sequences else self.batch_slots for row in range(rows)]
        host["ints"][:] = self._ints[slots].T
        host["reals"][:] = self._reals[slots].T
        host["ints"][_INTS.index("leader")] = np.arange(rows)

    def _fill(self, size: int, width: int) -> tuple[StagingBuffer, dict[str, np.ndarray]]:
        """Return the buffer of a step of `size` tokens in rows of `width`, and its host arrays, filled with padding."""
        if (size, width) not in self._buffers:
            rows = size if width == 1 else size // _ROW_MEAN
            shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
                "page_table": (torch.int32, (rows, self.blocks)),
                "rows": (torch.int32, (3, rows)),
                "ints": (torch.int64, (len(_INTS), rows)),
                "reals": (torch.float32, (len(_REALS), rows)),
            }
            if width > 1:
                shapes |= {"tokens": (torch.int64, (3, rows, width)), "token_indices": (torch.int64, (size,))}
                shapes |= {"last": (torch.int64, (rows,))}
            self._buffers[size, width] = StagingBuffer(self.model.device, shapes)
        buffer = self._buffers[size, width]
        host = buffer.fill()
        host["page_table"].fill(self.cache.block_manager.num_pages)
        host["rows"].fill(0)
        if width > 1:
            host["tokens"].fill(0)  # a mask may index a table by padding; stale values may be out of its range
        return buffer, host

    def _run(
        self,
        size: int,
        width: int,
        buffer: StagingBuffer,
        host: dict[str, np.ndarray],
        rows: Mapping[int, tuple[Request, TokenSequence]],
        scheduled: list[tuple[Request, int]],
        kinds: tuple[bool, ...],
    ) -> None:
        """Enqueue a step. scheduled: the requests that get a token, and the row of each."""
        for row, (_, sequence) in rows.items():
            host["page_table"][row, : len(sequence.pages)] = sequence.pages
        plan = self.masks.plan(
            {n: RowSpec(r.spec_number, r.sequences.index(s), s.prompt.log_weights) for n, (r, s) in rows.items()}
        )
        if self._generation != self.masks.generation:
            self._generation = self.masks.generation
            self.forget_recorded(keep=[spec.plan for spec in self.masks.specs])
        buffer.send()
        start, end, count = buffer.on_device["rows"].unbind(0)
        page_table = buffer.on_device["page_table"]
        if not self.step_runner.compile:  # eager shapes may vary: drop columns that no row uses
            page_table = page_table[:, : max(len(sequence.pages) for _, sequence in rows.values())]
        cache = PagedCacheView(self.cache, page_table, start, end, buffer.on_device.get("token_indices"))
        self.step_runner.last = LastRun(plan, lambda: cache.tokens)
        key = size, width, kinds, plan  # forget_recorded reads the plan as the last
        if key not in self._steps:
            step = self._step(width, buffer.on_device, plan, cache, count, kinds)
            step()
            if self.step_runner.compile:
                self._steps[key] = step
        elif key not in self._recorded:
            _, self._steps[key] = self.step_runner.graphs.record(self._steps[key], self.model.device)
            self._recorded.add(key)
        else:
            self._steps[key]()
        for request, _ in scheduled:
            request.num_scheduled += 1
            for sequence in request.sequences:
                after = sequence.prompt.generated_position or 0
                values = {
                    "id": -1,
                    "position": after + request.num_scheduled - 1,
                    "segment": sequence.prompt.generated_segment,
                    "done": request.num_scheduled,
                }
                self._ints[sequence.batch_slot, [_INTS.index(n) for n in values]] = list(values.values())

    def _step(
        self,
        width: int,
        given: dict[str, Tensor],
        plan: AttentionPlan,
        cache: PagedCacheView,
        count: Tensor,
        kinds: tuple[bool, ...],
    ) -> Callable[[], None]:
        """Return a function that computes a step from the tensors given, always in the same memory."""
        rows = len(count)
        ints = dict(zip(_INTS, given["ints"].unbind(0), strict=True))
        reals = dict(zip(_REALS, given["reals"].unbind(0), strict=True))
        result = self._results[width][:, :rows]
        state = _State(**ints, **reals, last=given.get("last"), newest=self._newest, seen=self._seen, result=result)
        run = self.step_runner.run_for("paged", rows, width, self.batch_slots, kinds)

        def step() -> None:
            if width == 1:
                ids, positions, segments = run("feed", _feed, state)
            else:
                ids, positions, segments = given["tokens"].unbind(0)
            x, _ = self.step_runner.step(ids, count, positions, segments, plan, cache)
            if kinds:
                run("sample_next", _sample_next, self.model, x, state, kinds)

        return step


def _kinds(requests: Iterable[Request]) -> tuple[bool, ...]:
    """Return whether any request needs: temperature, top_k or top_p, min_p, repetition_penalty, several rows."""
    each = [
        (
            r.sampling.temperature > 0,
            r.sampling.top_k > 0 or r.sampling.top_p < 1,
            r.sampling.min_p > 0,
            r.sampling.repetition_penalty != 1,
            len(r.sequences) > 1,
        )
        for r in requests
    ]
    return tuple(map(any, zip(*each, strict=True)))


class _State(NamedTuple):
    """The tensors that sampling reads and updates: `[R]`, in the order of _INTS and _REALS, unless noted."""

    batch_slot: Tensor
    id: Tensor  # -1: the token sampled in the step before
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
    newest: Tensor  # [batch slots]
    seen: Tensor | None  # [batch slots, V]
    result: Tensor  # [3, R], float64: tokens, their log-probabilities, and whether all logits were finite


def _feed(s: _State) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids, positions and segments that a decode step feeds, each `[R, 1]`."""
    ids = torch.where(s.id < 0, s.newest[s.batch_slot], s.id)
    return ids[:, None], s.position[:, None].to(torch.int32), s.segment[:, None].to(torch.int32)


def _sample_next(model: Llama, x: Tensor, s: _State, kinds: tuple[bool, ...]) -> None:
    """Sample the next token of each row from the last layer's output, `[R, 1, E]` or packed."""
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
    logits = model.head(x)[:, 0]
    finite = all_finite(logits).double()
    if several:
        finite = torch.ones_like(finite).scatter_reduce(0, s.leader, finite, "amin")
        logits = combined(logits, s.leader, s.is_max > 0, s.members)
    seen = s.seen[s.batch_slot] if penalty and s.seen is not None else None
    token, logprob = sample(logits, parameters, s.done, seen)
    if several:
        token = token[s.leader]
    if seen is not None and s.seen is not None:
        s.seen[s.batch_slot, token] = True
    s.newest[s.batch_slot] = token
    s.result.copy_(torch.stack((token.double(), logprob.double(), finite)))
