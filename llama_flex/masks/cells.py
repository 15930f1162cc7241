"""Evaluate a function of a query and a key token for every cell of a matrix, and count the blocks of a mask.

Dimensions: B batch, H heads, T query tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..tokens import Token, Tokens


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

    The function is called for one cell, as FlexAttention calls it, and vectorised by torch.vmap; a dimension that the
    result does not depend on has stride 0. heads: the heads to evaluate. rows, slots: the queries and keys to evaluate
    (default: all). scores: those of the cells; the function takes its cell's score first.
    """

    def cell(*at: Tensor) -> Tensor:
        *score, batch, head, row, slot = at
        return function(*score, Token(q, batch, head, row), Token(kv, batch, head, slot))

    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        cell = torch.vmap(cell, in_dims=dims if scores is None else (0, *dims))
    rows = arange(q.index.shape[1], q) if rows is None else rows
    slots = arange(kv.index.shape[1], kv) if slots is None else slots
    return cell(*([] if scores is None else [scores]), arange(len(q.index), q), heads, rows, slots)


class Sparsity(NamedTuple):
    """The number of full, partial and empty blocks of a mask. Empty ones cost nothing; full ones skip the predicate."""

    full: int
    partial: int
    empty: int

    @property
    def computed(self) -> float:
        """The fraction of blocks that attention computes."""
        return (self.full + self.partial) / sum(self)

    def __str__(self) -> str:
        return f"{self.full} full, {self.partial} partial, {self.empty} empty blocks: {self.computed:.1%} computed"
