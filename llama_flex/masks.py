"""Who may attend to whom: predicates over the attributes of tokens, and the block lists FlexAttention needs.

A mask is written once, over attributes, and knows nothing of caches: it holds in the full forward, in chunks, in cached
decoding, in ragged batches, eager and compiled. Dimensions: B batch, H heads, T query tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # slots and query rows per block of a BlockMask
# Cells of the mask evaluated at once when its blocks are classified; bounds the memory of a long forward.
_CELLS_AT_ONCE = 2**24


class Tokens(NamedTuple):
    """The attributes of a batch of tokens, or of the tokens lying in a set of slots; each `[B, T]`, int32.

    index: place in the order of arrival in its sequence; -1 for padding and for a free slot.
    position: rotary position; parallel segments may share positions.
    segment: a small integer for documents, prompts, generated text; 0 unless set.
    """

    index: Tensor
    position: Tensor
    segment: Tensor


class Token:
    """The attributes of one token as a predicate sees them: scalars in a kernel, broadcasting tensors when dense."""

    __slots__ = ("_at", "_tokens", "batch", "head")

    def __init__(self, tokens: Tokens, batch: Tensor, head: Tensor, at: Tensor) -> None:
        self._tokens, self.batch, self.head, self._at = tokens, batch, head, at

    @property
    def index(self) -> Tensor:
        """Place in the order of arrival in its sequence."""
        return self._tokens.index[self.batch, self._at]

    @property
    def position(self) -> Tensor:
        """Rotary position."""
        return self._tokens.position[self.batch, self._at]

    @property
    def segment(self) -> Tensor:
        """Segment number; 0 unless set."""
        return self._tokens.segment[self.batch, self._at]


Predicate: TypeAlias = Callable[[Token, Token], Tensor | bool]


class Mask:
    """A predicate `(q, kv) -> bool`: may query token q attend to key token kv?

    Both have `.batch .head .index .position .segment`. The predicate uses tensor operations only (`&`, `|`, `~`,
    comparisons, indexing of captured tensors); it may return a Python bool.
    """

    def __init__(self, predicate: Predicate, name: str | None = None) -> None:
        self.predicate = predicate
        self.name = name or getattr(predicate, "__name__", type(predicate).__name__)

    def __repr__(self) -> str:
        return self.name

    def _allows(self, q: Token, kv: Token) -> Tensor:
        occupied = kv.index >= 0
        return occupied & self.predicate(q, kv)

    def dense(self, q: Tokens, kv: Tokens, num_heads: int) -> Tensor:
        """The mask as booleans, `[B, 1 or H, T, S]`: H only if the predicate looks at heads."""
        return self._rows(q, kv, num_heads, 0, q.index.shape[1])

    def _rows(self, q: Tokens, kv: Tokens, num_heads: int, start: int, stop: int) -> Tensor:
        def along(dim: int, start: int, stop: int) -> Tensor:
            return torch.arange(start, stop, device=q.index.device).view([-1 if d == dim else 1 for d in range(4)])

        batch, head = along(0, 0, q.index.shape[0]), along(1, 0, num_heads)
        cells = self._allows(
            Token(q, batch, head, along(2, start, stop)), Token(kv, batch, head, along(3, 0, kv.index.shape[1]))
        )
        return cells.expand(batch.shape[0], -1, stop - start, -1)

    def block_mask(self, q: Tokens, kv: Tokens, num_heads: int) -> BlockMask:
        """The FlexAttention BlockMask of queries q against slots kv: exact lists of full and of partial blocks.

        Only tensor operations, so it can be part of a compiled step: no host synchronisation, no Python branch on a
        value, static shapes.
        """
        (b, t), s = q.index.shape, kv.index.shape[1]
        rows_at_once = max(1, _CELLS_AT_ONCE // (b * s * BLOCK)) * BLOCK
        parts = [
            _classify(self._rows(q, kv, num_heads, start, min(start + rows_at_once, t)))
            for start in range(0, t, rows_at_once)
        ]
        full, some = (torch.cat(kind, dim=2) for kind in zip(*parts, strict=True))
        partial_num, partial_idx = _list_blocks(some & ~full, at_least_one=True)
        full_num, full_idx = _list_blocks(full)

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self._allows(Token(q, b, h, q_idx), Token(kv, b, h, kv_idx))

        return BlockMask.from_kv_blocks(
            partial_num,
            partial_idx,
            full_num,
            full_idx,
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod,
            seq_lengths=(t, s),
            compute_q_blocks=False,  # only a backward pass needs them
        )


def _classify(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of `[B, H, T, S]` cells that are wholly, and at least partly, allowed: two of `[B, H, T/128, S/128]`.

    Query rows beyond T do not exist and cannot make a block partial; slots beyond S are not allowed.
    """
    b, h, t, s = cells.shape
    grid = (b, h, -1, BLOCK, -(-s // BLOCK), BLOCK)
    slots, rows = -s % BLOCK, -t % BLOCK
    some = torch.nn.functional.pad(cells, (0, slots, 0, rows), value=False)
    full = torch.nn.functional.pad(torch.nn.functional.pad(cells, (0, slots), value=False), (0, 0, 0, rows), value=True)
    return full.view(grid).all(5).all(3), some.view(grid).any(5).any(3)


def _list_blocks(listed: Tensor, *, at_least_one: bool = False) -> tuple[Tensor, Tensor]:
    """The number of listed blocks in each row and their indices, in order: int32 `[B, H, Tb]` and `[B, H, Tb, Sb]`.

    With `at_least_one`, a row without any lists its block 0 (which mask_mod then masks): a row with no block at all is
    NaN in the compiled CPU kernel.
    """
    num = listed.sum(-1, dtype=torch.int32)
    if at_least_one:
        num = num.clamp(min=1)
    order = torch.argsort(listed.to(torch.int8), dim=-1, descending=True, stable=True)
    return num, order.to(torch.int32)


def causal() -> Mask:
    """A token attends to itself and to the tokens that arrived before it."""
    return Mask(lambda q, kv: kv.index <= q.index, "causal()")
