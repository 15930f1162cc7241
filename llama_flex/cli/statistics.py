"""The statistics of a run, for stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

from ..engine.engine import Engine
from ..engine.explain import bytes_per_step
from ..engine.fusion import AnyPrompt, as_ensemble
from ..engine.output import Step
from ..engine.request import Request


class Statistics:
    """The times and counts of a run. Speeds leave out steps that compile, to describe the steady state."""

    def __init__(self, engine: Engine, load_seconds: float) -> None:
        self.engine = engine
        self.load_seconds = load_seconds
        self.first_seconds: float | None = None
        self.first_compile_seconds = 0.0
        self.prompt_tokens = self.decoded_tokens = self.bytes_read = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.started: float | None = None
        self.batch_seconds = 0.0
        self.batch_new_tokens = 0

    def timed(self, steps: Iterator[Step], prompts: Sequence[AnyPrompt]) -> Iterator[Step]:
        """Yield the steps of one batch, timing them."""
        lengths = [[len(p.ids) for p in as_ensemble(prompt).prompts] for prompt in prompts]
        counts = [0] * len(prompts)
        started, compiled = time.perf_counter(), self.engine.compile_seconds
        for step in steps:
            elapsed = time.perf_counter() - started
            compiling = self.engine.compile_seconds != compiled  # such a step says nothing about speed
            if not any(counts):
                self._note_first(elapsed)
                self.prefill_seconds += 0 if compiling else elapsed
                self.prompt_tokens += 0 if compiling else sum(map(sum, lengths))
            elif not compiling:
                self.decode_seconds += elapsed
            if counts[step.row] and not compiling:  # the first token of a row comes from the prefill
                self.decoded_tokens += 1
                first = counts[step.row] == max(counts)  # row of a step: the weights were read once more
                if first and self.engine.speculation is None:  # else a step gives a row several tokens
                    contexts = [n + c for ns, c in zip(lengths, counts, strict=True) for n in ns]
                    self.bytes_read += bytes_per_step(self.engine.model, contexts, self.engine.kv_dtype)
            counts[step.row] += 1
            yield step
            started, compiled = time.perf_counter(), self.engine.compile_seconds

    def step(self) -> list[Request]:
        """Run and time one step of the submitted requests; return those that have ended."""
        scheduler = self.engine.scheduler
        started, compiled = time.perf_counter(), self.engine.compile_seconds
        self.started = started if self.started is None else self.started
        new = scheduler.new_tokens
        ended = self.engine.step()
        if scheduler.new_tokens and self.first_seconds is None:
            self._note_first(time.perf_counter() - self.started)
        if self.engine.compile_seconds == compiled:
            self.batch_seconds += time.perf_counter() - started
            self.batch_new_tokens += scheduler.new_tokens - new
        return ended

    def _note_first(self, seconds: float) -> None:
        if self.first_seconds is None:
            self.first_seconds, self.first_compile_seconds = seconds, self.engine.compile_seconds

    def now(self) -> str:
        """Return the state of the engine in words, for a progress bar."""
        s = self.engine.scheduler
        rate = self.batch_new_tokens / self.batch_seconds if self.batch_seconds else 0.0
        free = s.block_manager.available
        return f"{rate:.0f} tok/s, {s.num_running} running, {s.num_waiting} waiting, {free} pages free"

    @property
    def bytes_per_second(self) -> float | None:
        """The speed at which decoding read weights, keys and values; None if no step has been timed, or with drafts."""
        return self.bytes_read / self.decode_seconds if self.bytes_read else None

    def print(self) -> None:
        """Print one line: load, time to first token, compiling (before and after that), prefill and decode speed, bytes
        read per second decoding, and what came of drafts."""
        parts, compiling = [f"load {self.load_seconds:.2f} s"], self.engine.compile_seconds
        if self.first_seconds is not None:
            before = f", {self.first_compile_seconds:.2f} s of it compiling" if self.first_compile_seconds else ""
            parts.append(f"first token {self.first_seconds:.2f} s{before}")
        if compiling:
            parts.append(f"compiling {compiling:.2f} s in all")
        if self.prefill_seconds:
            parts.append(f"prefill {self.prompt_tokens} tokens, {self.prompt_tokens / self.prefill_seconds:.1f} tok/s")
        if self.decode_seconds:
            speed, rate = self.decoded_tokens / self.decode_seconds, self.bytes_per_second
            read = "" if rate is None else f", {rate / 1e9:.1f} GB/s"
            parts.append(f"decode {self.decoded_tokens} tokens, {speed:.1f} tok/s{read}")
        if self.batch_seconds:
            s, speed = self.engine.scheduler, self.batch_new_tokens / self.batch_seconds
            parts.append(f"{s.prompt_tokens} tokens in, {s.new_tokens} out, {speed:.1f} tok/s")
        if self.engine.speculation is not None:
            parts.append(self.engine.speculation.describe())
        print("; ".join(parts), file=sys.stderr)
