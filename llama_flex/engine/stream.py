"""Run requests together over one cache: prompts in chunks, then one token for each request in every step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..cache import Cache
from ..interp.hook_points import Captured
from ..tokens import Tokens
from .ahead import CompileAhead
from .batch import Batch, PendingOutput
from .model_runner import LastRun, ModelRunner, RecordedSteps
from .paged_cache import PagedRows, RowCache
from .prefill import newest_outputs, prefill
from .request import Request


class Stream(Batch):
    """Requests with the same masks, captures, edits and cache, in which each of their sequences has a row.

    ahead: whether a step's tokens may be read after the next one is enqueued. A caller's cache must not run ahead: when
    a token is read, it holds the tokens before that one. Captures may be copied to the host, which waits anyway.
    """

    def __init__(self, runner: ModelRunner, requests: Sequence[Request], cache: RowCache) -> None:
        """The sequences' tokens that are computed already must be in the cache. Raises ValueError as
        `Llama.probes` does."""
        first, rows = requests[0], [(request, sequence) for request in requests for sequence in request.sequences]
        self.plan, self.captures = first.spec.plan, first.captures
        self.probes = runner.model.probes(self.captures, first.edits, len(rows), stepwise=True)
        self._decoding, tokens = runner, sum(sequence.num_tokens for _, sequence in rows)
        contiguous = isinstance(cache, Cache)  # pages are gathered, all that a sequence may have
        super().__init__(runner.for_prompts(self.plan, tokens, self.probes) if contiguous else runner, len(rows))
        self.requests, self.rows, self.cache = requests, dict(enumerate(rows)), cache
        self.kinds = self.kinds_of(requests)
        self.adapters = runner.model.adapters.numbers_of(request.adapter for request, _ in rows)
        self.ahead = self.model.device.type == "cuda" and first.cache is None and not self.captures
        for row, (request, sequence) in self.rows.items():
            sequence.batch_slot = row
            self.assign_batch_slot(request, sequence)
        self._buffers = self._new_buffers(len(rows), {"count": (torch.int32, (len(rows),))})

    def outputs(self) -> Iterator[PendingOutput]:
        """Run all steps, and yield them finished: each after the next one is enqueued, if they may run ahead."""
        before: PendingOutput | None = None
        for output in self.steps():
            if before is not None:
                yield before
            if output is not None:
                output.finish()
            before = output if self.ahead else None
            if output is not None and not self.ahead:
                yield output
        if before is not None:
            yield before

    def steps(self) -> Iterator[PendingOutput | None]:
        """Enqueue a prefill chunk or a decode step at a time, after the one before was finished; yield it to be
        finished, None if it samples no tokens.

        Raises ValueError if the model's dtype or device has changed, since the cached keys and values have not.
        """
        made_for = self.model.device, self.model.dtype
        self._decoding.last = LastRun(self.plan, _tokens_of(self.cache), self.cache.layers[0].kv_dtype)
        for n, left in enumerate(pieces := self._pieces(), start=1):
            chunks = prefill(self.runner, left, self.plan, self.cache, self.probes, self.captures, self.adapters)
            for x in newest_outputs(left, chunks):
                yield None if x is None or n < len(pieces) else self._first(x)
        while any(map(continues, self.requests)):
            now = self.model.device, self.model.dtype
            if now != made_for:
                was, is_ = (f"{dtype} on {device}" for device, dtype in (made_for, now))
                raise ValueError(f"the model changed from {was} to {is_} during a stream; start a new stream")
            for request in self.requests if self.adapters is not None else ():
                self.model.adapters.check(request.adapter)
            if self.runner is not self._decoding:
                self._count_uncompiled()
            yield self._next()

    def _count_uncompiled(self) -> None:
        """Count an uncompiled step; compile ahead if a text may go beyond the last one, and after that take over."""
        first, cache = self.runner, self.cache
        shape: tuple[Hashable, ...] = len(self.rows), cache.max_length, cache.layers[0].kv_dtype, self.plan.structure
        shape += self.kinds, self.adapters is None
        if left := first.steps_left(shape):
            new = max(request.output_processor.limit - request.num_scheduled for request in self.requests)
            if new > left and shape not in first.compiling and isinstance(cache, Cache) and cache.window is None:
                ahead = CompileAhead(self._decoding, self.plan, cache, self.kinds, self.adapters)
                first.compiling[shape] = ahead.finish
            first.steps[shape] += 1
            return
        first.compiling.get(shape, lambda: None)()
        self.runner = self._decoding
        self.recorded, self._draws = RecordedSteps(self.runner), RecordedSteps(self.runner)

    def _pieces(self) -> list[list[np.ndarray]]:
        """Return the tokens of each row that are not computed yet, in pieces that are prefilled one after the other.

        In a resumed request they include generated ones; where a mask may look ahead, none of those is appended
        together with earlier tokens, which have not seen it.
        """
        sequences = [sequence for _, sequence in self.rows.values()]
        new = 0
        if not all(variant.mask.never_looks_ahead for variant in self.plan.variants):
            new = min(s.num_tokens - max(len(s.prompt.ids), s.num_computed_tokens + 1) for s in sequences)
        first = [s.tokens[:, s.num_computed_tokens : s.num_tokens - new] for s in sequences]
        return [first, *([s.tokens[:, s.num_tokens - n :][:, :1] for s in sequences] for n in range(new, 0, -1))]

    def _first(self, x: Tensor) -> PendingOutput | None:
        """Sample the first new tokens from the output `[R, 1, E]` at the prompts' last tokens."""
        for _, sequence in self.rows.values():
            sequence.num_computed_tokens = sequence.num_tokens
        if not (sampled := self._fill_rows()):
            return None
        self._sample(x, self._buffers, self.kinds, self.adapters)
        return self._pending(self._buffers, sampled, self.kinds, replays=self.runner.replays(self.plan, self.probes))

    def _next(self) -> PendingOutput | None:
        """Compute one more token for each request that continues."""
        if not (sampled := self._fill_rows()):
            return None
        count = self._buffers.inputs.on_device["count"]
        ids, positions, segments = self._newest_tokens(self._buffers)

        def step() -> Captured | None:
            given = ids, count, positions, segments, self.plan, self.cache, self.probes, self.adapters
            x, captured = self.runner.step(*given)
            self._sample(x, self._buffers, self.kinds, self.adapters)
            return captured

        with self.cache.appending(1):
            replays = self.runner.replays(self.plan, self.probes)
            captured = self.recorded.run(self._key(), step, replays=replays, memory=self.cache.layers)
            for each in self.captures:
                assert captured is not None
                each.add(captured, self.plan, self.cache)
        for request, _ in sampled:
            for sequence in request.sequences:
                sequence.num_computed_tokens += 1
        return self._pending(self._buffers, sampled, self.kinds, replays=replays)

    def _key(self) -> tuple[Hashable, ...]:
        """Return a key of what recorded decode steps depend on: uncompiled ones look at the slots in use only."""
        if self.runner.compile or not isinstance(self.cache, Cache):
            return ("decode",)
        return "decode", self.cache.slots_in_use

    def _fill_rows(self) -> list[tuple[Request, int]]:
        """Send the state of the rows that continue; return their requests, each with its first row."""
        rows = {row: each for row, each in self.rows.items() if continues(each[0])}
        if not rows:
            return []
        host = self._buffers.inputs.fill()
        self._fill_state(host, rows)
        sampled = self._fill_leaders(host, rows)
        host["count"][:] = [row in rows for row in self.rows]
        self._buffers.inputs.send()
        return sampled


def _tokens_of(cache: RowCache) -> Callable[[], Tokens]:
    """Return a function that returns a cache's tokens and does not keep its keys and values in memory."""
    if isinstance(cache, PagedRows):
        return lambda: cache.tokens  # the pages stay anyway
    held = cache.tokens
    return lambda: held


def continues(request: Request) -> bool:
    """Return whether a request of a stream may get more tokens."""
    return not request.finished and request.num_scheduled < request.output_processor.limit
