"""A request under way: what was asked, what it has given, and its sequences of tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from .fusion import Ensemble, Prompt
from .masks import BLOCK
from .rules import Tokens
from .sampling import Sampling
from .streaming import Completion, Step, Steps
from .together import Rule

if TYPE_CHECKING:
    from .scheduler import Scheduler


class Text:
    """One text of a request: a prompt and what is generated after it."""

    def __init__(self, prompt: Prompt, tokens: np.ndarray, key: Hashable) -> None:
        """tokens: ids, positions and segments, `[3, N]`, of what there is so far. key: what else decides its keys and
        values; None if they are not to be shared."""
        self.prompt, self.tokens, self.key = prompt, tokens, key
        self.pages: list[int] = []
        self.start = 0  # how many of its tokens are in pages
        self.goal = tokens.shape[1]  # how many a prompt's steps compute; one less if the last is fed as new ones are
        self.seat = -1
        self._contents: list[bytes] = []  # what is in the pages before each, as far as it was asked

    def before(self, page: int) -> bytes:
        """What stands for all tokens before a page, each after those before it, and for `key`."""
        if not self._contents:
            self._contents.append(repr(self.key).encode())
        while page >= len(self._contents):
            block = np.ascontiguousarray(self.block(len(self._contents) - 1))
            self._contents.append(hashlib.sha256(self._contents[-1] + block.tobytes()).digest())
        return self._contents[page]

    def block(self, page: int, end: int | None = None) -> np.ndarray:
        """The tokens of a page, as far as there are any, or up to token `end`."""
        return self.tokens[:, page * BLOCK : min((page + 1) * BLOCK, end or self.tokens.shape[1])]


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
    maker: Steps = field(kw_only=True, repr=False)
    callback: Callable[[Step], object] | None = field(kw_only=True, repr=False)
    rule: Rule = field(kw_only=True, repr=False)
    scheduler: Scheduler = field(kw_only=True, repr=False)
    texts: list[Text] = field(default_factory=list, repr=False)
    asked: int = field(default=0, repr=False)  # how many tokens have been asked for; the last may not be read yet
    told: int = field(default=0, repr=False)  # how many steps have had their effect: end and callback
    pattern: int = field(default=0, repr=False)
    took: bool = field(default=False, repr=False)  # whether some of it was taken from pages that others computed
    alone: bool = field(default=False, repr=False)  # whether it takes nothing from others

    @property
    def completion(self) -> Completion:
        """What there is so far, in one."""
        whole = self.scheduler.engine.nothing()
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
        """The steps, as they come; the engine runs meanwhile, in a thread. Cancels the request if left early."""
        try:
            for n in itertools.count():
                while n >= len(self.steps) and not self.finished:
                    await self.scheduler.advance()
                if n >= len(self.steps):
                    break
                yield self.steps[n]
        finally:
            self.scheduler.cancel(self)
        if self.error is not None:
            raise self.error


def longest_of(prompts: Sequence[Prompt], limits: Sequence[int]) -> Tokens:
    """The attributes `[B, T]` of prompts with as many new tokens as each may get."""
    texts = [tokens_of(prompt, [0] * limit) for prompt, limit in zip(prompts, limits, strict=True)]
    padded = np.zeros((3, len(texts), max(text.shape[1] for text in texts)), np.int32)
    padded[0] = -1
    for row, text in enumerate(texts):
        padded[0, row, : text.shape[1]] = range(text.shape[1])
        padded[1:, row, : text.shape[1]] = text[1:]
    return Tokens(*torch.from_numpy(padded))


def tokens_of(prompt: Prompt, new: Sequence[int]) -> np.ndarray:
    """Ids, positions and segments, `[3, N]`, of a prompt and of what was generated after it."""
    after = prompt.generated_position or 0
    return np.array(
        [
            [*prompt.ids, *new],
            [*prompt.positions, *range(after, after + len(new))],
            [*prompt.segments, *itertools.repeat(prompt.generated_segment, len(new))],
        ],
        np.int64,
    )
