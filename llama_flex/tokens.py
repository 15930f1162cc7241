"""The attributes of tokens, and the functions over them that masks, score functions and edits are.

A token function knows nothing of caches, so it holds in the full forward, in chunks, in cached decoding, in ragged
batches, eager and compiled. Dimensions: B batch, H heads, T tokens (queries), S slots (keys).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .usercode.captured import CapturingFunction
from .usercode.errors import FunctionError, diagnose


class Tokens(NamedTuple):
    """The attributes of a batch of tokens, or of the tokens in a set of slots; each `[B, T]`, int32.

    index: place in the order of arrival in its sequence; -1 for padding and for a free slot.
    position: rotary position; parallel segments may share positions.
    segment: a small integer for documents, prompts, generated text; 0 unless set.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    position: Tensor
    segment: Tensor

    @classmethod
    def arriving(cls, count: int, *, batch: int = 1, segments: Tensor | None = None) -> Tokens:
        """Return `count` tokens in their order of arrival, as a forward without a cache sees them; on the CPU.

        segments: `[count]` or `[B, count]`, default 0.
        """
        index = torch.arange(count, dtype=torch.int32).expand(batch, -1)
        return cls(index, index, torch.zeros_like(index) if segments is None else segments.int().expand(batch, -1))

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply a function to each attribute."""
        return Tokens(*(function(x) for x in self))


class Token:
    """The attributes of one token as a token function sees them, each a tensor without dimensions."""

    __slots__ = ("_at", "_tokens", "batch", "head")

    def __init__(self, tokens: Tokens, batch: Tensor, head: Tensor, at: Tensor) -> None:
        self._tokens, self.batch, self.head, self._at = tokens, batch, head, at

    @property
    def index(self) -> Tensor:
        """Place in the order of arrival in its sequence."""
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
        """Call the function. Raises FunctionError, naming the fault and the line of code, for errors of torch and
        Python; the function's own exceptions pass through."""
        if torch.compiler.is_compiling():  # the compiler reports what it cannot trace
            return self.function(*args)
        try:
            return self.function(*args)
        except (ArithmeticError, AttributeError, LookupError, NameError, RuntimeError, TypeError) as error:
            raise FunctionError(self.described, *diagnose(error)) from error

    def check_scalar(self, answer: Tensor) -> Tensor:
        """Return an answer for one query and one key without dimensions; raise FunctionError for several numbers."""
        if answer.numel() != 1:
            fault = (
                f"it returned {list(answer.shape)} for one query and one key, not one value: use operations of single "
                "elements, and tables at an index, `table[kv.index]`"
            )
            raise FunctionError(self.described, "wrong-shape", fault)
        return answer.reshape(())


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name."""
    return str(getattr(function, "__name__", type(function).__name__))


def take(table: Tensor, *at: Tensor) -> Tensor:
    """Return `table[at]`, by the operator that a compiled step makes of `[]`; see `graphs.inductor`."""
    return torch.ops.aten.index(table, at)


def arange(n: int, like: Tokens) -> Tensor:
    """Return `0 .. n-1` on the device of `like`."""
    return torch.arange(n, device=like.index.device)


def each_cell(
    function: Callable[..., Tensor],
    q: Tokens,
    kv: Tokens,
    heads: Tensor,
    rows: Tensor | None = None,
    slots: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """Evaluate a function of a query and a key token for every cell, `[B, heads, rows, slots]`.

    The function is called for one cell, as FlexAttention calls it, and torch.vmap makes one computation of that; a
    dimension that the result does not depend on has stride 0. heads: which ones. rows, slots: which queries and keys
    (default all). scores: of those cells; the function takes its cell's score first.
    """

    def cell(*at: Tensor) -> Tensor:
        *score, batch, head, row, slot = at
        return function(*score, Token(q, batch, head, row), Token(kv, batch, head, slot))

    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        cell = torch.vmap(cell, in_dims=dims if scores is None else (0, *dims))
    rows = arange(q.index.shape[1], q) if rows is None else rows
    slots = arange(kv.index.shape[1], kv) if slots is None else slots
    return cell(*([] if scores is None else [scores]), arange(len(q.index), q), heads, rows, slots)


# A choice of tokens: indices, [N] for all rows or [B, N], or a function from all tokens to booleans [B, T]; None: all.
Where: TypeAlias = Callable[[Tokens], Tensor] | Sequence[int] | Tensor | None


def selection(where: Callable[[Tokens], Tensor] | Sequence[int] | Tensor) -> Callable[[Tokens], Tensor]:
    """Return a function from tokens to booleans `[B, T]`; it and this raise ValueError for what does not fit."""
    if callable(where):

        def by_attributes(tokens: Tokens) -> Tensor:
            chosen, shape = where(tokens), tokens.index.shape
            if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != shape:
                found = f"{chosen.dtype} {list(chosen.shape)}" if isinstance(chosen, Tensor) else repr(chosen)
                raise ValueError(f"the function that chooses tokens returned {found}, not booleans {list(shape)}")
            return chosen

        return by_attributes

    what = "tokens are chosen by indices from 0, integers [N] or [B, N], or by a function"
    try:
        which = torch.as_tensor(where if isinstance(where, Tensor) else list(where))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{what}, not {where!r}") from None
    which = which if which.numel() else which.long()  # an empty list comes as floats
    if which.dim() not in (1, 2) or which.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{what}, not {which.dtype} {list(which.shape)}")
    if which.numel() and int(which.min()) < 0:
        raise ValueError(f"{what}, not {int(which.min())}")

    def by_index(tokens: Tokens) -> Tensor:
        index, those = tokens.index, which.to(tokens.index.device)
        if those.dim() == 1:
            return torch.isin(index, those)
        if len(those) not in (1, len(index)):
            raise ValueError(f"tokens are chosen by indices [N] or [{len(index)}, N], not {list(those.shape)}")
        return (index[:, :, None] == those[:, None]).any(-1)

    return by_index
