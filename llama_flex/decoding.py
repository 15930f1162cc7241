"""The decoding loop: what a step reads and changes stays in one place, so that a step can be recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import masks, scores
from .attention import Layers
from .cache import Cache
from .compiling import Graphs
from .fusion import Ensemble, Prompt, combined
from .masks import Mask
from .model import Llama, plainly
from .sampling import SamplingTensors, all_finite, sample
from .scores import ScoreMod
from .sites import Found

WEIGHTS = 16  # log-weights of fused prompts come in tables of multiples of this, so that graphs are shared


class Batch:
    """Requests laid out in rows: one each, but for the members of an ensemble."""

    def __init__(self, requests: Sequence[Ensemble], device: torch.device) -> None:
        self.rows: list[Prompt] = [prompt for request in requests for prompt in request.prompts]
        self.requests = [q for q, request in enumerate(requests) for _ in request.prompts]
        self.request_of = torch.tensor(self.requests, device=device)
        self.is_max = torch.tensor([request.combine == "max" for request in requests], device=device)
        self.rows_of = torch.tensor([len(request.prompts) for request in requests], device=device)
        after = [(prompt.generated_position or 0, prompt.generated_segment) for prompt in self.rows]
        columns = torch.tensor(after, dtype=torch.int32, device=device).T.contiguous()
        self.generated_position, self.generated_segment = columns[:, :, None].unbind(0)

    def combined(self, logits: Tensor) -> Tensor:
        """The logits `[Q, V]` of each request from those of its rows, `[R, V]`."""
        if len(self.rows) == len(self.rows_of):
            return logits
        return combined(logits, self.request_of, self.is_max, self.rows_of)

    def attention_layers(
        self,
        model: Llama,
        mask: Mask | Sequence[Mask | None] | None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None,
        cache: Cache,
    ) -> Layers:
        """How each layer attends: as asked, but prompts that are fused are kept apart, and weighted."""
        if any(prompt.generated_segment == masks.GENERATED for prompt in self.rows):
            fused = masks.fused() & model.default_mask
            mask = [m or fused for m in mask] if isinstance(mask, list | tuple) else mask or fused
        layers = model.attention_layers(mask, score_mod, cache)
        if any(prompt.log_weights for prompt in self.rows):
            count = max(len(prompt.log_weights) for prompt in self.rows)
            size = -(-count // WEIGHTS) * WEIGHTS
            table = filled([prompt.log_weights for prompt in self.rows], size, torch.float32)
            weights = scores.segment_weights(table)
            own = [layers.patterns[i].score_mod for i in layers.of_layer]
            layers = model.attention_layers(mask, [weights if s is None else s >> weights for s in own], cache)
        return layers


def filled(rows: Sequence[Sequence[float]], size: int, dtype: torch.dtype) -> Tensor:
    """Rows of numbers as one tensor `[R, size]`, filled up with zeros."""
    padded = torch.zeros(len(rows), size, dtype=dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=dtype)
    return padded


class _State(NamedTuple):
    """What a decoding step reads and changes, in place; Q requests, R rows."""

    ids: Tensor  # [R, 1], the newest tokens
    positions: Tensor  # [R, 1], theirs
    lengths: Tensor  # [R], 1 for a row that goes on, else 0
    running: Tensor  # [Q], the same for requests
    done: Tensor  # [Q], how many tokens each has
    limits: Tensor  # [Q], how many it may have
    stop_ids: Tensor  # [N]
    seen: Tensor | None  # [Q, V], for the repetition penalty
    # [3, Q], float64, for one copy to the host: the newest tokens, their log-probabilities, and whether all logits were
    # finite
    result: Tensor


class Decoding:
    """The loop of one stream: every step on the same memory, recorded once it is compiled, then replayed."""

    def __init__(
        self,
        model: Llama,
        batch: Batch,
        cache: Cache,
        parameters: SamplingTensors,
        limits: list[int],
        stop_ids: frozenset[int],
        seen_ids: Sequence[Sequence[int]],
        step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Found | None]],
        graphs: Graphs | None,
    ) -> None:
        """seen_ids: of each request, for the repetition penalty. step: from ids, lengths and positions of a batch's
        newest tokens to the last layer's output `[R, 1, E]` and what probes read. graphs: what compiles and records, if
        anything does."""
        q, device = len(limits), model.device
        seen = None
        if parameters.repetition_penalty is not None:
            seen = torch.zeros(q, model.config.vocab_size, dtype=torch.bool, device=device)
            for request, ids in enumerate(seen_ids):
                seen[request, torch.tensor(ids, device=device)] = True
        ones = torch.ones(q, dtype=torch.int32, device=device)
        self.state = _State(
            ids=torch.zeros(len(batch.rows), 1, dtype=torch.int64, device=device),
            positions=batch.generated_position + cache.next_position[:, None] - 1,
            lengths=torch.ones(len(batch.rows), dtype=torch.int32, device=device),
            running=ones,
            done=torch.zeros_like(ones),
            limits=torch.tensor(limits, dtype=torch.int32, device=device),
            stop_ids=torch.tensor(sorted(stop_ids) or [-1], device=device),
            seen=seen,
            result=torch.zeros(3, q, dtype=torch.float64, device=device),
        )
        self.model, self.batch, self.cache, self.parameters = model, batch, cache, parameters
        self.step, self.graphs = step, graphs
        self.made_for = model.device, model.dtype
        self.has_run = False
        self.replay: Callable[[], Found | None] | None = None
        self.memory: tuple[object, object] = None, None  # what of the cache the recorded step works on

    def first(self, x: Tensor) -> None:
        """The first tokens, from the last layer's output `[R, 1, E]` at the prompts' ends."""
        self._choose(x)

    def next(self) -> Found | None:
        """One more token for each request; only enqueued, on CUDA. Returns what probes read.

        Raises ValueError if the model is of another dtype or device by now, as keys and values in the cache are not.
        """
        cache, now = self.cache, (self.model.device, self.model.dtype)
        if now != self.made_for:
            was, is_ = (f"{dtype} on {device}" for device, dtype in (self.made_for, now))
            raise ValueError(f"the model went from {was} to {is_} amid a stream; begin a new one")
        with cache.appending(1):
            layers, tokens = self.memory
            if self.replay is not None and cache.layers is layers and cache.tokens is tokens:
                found = self.replay()
            elif self.graphs is not None and self.has_run:  # the first one compiles what is not compiled yet
                self.replay, self.memory = None, (None, None)  # before the new one takes memory
                found, self.replay = self.graphs.record(self._step, self.model.device)
                self.memory = cache.layers, cache.tokens  # forking or reordering the cache amid a stream changes them
            else:
                found = self._step()
        self.has_run = True
        return found

    def result(self) -> Callable[[], list[list[float]]]:
        """What reads the newest tokens, their log-probabilities, and whether the logits were finite, however many steps
        are enqueued by then."""
        return reading(self.state.result)

    def stop(self, request: int) -> None:
        """No more tokens for a request."""
        self.state.running[request] = 0
        self.state.lengths.mul_(self.batch.request_of != request)

    def _step(self) -> Found | None:
        s = self.state
        x, found = self.step(s.ids, s.lengths, s.positions)
        self._choose(x)
        return found

    def _choose(self, x: Tensor) -> None:
        run = plainly
        if self.graphs is not None:
            kinds = tuple(p is None for p in self.parameters)
            run = self.graphs.of(len(self.batch.rows), len(self.batch.rows_of), len(self.state.stop_ids), kinds)
        run("choose", _choose, self.model, x, self.batch, self.parameters, self.state)


class Buffer:
    """Numbers of one step, which the host fills and the device reads, always in the same memory."""

    def __init__(self, device: torch.device, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.on_device = {n: torch.zeros(shape, dtype=dtype, device=device) for n, (dtype, shape) in shapes.items()}
        self._device = device
        self._hosts = []  # two, so that one is filled while the other is copied
        for _ in range(2 if device.type == "cuda" else 0):
            pinned = {n: torch.zeros(shape, dtype=dtype, pin_memory=True) for n, (dtype, shape) in shapes.items()}
            self._hosts.append((pinned, torch.cuda.Event()))

    def fill(self) -> dict[str, np.ndarray]:
        """What to write the next step's numbers to, before `send`."""
        if not self._hosts:
            return {n: x.numpy() for n, x in self.on_device.items()}
        self._hosts.reverse()
        pinned, sent = self._hosts[0]
        sent.synchronize()
        return {n: x.numpy() for n, x in pinned.items()}

    def send(self) -> None:
        """Give the device what was filled in; does not wait."""
        for pinned, sent in self._hosts[:1]:
            for name, x in pinned.items():
                self.on_device[name].copy_(x, non_blocking=True)
            sent.record(torch.cuda.current_stream(self._device))


def reading(found: Tensor) -> Callable[[], list[list[float]]]:
    """What reads the numbers that a tensor has now, or will have when the device comes here; waits when called."""
    if not found.is_cuda:
        return found.tolist
    copied, done = torch.empty_like(found, device="cpu", pin_memory=True), torch.cuda.Event()
    copied.copy_(found, non_blocking=True)
    done.record(torch.cuda.current_stream(found.device))

    def read() -> list[list[float]]:
        done.synchronize()
        return copied.tolist()

    return read


def _choose(model: Llama, x: Tensor, batch: Batch, parameters: SamplingTensors, s: _State) -> None:
    """From the last layer's output `[R, 1, E]` to the next tokens, and to what the next step needs."""
    logits = model.head(x)[:, 0]
    finite = all_finite(logits).double()
    if len(finite) > len(s.done):  # the members of an ensemble choose together
        finite = torch.ones_like(s.done, dtype=finite.dtype).scatter_reduce(0, batch.request_of, finite, "amin")
    token, logprob = sample(batch.combined(logits), parameters, s.done, s.seen)
    if s.seen is not None:
        s.seen.scatter_(1, token[:, None], True)
    s.result.copy_(torch.stack((token.double(), logprob.double(), finite)))
    s.done.add_(1)
    s.running.mul_((s.done < s.limits) & (token[:, None] != s.stop_ids).all(1))
    s.ids.copy_(token[batch.request_of, None])
    s.lengths.copy_(s.running[batch.request_of])
    s.positions.add_(1)
