"""Run the steps of many requests over one pool of pages, in a few sizes, so that they can be replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, PendingOutput, StepBuffers
from .drafting import SIZES
from .kinds import Kinds
from .model_runner import LastRun, ModelRunner
from .paged_cache import PagedCache, PagedCacheView
from .request import Request, TokenSequence
from .request_masks import MaskRegistry, RowSpec

WIDTH = 64  # the most prompt tokens in a row of a step
_ROW_MEAN = 32  # a step of N tokens has N // 32 rows: room for short prompts, whose rows are half empty


class PrefillChunk(NamedTuple):
    """The prompt tokens that one row of a step computes: `length` of them, from `start` on."""

    request: Request
    sequence: TokenSequence
    start: int
    length: int


class PagedBatch(Batch):
    """The steps of requests that share pages: each request has a row in a decode step, or several chunks in a prefill
    step, whose masks are combined by row."""

    def __init__(self, runner: ModelRunner, cache: PagedCache, batch_slots: int, tokens: int, blocks: int) -> None:
        """tokens: the most prompt tokens in a step, a multiple of WIDTH. blocks: the most blocks of slots of a
        sequence."""
        super().__init__(runner, batch_slots)
        self.cache, self.blocks = cache, blocks
        # Compiled for each size that occurs. Up to 64 rows take no longer: products are bound by reading weights.
        sizes = 1, 8, *(64 << i for i in range(batch_slots.bit_length()))
        self.decode_sizes = sorted({min(size, batch_slots) for size in sizes})
        self.prefill_sizes = sorted({min(WIDTH << i, tokens) for i in range(tokens.bit_length())})
        self.max_chunks = tokens // _ROW_MEAN
        self.masks = MaskRegistry(self.model, max(batch_slots, self.max_chunks))
        self._generation = self.masks.generation
        self._buffers: dict[tuple[int, int], StepBuffers] = {}
        self._drafted: dict[tuple[int, int], StepBuffers] = {}  # of steps that verify drafts
        self.drafter: DraftingBatch | None = None

    def prefill(self, chunks: Sequence[PrefillChunk], running: Sequence[Request]) -> list[PendingOutput]:
        """Enqueue prefill chunks, and the next token of each prompt that ends in one, sampled with the filters of all
        running requests, so that few graphs are compiled."""
        count = sum(chunk.length for chunk in chunks)
        size = next(s for s in self.prefill_sizes if s >= count and s // _ROW_MEAN >= len(chunks))
        buffers, host = self._fill(size, WIDTH)
        # Spread the chunks: a CPU's threads get adjacent rows, and all of them should have work.
        at = {n * (size // _ROW_MEAN) // len(chunks): chunk for n, chunk in enumerate(chunks)}
        for row, (_, sequence, start, length) in at.items():
            host["rows"][:3, row] = start, sequence.num_computed_tokens, length
            host["tokens"][:, row, :length] = sequence.tokens[:, start : start + length]
        lengths = host["rows"][2]
        padding = np.arange(WIDTH) >= lengths[:, None]
        host["token_indices"][:] = np.argsort(padding.ravel(), kind="stable")[:size]
        host["last"][:] = np.maximum(lengths.cumsum() - 1, 0)
        ends = {row: c for row, c in at.items() if c.start + c.length == c.sequence.num_tokens}
        self._fill_state(host, {row: (c.request, c.sequence) for row, c in ends.items()})
        rows = {row: (c.request, c.sequence) for row, c in at.items()}
        if not ends:
            self._run(size, WIDTH, buffers, host, rows, None)
            return []
        kinds = self.kinds_of(running, any(c.request.kinds.split for c in ends.values()))
        replays = self._run(size, WIDTH, buffers, host, rows, kinds)
        return [self._pending(buffers, [(c.request, row) for row, c in ends.items()], kinds, replays=replays)]

    def decode(self, requests: Sequence[Request]) -> PendingOutput:
        """Enqueue a decode step: one token for each request."""
        rows = dict(enumerate((request, sequence) for request in requests for sequence in request.sequences))
        size = next(s for s in self.decode_sizes if s >= len(rows)) if self.runner.compile else len(rows)
        buffers, host = self._fill(size, 1)
        self._fill_state(host, rows)
        for row, (_, sequence) in rows.items():
            computed = sequence.num_computed_tokens
            host["rows"][:3, row] = computed, computed + 1, 1
            sequence.num_computed_tokens += 1
        sampled = self._fill_leaders(host, rows)
        kinds = self.kinds_of(requests)
        replays = self._run(size, 1, buffers, host, rows, kinds)
        return self._pending(buffers, sampled, kinds, replays=replays)

    def verify(self, requests: Sequence[Request], drafts: Mapping[Request, Sequence[int]], size: int) -> PendingOutput:
        """Compute each request's newest token and its drafts, up to `size` of them; return the tokens that it keeps.
        All tokens so far must have been read."""
        rows = dict(enumerate((request, sequence) for request in requests for sequence in request.sequences))
        count = next(s for s in self.decode_sizes if s >= len(rows)) if self.runner.compile else len(rows)
        width = size + 1
        if (count, width) not in self._drafted:
            self._drafted[count, width] = self._new_draft_buffers(count, width, self._shapes(count))
        buffers = self._drafted[count, width]
        host = self._padding(buffers)
        self._fill_state(host, rows)
        self._fill_drafts(host, rows, drafts)
        for row, (_, sequence) in rows.items():
            new = host["count"][row]
            host["rows"][:3, row] = sequence.num_computed_tokens, sequence.num_computed_tokens + new, new
        sampled, kinds = self._fill_leaders(host, rows), self.kinds_of(requests)
        drafted = None
        if self.drafter is not None:
            drafted = self.drafter.draft(rows, {row: len(drafts[request]) for row, (request, _) in rows.items()}, count)
        self._run(count * width, width, buffers, host, rows, kinds, verifies=True, drafted=drafted)
        output = self._verified(buffers, sampled, kinds)
        spoiled = output.spoiled()
        for request, new in output.counts().items():
            for sequence in request.sequences:
                sequence.num_computed_tokens += new
                if spoiled:
                    self.cache.wipe(sequence)
        return output

    def _fill(self, size: int, width: int) -> tuple[StepBuffers, dict[str, np.ndarray]]:
        """Return the buffers of a step of `size` tokens in rows of `width`, and host arrays, filled with padding."""
        rows = size if width == 1 else size // _ROW_MEAN
        shapes = self._shapes(rows)
        if width > 1:
            shapes |= {"tokens": (torch.int64, (3, rows, width)), "token_indices": (torch.int64, (size,))}
            shapes |= {"last": (torch.int64, (rows,))}
        if (size, width) not in self._buffers:
            self._buffers[size, width] = self._new_buffers(rows, shapes)
        buffers = self._buffers[size, width]
        host = self._padding(buffers)
        if width > 1:
            host["tokens"].fill(0)  # a mask may index a table by padding; stale values may be out of its range
        return buffers, host

    def _shapes(self, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            "page_table": (torch.int32, (rows, self.blocks)),
            "rows": (torch.int32, (4, rows)),  # start, end, count, and the number of the adapter
        }

    def _padding(self, buffers: StepBuffers) -> dict[str, np.ndarray]:
        host = buffers.inputs.fill()
        host["page_table"].fill(self.cache.block_manager.num_pages)
        host["rows"].fill(0)
        return host

    def _run(
        self,
        size: int,
        width: int,
        buffers: StepBuffers,
        host: dict[str, np.ndarray],
        rows: Mapping[int, tuple[Request, TokenSequence]],
        kinds: Kinds | None,
        verifies: bool = False,
        drafted: Tensor | None = None,
    ) -> bool:
        """Enqueue a step; return whether it is recorded and replayed. kinds: of sampling; None if no row samples.
        verifies: whether rows hold drafts; drafted: those on the device, `[R, K]`."""
        adapted = False
        for row, (request, sequence) in rows.items():
            host["page_table"][row, : len(sequence.pages)] = sequence.pages
            if request.adapter is not None:
                host["rows"][3, row], adapted = request.adapter.number, True
        plan = self.masks.plan(
            {n: RowSpec(r.spec_number, r.sequences.index(s), s.prompt.log_weights) for n, (r, s) in rows.items()}
        )
        if self._generation != self.masks.generation:
            self._generation = self.masks.generation
            self.recorded.forget(keep=[spec.plan for spec in self.masks.specs])
        buffers.inputs.send()
        given = buffers.inputs.on_device
        start, end, count, number = given["rows"].unbind(0)
        adapters = number[:, None] if adapted else None
        page_table = given["page_table"]
        if not self.runner.compile:  # eager shapes may vary: drop columns that no row uses
            page_table = page_table[:, : max(len(sequence.pages) for _, sequence in rows.values())]
        cache = PagedCacheView(self.cache, page_table, start, end, given.get("token_indices"))
        self.runner.last = LastRun(plan, lambda: cache.tokens, cache.layers[0].kv_dtype)
        ids, positions, segments = self._newest_tokens(buffers) if width == 1 else given["tokens"].unbind(0)
        if drafted is not None:
            ids[:, 1 : 1 + drafted.shape[1]].copy_(drafted)

        attended = plan.backward if verifies else plan

        def step() -> None:
            x, _ = self.runner.step(ids, count, positions, segments, attended, cache, adapters=adapters)
            if kinds is not None and verifies:
                self._verify(x, buffers, kinds, cache, adapters)
            elif kinds is not None:
                self._sample(x, buffers, kinds, adapters)

        key = size, width, page_table.shape[1], kinds, adapted, plan  # `forget` reads the plan as the last
        # Recorded operations keep their results to the end of a step: too much memory for those of many tokens.
        replays = self.runner.compile or (width == 1 and self.runner.replays(plan))
        self.recorded.run(key, step, replays=replays)
        return replays


class DraftingBatch(PagedBatch):
    """The sequences of a batch in a copy of its model that is faster, and has the same keys and values.

    What it writes to their pages is overwritten, before anything reads it, by the step that verifies its drafts.
    """

    def __init__(self, runner: ModelRunner, batch: PagedBatch) -> None:
        runner.model.to(batch.model.device, batch.model.dtype)  # which may have changed
        super().__init__(runner, batch.cache, batch.batch_slots, batch.prefill_sizes[-1], batch.blocks)
        self._ints, self._reals, self.masks, self._batch = batch._ints, batch._reals, batch.masks, batch
        self._drafts = torch.zeros(batch.batch_slots, SIZES[-1], dtype=torch.int64, device=self.model.device)

    def draft(self, rows: Mapping[int, tuple[Request, TokenSequence]], counts: Mapping[int, int], size: int) -> Tensor:
        """Return drafts `[size, K]` for the rows of a step, int64, sampled with their noise and filters, on the device.
        counts: how many for each row."""
        self.runner.follow(self._batch.runner)
        self._newest.copy_(self._batch._newest)
        self._tables = self._batch._tables
        kinds = self.kinds_of(request for request, _ in rows.values()).of_drafts
        for n in range(most := max(counts.values())):
            buffers, host = self._fill(size, 1)
            self._fill_state(host, rows, ahead=n)
            self._fill_leaders(host, rows)
            for row, (_, sequence) in rows.items():
                start = sequence.num_computed_tokens + n
                host["rows"][:3, row] = (start, start + 1, 1) if n < counts[row] else 0
            self._run(size, 1, buffers, host, rows, kinds)
            self._drafts[:size, n].copy_(buffers.result(0)[0])
        return self._drafts[:size, :most]
