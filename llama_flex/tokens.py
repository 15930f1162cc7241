"""The attributes of tokens, and the functions of them: masks, score functions and edits.

A token function knows nothing of caches, so it means the same in a full forward, in chunks, in cached decoding and in
ragged batches, eager or compiled. Dimensions: B batch, H heads, T tokens (queries), S slots (keys).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .usercode.captured import CapturingFunction, name_of
from .usercode.errors import FunctionError, diagnose


class Tokens(NamedTuple):
    """The attributes of a batch of tokens, or of the tokens in a set of slots; each `[B, T]`, int32.

    index: order of arrival within the sequence, from 0; -1 for padding and free slots.
    position: rotary position; parallel segments may share positions.
    segment: a small integer that tells documents, prompts and generated text apart; 0 unless set.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which is not needed
    position: Tensor
    segment: Tensor

    @classmethod
    def arriving(cls, count: int, *, batch: int = 1, segments: Tensor | None = None) -> Tokens:
        """Return `count` tokens in order of arrival, as in a forward without a cache; on the CPU.

        segments: `[count]` or `[B, count]`, default 0.
        """
        index = torch.arange(count, dtype=torch.int32).expand(batch, -1)
        return cls(index, index, torch.zeros_like(index) if segments is None else segments.int().expand(batch, -1))

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply a function to each attribute."""
        return Tokens(*(function(x) for x in self))


class Token:
    """The attributes of one token as a token function sees them, each a scalar tensor."""

    __slots__ = ("_at", "_tokens", "batch", "head")

    def __init__(self, tokens: Tokens, batch: Tensor, head: Tensor, at: Tensor) -> None:
        self._tokens, self.batch, self.head, self._at = tokens, batch, head, at

    @property
    def index(self) -> Tensor:
        """Order of arrival within the sequence."""
        return take(self._tokens.index, self.batch, self._at)

    @property
    def position(self) -> Tensor:
        """Rotary position."""
        return take(self._tokens.position, self.batch, self._at)

    @property
    def segment(self) -> Tensor:
        """Segment number; 0 unless set."""
        return take(self._tokens.segment, self.batch, self._at)


class TokenFunction(CapturingFunction):
    """A named function of a query token and a key token, with the tensors that it captures."""

    kind = "function"  # in messages

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        if not callable(function):
            raise ValueError(f"{type(self).__name__} needs a function of a query and a key token, found {function!r}")
        self.function = function
        self.name: str = name or name_of(function)

    def __repr__(self) -> str:
        return self.name

    @property
    def described(self) -> str:
        """The kind and the name, for messages."""
        return f"{self.kind} {self.name}"

    def call(self, *args: Any) -> Any:
        """Call the function. Raises FunctionError, naming the fault and the line of code, for the exceptions that torch
        and Python operations raise; all others pass through."""
        if torch.compiler.is_dynamo_compiling():  # the compiler reports what it cannot trace
            return self.function(*args)
        try:
            return self.function(*args)
        except (ArithmeticError, AttributeError, LookupError, NameError, RuntimeError, TypeError) as error:
            raise FunctionError(self.described, *diagnose(error)) from error


def take(table: Tensor, *at: Tensor) -> Tensor:
    """Return `table[at]` through the plain index operator, as compiled steps do for `[]`; see `graphs.inductor`."""
    return torch.ops.aten.index(table, at)
