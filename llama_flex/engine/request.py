"""A submitted request: its prompt and parameters, its steps so far, and its token sequences."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ..adapters.adapters import Adapter
from ..cache import Cache
from ..interp.capture import Capture
from ..interp.edits import Edit
from ..logits.parameters import Sampling
from ..logits.processors import RequestProcessors
from ..masks.layout import BLOCK
from ..tokens import Tokens
from .drafting import Acceptance
from .fusion import Ensemble, Prompt
from .kinds import Kinds
from .output import Completion, OutputProcessor, Step
from .request_masks import AttentionSpec


class TokenSequence:
    """One sequence of a request: a prompt and the tokens generated after it."""

    def __init__(self, prompt: Prompt, tokens: np.ndarray, key: Hashable) -> None:
        """tokens: ids, positions and segments so far, `[3, N]`. key: all else that its keys and values depend on; None
        if they must not be shared."""
        self.prompt, self.tokens, self.key = prompt, tokens, key
        self.pages: list[int] = []
        self.num_computed_tokens = 0  # tokens whose keys and values are in pages
        # The number of tokens that prefill computes: all, or all but the last if a decode step feeds that.
        self.prefill_target = tokens.shape[1]
        self.batch_slot = -1
        self._prefix_hashes: list[bytes] = []  # of the tokens before each page, made on demand

    @property
    def num_tokens(self) -> int:
        """The number of tokens so far."""
        return self.tokens.shape[1]

    @property
    def is_prefilled(self) -> bool:
        """Whether prefill is done, so that its next token comes from a decode step."""
        return self.num_computed_tokens >= self.prefill_target

    def place(self, prompt: Prompt, new: Sequence[int]) -> None:
        """Replace its tokens by a prompt and the tokens generated after it."""
        self.prompt, self.tokens = prompt, tokens_of(prompt, new)
        self.prefill_target = self.num_tokens

    def prefix_hash(self, page: int) -> bytes:
        """Return a hash of `key` and of all tokens before a page, in order."""
        hashes = self._prefix_hashes
        if not hashes:
            hashes.append(repr(self.key).encode())
        while page >= len(hashes):
            block = np.ascontiguousarray(self.block(len(hashes) - 1))
            hashes.append(hashlib.sha256(hashes[-1] + block.tobytes()).digest())
        return hashes[page]

    def block(self, page: int, end: int | None = None) -> np.ndarray:
        """Return the tokens of a page, `[3, N]`, up to token `end` (default: the last token so far)."""
        return self.tokens[:, page * BLOCK : min((page + 1) * BLOCK, end or self.tokens.shape[1])]


class Start(NamedTuple):
    """The state a request began with: lengths and next positions of its cache's rows, and the number of steps from
    which each of its captures held tokens."""

    lengths: list[int]
    positions: list[int]
    capture_parts: list[int]


class RequestOwner(Protocol):
    """The interface that a request uses of the scheduler that computes it."""

    def cancel(self, request: Request) -> None: ...
    async def advance(self) -> None: ...


@dataclass(eq=False)
class Request:
    """A submitted prompt and its output so far, as returned by `Engine.submit`.

    steps: one per token so far. finish_reason: "stop" (a stop token or string), "length", "cancelled", "error", or None
    while it waits or runs. error: what its callback, edits, captures or logits processors raised, or a
    NonFiniteLogitsError. num_cached_tokens: how many of its tokens other requests had computed when it started, or
    started again. `async for step in request` yields steps as they come.
    """

    number: int
    sampling: Sampling
    priority: int = 0
    steps: list[Step] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    ensemble: Ensemble = field(kw_only=True, repr=False)
    output_processor: OutputProcessor = field(kw_only=True, repr=False)
    callback: Callable[[Step], object] | None = field(default=None, kw_only=True, repr=False)
    spec: AttentionSpec = field(kw_only=True, repr=False)
    owner: RequestOwner | None = field(default=None, kw_only=True, repr=False)
    captures: Sequence[Capture] = field(default=(), kw_only=True, repr=False)
    edits: Sequence[Edit] = field(default=(), kw_only=True, repr=False)
    cache: Cache | None = field(default=None, kw_only=True, repr=False)  # the caller's
    cached_ids: Sequence[int] = field(default=(), kw_only=True, repr=False)  # of the tokens in it
    processors: RequestProcessors | None = field(default=None, kw_only=True, repr=False)  # on the host
    adapter: Adapter | None = field(default=None, kw_only=True, repr=False)  # None: the bare model
    runs_alone: bool = field(default=False, kw_only=True, repr=False)  # in steps of its own, see `Stream`
    drafts: Acceptance = field(default_factory=Acceptance, init=False, repr=False)
    start: Start | None = field(default=None, init=False, repr=False)  # None until it has begun, if it runs alone
    sequences: list[TokenSequence] = field(default_factory=list, repr=False)
    num_scheduled: int = field(default=0, repr=False)  # new tokens enqueued; the last may not be read yet
    num_delivered: int = field(default=0, repr=False)  # steps whose finish_reason and callback were handled
    spec_number: int = field(default=0, repr=False)
    num_cached_tokens: int = field(default=0, repr=False)
    isolated: bool = field(default=False, repr=False)  # whether it must not use such pages
    _new_tokens: list[int] = field(default_factory=list, init=False, repr=False)

    @property
    def completion(self) -> Completion:
        """All steps so far as one completion."""
        whole = self.output_processor.empty_completion()
        for step in self.steps:
            whole.add(step)
        whole.finish_reason = self.finish_reason
        return whole

    @functools.cached_property
    def kinds(self) -> Kinds:
        """The kinds of sampling that it needs."""
        return Kinds.of(self.sampling, several=len(self.ensemble.prompts) > 1)

    @property
    def finished(self) -> bool:
        """Whether no more steps will come."""
        return self.finish_reason is not None

    def prepare(self, row: int = 0) -> None:
        """Place its sequences after the tokens of its cache, whose rows begin at `row`. If it was under way already,
        forget the cached and captured tokens that will be computed again; raise ValueError if that cache was changed.
        """
        cache, count, resumed = self.cache, len(self.sequences), self.start is not None
        if self.start is None:
            lengths = [0] * count if cache is None else cache.length.tolist()[row : row + count]
            positions = [0] * count if cache is None else cache.next_position.tolist()[row : row + count]
            self.start = Start(lengths, positions, [capture.num_parts for capture in self.captures])
        for sequence, position in zip(self.sequences, self.start.positions, strict=True):
            sequence.place(sequence.prompt.shifted(position), self.new_tokens)
        if not resumed:
            return
        ends = self.start.lengths
        if cache is not None:
            computed = [now - before for now, before in zip(cache.length.tolist(), self.start.lengths, strict=True)]
            if min(computed) < 0:
                raise ValueError(f"the cache of request {self.number} was changed before the request had finished")
            # A token whose successor was not read is computed again.
            computed = [min(n, sequence.num_tokens - 1) for n, sequence in zip(computed, self.sequences, strict=True)]
            ends = [n + before for n, before in zip(computed, self.start.lengths, strict=True)]
            after = torch.tensor(ends, device=cache.length.device)[:, None]
            cache.evict(lambda t: t.index >= after)
            for sequence, n in zip(self.sequences, computed, strict=True):
                sequence.num_computed_tokens = n
        for capture, parts in zip(self.captures, self.start.capture_parts, strict=True):
            capture.rewind(parts, ends)

    @property
    def ids(self) -> list[int]:
        """The ids of the text so far, as far as they were read: in its cache, in the first prompt, and new ones."""
        return [*self.cached_ids, *self.ensemble.prompts[0].ids, *self.new_tokens]

    @property
    def new_tokens(self) -> list[int]:
        """The tokens generated so far, as far as they were read; not to be changed."""
        known = self._new_tokens  # reading all steps again would take a millisecond for many requests
        if len(known) < len(self.steps):  # a new list: another thread may do the same
            known = self._new_tokens = [*known, *(step.token for step in self.steps[len(known) :])]
        return known

    def add(self, token: int, logprob: float, top_logprobs: list[tuple[int, float]] | None = None) -> Step:
        """Append a new token and return its step."""
        self.steps.append(self.output_processor.put(token, logprob, top_logprobs))
        return self.steps[-1]

    def __lt__(self, other: Request) -> bool:
        return (-self.priority, self.number) < (-other.priority, other.number)

    async def __aiter__(self) -> AsyncIterator[Step]:
        """Yield the steps as they come, while the engine runs in a thread. Cancels the request if the loop is left
        early."""
        owner = self.owner
        assert owner is not None
        try:
            for n in itertools.count():
                while n >= len(self.steps) and not self.finished:
                    await owner.advance()
                if n >= len(self.steps):
                    break
                yield self.steps[n]
        finally:
            owner.cancel(self)
        if self.error is not None:
            raise self.error


def longest_of(requests: Sequence[Ensemble], limits: Sequence[int], cache: Cache | None = None) -> Tokens:
    """Return the attributes `[B, T]` of requests' prompts, after the tokens of a cache, each followed by as many new
    tokens as it may get."""
    after = iter(itertools.repeat(0) if cache is None else cache.next_position.tolist())
    sequences = [
        tokens_of(prompt.shifted(next(after)), [0] * limit)
        for request, limit in zip(requests, limits, strict=True)
        for prompt in request.prompts
    ]
    padded = np.zeros((3, len(sequences), max(sequence.shape[1] for sequence in sequences)), np.int32)
    padded[0] = -1
    for row, sequence in enumerate(sequences):
        padded[0, row, : sequence.shape[1]] = range(sequence.shape[1])
        padded[1:, row, : sequence.shape[1]] = sequence[1:]
    tokens = Tokens(*torch.from_numpy(padded))
    if cache is None:
        return tokens
    return tokens._replace(index=torch.where(tokens.index < 0, -1, tokens.index + cache.length[:, None].cpu()))


def tokens_of(prompt: Prompt, new: Sequence[int]) -> np.ndarray:
    """Return ids, positions and segments, `[3, N]`, of a prompt and the tokens `new` generated after it."""
    after = prompt.generated_position or 0
    return np.array(
        [
            [*prompt.ids, *new],
            [*prompt.positions, *range(after, after + len(new))],
            [*prompt.segments, *itertools.repeat(prompt.generated_segment, len(new))],
        ],
        np.int64,
    )
