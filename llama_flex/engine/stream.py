"""Run requests together over one cache: prompts in chunks, then one token for each request in every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..cache import Cache
from ..interp.hook_points import Captured
from .batch import Batch, PendingOutput, StepBuffers, kinds_of
from .model_runner import LastRun, ModelRunner
from .paged_cache import RowCache
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
        super().__init__(runner, len(rows))
        self.requests, self.rows, self.cache = requests, dict(enumerate(rows)), cache
        self.plan, self.captures = first.spec.plan, first.captures
        self.probes = self.model.probes(self.captures, first.edits, len(rows), stepwise=True)
        self.ahead = self.model.device.type == "cuda" and first.cache is None and not self.captures
        self.kinds = kinds_of(requests)
        for row, (request, sequence) in self.rows.items():
            sequence.batch_slot = row
            self.assign_batch_slot(request, sequence)
        self.steps = self._steps()
        held = cache.tokens if isinstance(cache, Cache) else None
        self.runner.last = LastRun(self.plan, (lambda: held) if held else lambda: cache.tokens)

    def outputs(self) -> Iterator[PendingOutput]:
        """Run all steps; yield the tokens of each, after the next one is enqueued if they may run ahead."""
        before: PendingOutput | None = None
        for output in self.steps:
            if before is not None:
                yield before
            before = output if self.ahead else None
            if output is not None and not self.ahead:
                yield output
        if before is not None:
            yield before

    def _steps(self) -> Iterator[PendingOutput | None]:
        """Enqueue a prefill chunk or a decode step at a time; yield the tokens that it samples, None if none.

        Raises ValueError if the model's dtype or device has changed, since the cached keys and values have not.
        """
        made_for = self.model.device, self.model.dtype
        buffers = self._buffers_for("decode", len(self.rows), {"count": (torch.int32, (len(self.rows),))})
        left = [sequence.tokens[:, sequence.num_computed_tokens :] for _, sequence in self.rows.values()]
        for x in newest_outputs(left, prefill(self.runner, left, self.plan, self.cache, self.probes, self.captures)):
            yield None if x is None else self._first(x, buffers)
        while any(self._continues(request) for request in self.requests):
            now = self.model.device, self.model.dtype
            if now != made_for:
                was, is_ = (f"{dtype} on {device}" for device, dtype in (made_for, now))
                raise ValueError(f"the model changed from {was} to {is_} during a stream; start a new stream")
            yield self._next(buffers)

    def _first(self, x: Tensor, buffers: StepBuffers) -> PendingOutput:
        """Sample the first new tokens from the output `[R, 1, E]` at the prompts' last tokens."""
        sampled = self._fill_rows(buffers)
        self._sample(x, buffers, self.kinds)
        for _, sequence in self.rows.values():
            sequence.num_computed_tokens = sequence.num_tokens
        return self._sampled(buffers, sampled)

    def _next(self, buffers: StepBuffers) -> PendingOutput:
        """Compute one more token for each request that continues."""
        sampled = self._fill_rows(buffers)
        count = buffers.inputs.on_device["count"]
        ids, positions, segments = self._newest_tokens(buffers)

        def step() -> Captured | None:
            x, captured = self.runner.step(ids, count, positions, segments, self.plan, self.cache, self.probes)
            self._sample(x, buffers, self.kinds)
            return captured

        with self.cache.appending(1):
            captured = self.recorded.run(("decode",), step, self.cache.layers)
            for each in self.captures:
                assert captured is not None
                each.add(captured, self.plan, self.cache)
        for request, _ in sampled:
            for sequence in request.sequences:
                sequence.num_computed_tokens += 1
        return self._sampled(buffers, sampled)

    def _fill_rows(self, buffers: StepBuffers) -> list[tuple[Request, int]]:
        """Send the state of the rows that continue; return their requests, each with its first row."""
        rows = {row: each for row, each in self.rows.items() if self._continues(each[0])}
        host = buffers.inputs.fill()
        self._fill_state(host, rows)
        sampled = self._fill_leaders(host, rows)
        host["count"][:] = [row in rows for row in self.rows]
        buffers.inputs.send()
        return sampled

    @staticmethod
    def _continues(request: Request) -> bool:
        return not request.finished and request.num_scheduled < request.output_processor.limit
