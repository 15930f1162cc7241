"""Streams that verify drafts: a step computes several tokens of a text, and keeps those that it would have sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ..interp.hook_points import Captured
from ..masks.layout import BLOCK
from .batch import PendingOutput, StepBuffers
from .drafting import COMPILED_SIZES, SIZES
from .model_runner import ModelRunner
from .paged_cache import PagedRows, RowCache
from .request import Request
from .speculation import DraftedRows, Speculation
from .stream import Stream, continues
from .transfer import to_device_async


class VerifyingStream(Stream):
    """A stream whose steps verify drafts, if its requests have any.

    Every token is the one that a step of one token would sample at that place, with the same noise, so drafts change
    nothing but the time; what rounds differently in 16 bits may decide between tokens that are nearly as likely. While
    it runs, a caller's cache holds all tokens that were accepted, also those that were not taken yet.
    """

    def __init__(
        self, runner: ModelRunner, requests: Sequence[Request], cache: RowCache, speculation: Speculation
    ) -> None:
        super().__init__(runner, requests, cache)
        self.ahead = False  # drafts follow tokens that were read
        self._verified_plan = self.plan.backward
        self._of_width: dict[int, StepBuffers] = {}
        self._speculation = speculation
        # Slots that each row has taken besides those of its computed tokens: of a caller's cache, with holes or not.
        self._taken = [0] * len(self.rows)
        if (held := requests[0].cache) is not None:
            taken = (held.tokens.index >= 0).sum(1).tolist()
            self._taken = [n - self.rows[row][1].num_computed_tokens for row, n in enumerate(taken)]
        by_model = isinstance(speculation.drafter, ModelRunner)
        self._drafter = DraftedRows(speculation, runner, self) if by_model else None

    def steps(self) -> Iterator[PendingOutput | None]:
        """Enqueue steps as `Stream.steps` does. In the end, a caller's cache holds the tokens before the last one."""
        try:
            yield from super().steps()
        finally:
            self._drop_unread()

    def _next(self) -> PendingOutput | None:
        self._drop_unread()  # of texts that have ended: later steps may roll the window of a cache
        drafts, before = self._drafts(), self._longest
        most = 1 + max(map(len, drafts.values()), default=0)
        output = super()._next() if most == 1 else self._verify_drafts(drafts, most)
        if output is not None:  # else all were cancelled meanwhile
            self.cache.release(most - (self._longest - before))  # which row is the longest may have changed
        return output

    @property
    def _longest(self) -> int:
        return max(self._taken[row] + sequence.num_computed_tokens for row, (_, sequence) in self.rows.items())

    def _verify_drafts(self, drafts: Mapping[Request, Sequence[int]], most: int) -> PendingOutput:
        """Compute each request's newest token and its drafts, up to `most` tokens a row."""
        size = next(s for s in self._sizes if s >= most - 1)
        rows = {row: each for row, each in self.rows.items() if each[0] in drafts}
        counts = {row: len(drafts[request]) for row, (request, _) in rows.items() if drafts[request]}
        drafted = None if self._drafter is None else self._drafter.draft(counts)
        buffers = self._buffers_of(size + 1)
        host = buffers.inputs.fill()
        self._fill_state(host, rows)
        sampled = self._fill_leaders(host, rows)
        self._fill_drafts(host, rows, drafts)
        buffers.inputs.send()
        given = buffers.inputs.on_device
        (ids, positions, segments), count = given["tokens"].unbind(0), given["count"]
        if drafted is not None:
            ids[:, 1 : 1 + drafted.shape[1]].copy_(drafted)

        def step() -> Captured | None:
            inputs = ids, count, positions, segments, self._verified_plan, self.cache, self.probes, self.adapters
            x, captured = self.runner.step(*inputs)
            self._verify(x, buffers, self.kinds, self.cache, self.adapters)
            return captured

        with self.cache.appending(most):
            replays = self.runner.replays(self.plan, self.probes)
            captured = self.recorded.run((size, *self._key()), step, replays=replays, memory=self.cache.layers)
            output = self._verified(buffers, sampled, self.kinds)
            new = output.counts()
            for each in self.captures:
                assert captured is not None
                kept = _first_tokens(captured, [new.get(request, 0) for request, _ in self.rows.values()])
                each.add(kept, self._verified_plan, self.cache)
        if self._drafter is not None:
            self._drafter.count(counts, {row: new[self.rows[row][0]] for row in counts})
        self._speculation.count(drafts, new)
        for request, _ in sampled:
            for sequence in request.sequences:
                sequence.num_computed_tokens += new[request]
        if output.spoiled():
            self.cache.wipe()
        return output

    @property
    def _sizes(self) -> tuple[int, ...]:
        return COMPILED_SIZES if self.runner.compile else SIZES

    def _drafts(self) -> dict[Request, Sequence[int]]:
        """Return drafts for each request that continues, at most as many as it may get tokens before its last one; of a
        model, which has not made them yet, just their number."""
        drafts = dict[Request, Sequence[int]]()
        for request in filter(continues, self.requests):
            room = [request.output_processor.limit - request.num_scheduled, self.cache.largest_append]
            if isinstance(self.cache, PagedRows):
                room += [len(s.pages) * BLOCK - s.num_computed_tokens for s in request.sequences]
            drafts[request] = self._speculation.draft(request, min(*room, self._sizes[-1] + 1) - 1)
        return drafts

    def _buffers_of(self, width: int) -> StepBuffers:
        if width not in self._of_width:
            self._of_width[width] = self._new_draft_buffers(len(self.rows), width)
        return self._of_width[width]

    def _drop_unread(self) -> None:
        """Drop what captures and a caller's cache hold of tokens after a stop, or after the last one that was taken; of
        a cache that the caller has gone on with meanwhile, nothing."""
        ends, lengths, drop = [], [], False
        for request in self.requests:
            assert request.start is not None
            for start, sequence in zip(request.start.lengths, request.sequences, strict=True):
                failed = request.finish_reason == "error"  # at the token after the last step
                computed = len(sequence.prompt.ids) + max(len(request.steps) + failed - 1, 0)
                ends.append(start + computed)
                lengths.append(start + sequence.num_computed_tokens)
                drop |= sequence.num_computed_tokens > computed
                sequence.num_computed_tokens = min(sequence.num_computed_tokens, computed)
        if not drop:
            return
        first = self.requests[0]
        assert first.start is not None
        for capture, parts in zip(self.captures, first.start.capture_parts, strict=True):
            capture.rewind(parts, ends)
        if (cache := first.cache) is not None:
            length = cache.length.tolist()
            if all(now <= known for now, known in zip(length, lengths, strict=True)):
                after = torch.tensor(ends, device=cache.length.device)[:, None]
                cache.evict(lambda t: t.index >= after)


def new_stream(
    runner: ModelRunner, requests: Sequence[Request], cache: RowCache, speculation: Speculation | None
) -> Stream:
    """Return a stream, one that verifies drafts if there is a drafter, unless processors on the host make the logits
    depend on the token before, a draft model would lack the tokens in a caller's cache, or one that shares a rolling
    cache would roll it past tokens that the model still sees."""
    if speculation is None or any(request.kinds.split for request in requests):
        return Stream(runner, requests, cache)
    held = requests[0].cache
    if held is not None and (speculation.needs_cache or (speculation.shares and held.window is not None)):
        return Stream(runner, requests, cache)
    return VerifyingStream(runner, requests, cache, speculation)


def _first_tokens(captured: Captured, counts: Sequence[int]) -> Captured:
    """Return what was captured of the first tokens of each row only."""
    index = captured.tokens.index
    kept = (
        torch.arange(index.shape[1], device=index.device) < to_device_async(torch.tensor(counts), index.device)[:, None]
    )
    return captured._replace(tokens=captured.tokens._replace(index=torch.where(kept, index, -1)))
