"""A request under way: its prompt and parameters, the steps it has given, and its sequences of tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from ..masks.layout import BLOCK
from ..sampling import Sampling
from ..tokens import Tokens
from .fusion import Ensemble, Prompt
from .output import Completion, OutputProcessor, Step
from .request_masks import AttentionSpec


class TokenSequence:
    """One sequence of a request: a prompt and the tokens generated after it."""

    def __init__(self, prompt: Prompt, tokens: np.ndarray, key: Hashable) -> None:
        """tokens: ids, positions and segments so far, `[3, N]`. key: what else its keys and values depend on; None if
        they are not to be shared."""
        self.prompt, self.tokens, self.key = prompt, tokens, key
        self.pages: list[int] = []
        self.num_computed_tokens = 0  # whose keys and values are in pages
        # How many tokens prefill steps compute; one less than all if the last is fed in a decoding step.
        self.prefill_target = tokens.shape[1]
        self.batch_slot = -1
        self._prefix_hashes: list[bytes] = []  # of what is before each page, as far as it was needed

    @property
    def num_tokens(self) -> int:
        """The number of tokens so far."""
        return self.tokens.shape[1]

    @property
    def is_prefilled(self) -> bool:
        """Whether its next token is computed in a decoding step."""
        return self.num_computed_tokens >= self.prefill_target

    def prefix_hash(self, page: int) -> bytes:
        """Return a hash of all tokens before a page, in their order, and of `key`."""
        hashes = self._prefix_hashes
        if not hashes:
            hashes.append(repr(self.key).encode())
        while page >= len(hashes):
            block = np.ascontiguousarray(self.block(len(hashes) - 1))
            hashes.append(hashlib.sha256(hashes[-1] + block.tobytes()).digest())
        return hashes[page]

    def block(self, page: int, end: int | None = None) -> np.ndarray:
        """Return the tokens of a page, as far as there are any, or up to token `end`."""
        return self.tokens[:, page * BLOCK : min((page + 1) * BLOCK, end or self.tokens.shape[1])]


class RequestOwner(Protocol):
    """The object that computes requests, as a request sees it."""

    def cancel(self, request: Request) -> None: ...
    async def advance(self) -> None: ...


@dataclass(eq=False)
class Request:
    """A prompt under way, and what it has given so far; what `Engine.submit` returns.

    steps: every token so far. finish_reason: "stop" (a stop token or string), "length", "cancelled", "error", or None
    while it waits or runs. error: what its callback raised, or a NonFiniteLogitsError. `async for step in request`
    gives steps as they come.
    """

    number: int
    sampling: Sampling
    priority: int
    steps: list[Step] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    ensemble: Ensemble = field(kw_only=True, repr=False)
    output_processor: OutputProcessor = field(kw_only=True, repr=False)
    callback: Callable[[Step], object] | None = field(kw_only=True, repr=False)
    spec: AttentionSpec = field(kw_only=True, repr=False)
    owner: RequestOwner = field(kw_only=True, repr=False)
    sequences: list[TokenSequence] = field(default_factory=list, repr=False)
    num_scheduled: int = field(
        default=0, repr=False
    )  # new tokens whose steps were enqueued; the last may not be read yet
    num_delivered: int = field(default=0, repr=False)  # steps that have had their effect: end and callback
    spec_number: int = field(default=0, repr=False)
    shared: bool = field(default=False, repr=False)  # whether some of it was taken from pages that others computed
    isolated: bool = field(default=False, repr=False)  # whether it takes nothing from others

    @property
    def completion(self) -> Completion:
        """All steps so far, in one."""
        whole = self.output_processor.empty_completion()
        for step in self.steps:
            whole.add(step)
        whole.finish_reason = self.finish_reason
        return whole

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def __lt__(self, other: Request) -> bool:
        return (-self.priority, self.number) < (-other.priority, other.number)

    async def __aiter__(self) -> AsyncIterator[Step]:
        """Iterate over the steps as they come; the engine runs meanwhile, in a thread. Cancels the request if left
        early."""
        try:
            for n in itertools.count():
                while n >= len(self.steps) and not self.finished:
                    await self.owner.advance()
                if n >= len(self.steps):
                    break
                yield self.steps[n]
        finally:
            self.owner.cancel(self)
        if self.error is not None:
            raise self.error


def longest_of(prompts: Sequence[Prompt], limits: Sequence[int]) -> Tokens:
    """Return the attributes `[B, T]` of prompts with as many new tokens as each may get."""
    sequences = [tokens_of(prompt, [0] * limit) for prompt, limit in zip(prompts, limits, strict=True)]
    padded = np.zeros((3, len(sequences), max(sequence.shape[1] for sequence in sequences)), np.int32)
    padded[0] = -1
    for row, sequence in enumerate(sequences):
        padded[0, row, : sequence.shape[1]] = range(sequence.shape[1])
        padded[1:, row, : sequence.shape[1]] = sequence[1:]
    return Tokens(*torch.from_numpy(padded))


def tokens_of(prompt: Prompt, new: Sequence[int]) -> np.ndarray:
    """Return ids, positions and segments, `[3, N]`, of a prompt and of what was generated after it."""
    after = prompt.generated_position or 0
    return np.array(
        [
            [*prompt.ids, *new],
            [*prompt.positions, *range(after, after + len(new))],
            [*prompt.segments, *itertools.repeat(prompt.generated_segment, len(new))],
        ],
        np.int64,
    )
