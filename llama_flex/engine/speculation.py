"""Speculation: a drafter proposes tokens, and a step verifies several of them; models as drafters of streams.

Dimensions: R rows of a step, K drafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import Cache
from ..checkpoint.quantization import Quantization, quantise_beside
from ..model import Llama
from ..usercode.arguments import whole_numbers
from ..usercode.captured import name_of
from .batch import Batch
from .drafting import COST, SIZES, Drafter, prompt_lookup
from .explain import bytes_per_step
from .model_runner import ModelRunner
from .paged_cache import RowCache
from .prefill import prefill
from .request import Request, TokenSequence, tokens_of
from .stream import Stream
from .transfer import to_device_async


@dataclass
class Speculation:
    """The drafter of an engine, and what came of its drafts.

    drafter: a function from the ids so far and the most to draft to ids; or the runner of a model, and shares: whether
    this has the same keys and values. cost: the time of a draft, made and verified, in that of a step of one token.
    weights: the bytes of weights that a step of a draft model reads, and one of the model. texts: how many had drafts,
    and given_up: for how many they did not pay. steps, drafted, accepted: as in `Acceptance`, of all of them.
    decoded, decode_steps: of those that have ended, the new tokens after the first, and the model's steps for them.
    """

    drafter: Drafter | ModelRunner
    vocab_size: int
    cost: float
    shares: bool = False
    weights: tuple[int, int] | None = None
    texts: int = 0
    given_up: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    decoded: int = 0
    decode_steps: int = 0

    @property
    def needs_cache(self) -> bool:
        """Whether drafts come from a model with a cache of its own."""
        return isinstance(self.drafter, ModelRunner) and not self.shares

    @classmethod
    def of(cls, drafter: Any, runner: ModelRunner) -> Speculation | None:
        """Return the speculation of an engine with a runner; drafter: `speculate` of `Engine`. Raises ValueError for
        anything else."""
        if drafter is None:
            return None
        model = runner.model
        model.check_device()
        size, cost = model.config.vocab_size, COST[model.device.type]
        if shares := drafter == "self":
            with torch.device("meta"):
                drafter = type(model)(model.config)
            quantise_beside(model, drafter.eval(), Quantization("int4"))
        if isinstance(drafter, Llama):
            drafter.check_device()
            for name, theirs, ours in (
                ("tokens", drafter.config.vocab_size, size),
                ("device", drafter.device, model.device),
            ):
                if theirs != ours:
                    raise ValueError(f"the draft model's {name}, {theirs}, must be those of the model, {ours}")
            weights = bytes_per_step(drafter, []), bytes_per_step(model, [])
            return cls(ModelRunner(drafter), size, cost + weights[0] / weights[1], shares, weights)
        if not callable(drafter := prompt_lookup if drafter == "lookup" else drafter):
            what = "'lookup', 'self', a Llama or a function of token ids"
            raise ValueError(f"speculate must be {what}, not {drafter!r:.60}")
        return cls(drafter, size, cost)

    def drafts_for(self, request: Request) -> bool:
        """Return whether drafts are made for a request now: not once they have not paid, and not with processors on the
        host, as logits then depend on the token before."""
        return request.drafts.most > 0 and not request.kinds.split

    def draft(self, request: Request, room: int) -> list[int]:
        """Return drafts for a request, whose tokens so far were read, at most as many as there is room for; of a model,
        which makes them later, zeros. Raises ValueError for anything but token ids from a function."""
        most = min(request.drafts.most, room)
        if most <= 0:
            return []
        if isinstance(self.drafter, ModelRunner):
            return [0] * most
        found = whole_numbers("a drafter must return a list of token ids", self.drafter(request.ids, most))[:most]
        if beyond := [id for id in found if not 0 <= id < self.vocab_size]:
            raise ValueError(f"the drafter returned {beyond[0]}, which is outside the vocabulary of {self.vocab_size}")
        return found

    def count(self, drafts: Mapping[Request, Sequence[int]], new: Mapping[Request, int]) -> None:
        """Count what came of drafts in a step. new: how many tokens each request got."""
        for request, drafted in drafts.items():
            if drafted:
                self.texts += request.drafts.steps == 0
                before = request.drafts.accepted
                request.drafts.add(len(drafted), new[request], self.cost)
                self.given_up += request.drafts.most == 0
                self.steps, self.drafted = self.steps + 1, self.drafted + len(drafted)
                self.accepted += request.drafts.accepted - before

    def finish(self, requests: Sequence[Request]) -> None:
        """Count the tokens and the steps of texts that have ended, if they had drafts."""
        for request in requests:
            if request.drafts.steps:
                decoded = request.num_scheduled - 1
                self.decoded += decoded
                self.decode_steps += decoded - request.drafts.accepted

    def describe(self) -> str:
        """Say in one line what drafts, how many drafts there were and were accepted, and what came of it."""
        if isinstance(self.drafter, ModelRunner):
            assert self.weights is not None
            read, of_model = (size / 1e9 for size in self.weights)
            drafter = "a copy in 4 bits" if self.shares else "a draft model"
            drafter += f" (a step reads {read:.3f} GB of weights, one of the model {of_model:.3f} GB)"
        else:
            drafter = "prompt lookup" if self.drafter is prompt_lookup else name_of(self.drafter)
        parts = [f"drafts by {drafter}: {self.drafted} in {_texts(self.texts)}, {self.accepted} accepted"]
        if self.decode_steps:
            parts.append(f"{self.decoded / self.decode_steps:.2f} tokens a step")
        if self.given_up:
            parts.append(f"given up in {_texts(self.given_up)}, where they did not pay")
        return ", ".join(parts)


def _texts(count: int) -> str:
    return f"{count} text" + "s" * (count != 1)


class DraftedRows(Batch):
    """The rows of a stream in a draft model, which samples with their noise and filters, on the device.

    It has a cache of its own, or writes into the stream's: what it leaves there is dropped before anything reads it.
    """

    def __init__(self, speculation: Speculation, runner: ModelRunner, stream: Stream) -> None:
        """runner: of the stream's model."""
        assert isinstance(speculation.drafter, ModelRunner)
        speculation.drafter.follow(runner)
        drafter = speculation.drafter
        super().__init__(drafter if stream.runner.compile else drafter.uncompiled or drafter, stream.batch_slots)
        self._ints, self._reals, self._stream = stream._ints, stream._reals, stream
        self._kinds = stream.kinds.of_drafts
        self._held = dict.fromkeys(stream.rows, 0)  # tokens in its own cache
        self._rows = self._new_buffers(len(stream.rows), {"count": (torch.int32, (len(stream.rows),))})
        self._drafts = torch.zeros(len(stream.rows), SIZES[-1] + 1, dtype=torch.int64, device=self.model.device)
        self._own: Cache | None = None
        if speculation.shares:
            self.model.to(stream.model.device, stream.model.dtype)  # which may have changed between streams
            self._cache: RowCache = stream.cache
            self._plan = stream.plan
            return
        prompts = [sequence.prompt for _, sequence in stream.rows.values()]
        masks = [variant.mask for variant in stream.plan.variants]
        fused = any(prompt.is_fused for prompt in prompts)
        # A mask may be one for each layer or head, of which a draft model has other numbers.
        alike = len(masks) == 1 and self.model.dims.num_heads == stream.model.dims.num_heads
        self._plan = self.model.attention_plan(masks[0] if alike else None, fused=fused)
        longest = max(len(s.prompt.ids) + r.output_processor.limit for r, s in stream.rows.values())
        self._cache = self._own = self.model.new_cache(len(prompts), longest + SIZES[-1] + 1)

    def draft(self, counts: Mapping[int, int]) -> Tensor:
        """Return drafts `[R, K]`, int64. counts: how many for each row."""
        most, own = max(counts.values()), self._own is not None
        rows = {row: self._stream.rows[row] for row in counts}
        if self._own is not None:
            self._catch_up(self._own, rows)
        self._newest.copy_(self._stream._newest)
        self._tables = self._stream._tables
        with self._cache.appending(most + own):  # the last draft's keys and values, too, as it may be accepted
            for n in range(most + own):
                self._step(rows, {row: n < count + own for row, count in counts.items()}, n)
                self._drafts[:, n].copy_(self._rows.result(0)[0])
        if not own:
            self._drop(counts)
            self._cache.release(most)
        return self._drafts[:, :most]

    def _step(self, rows: Mapping[int, tuple[Request, TokenSequence]], goes_on: Mapping[int, bool], n: int) -> None:
        host = self._rows.inputs.fill()
        self._fill_state(host, rows, ahead=n)
        self._fill_leaders(host, rows)
        host["count"][:] = [goes_on.get(row, False) for row in self._stream.rows]
        self._rows.inputs.send()
        ids, positions, segments = self._newest_tokens(self._rows)
        count = self._rows.inputs.on_device["count"]

        def step() -> None:
            x, _ = self.runner.step(ids, count, positions, segments, self._plan, self._cache)
            self._sample(x, self._rows, self._kinds)

        key = () if self.runner.compile or not isinstance(self._cache, Cache) else (self._cache.slots_in_use,)
        self.recorded.run(("draft", *key), step, replays=self.runner.replays(self._plan), memory=self._cache.layers)

    def count(self, drafted: Mapping[int, int], new: Mapping[int, int]) -> None:
        """Drop what was not accepted. drafted: how many drafts each row had. new: how many tokens it got."""
        if self._own is not None:
            for row in drafted:
                self._held[row] += new[row]
            self._drop({row: count + 1 - new[row] for row, count in drafted.items()})
            self._release(self._own)

    def _drop(self, counts: Mapping[int, int]) -> None:
        dropped = [counts.get(row, 0) for row in self._stream.rows]
        self._cache.drop(to_device_async(torch.tensor(dropped, dtype=torch.int32), self.model.device))

    def _release(self, own: Cache) -> None:
        own.release(own.reserved - max(self._held.values()))

    def _catch_up(self, own: Cache, rows: Mapping[int, tuple[Request, TokenSequence]]) -> None:
        """Compute the tokens before each row's newest one that the cache lacks, such as the prompt."""
        missing = []
        for row in self._stream.rows:
            if row not in rows:
                missing.append(np.zeros((3, 0), np.int64))
                continue
            request, sequence = rows[row]
            missing.append(tokens_of(sequence.prompt, request.new_tokens)[:, self._held[row] : -1])
            self._held[row] += missing[-1].shape[1]
        if any(each.shape[1] for each in missing):
            for _ in prefill(self.runner, missing, self._plan, own):
                pass
            self._release(own)
