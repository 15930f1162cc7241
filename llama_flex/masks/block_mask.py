"""Turn a predicate over tokens into the block lists that FlexAttention needs.

Dimensions: B batch, H heads, T query tokens, S slots; Tb, Sb blocks of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..tokens import Token, Tokens
from .cells import arange, each_cell
from .layout import BLOCK, PageTable

# Cells of the mask evaluated at once when its blocks are classified; bounds the memory of a long forward.
_CELLS_AT_ONCE = 2**24

Predicate: TypeAlias = Callable[[Token, Token], Tensor]  # of one query and one key: a scalar boolean


class BlockLists(NamedTuple):
    """The blocks that FlexAttention computes, under the names that its BlockMask uses.

    kv_num_blocks int32 `[B, 1 or H, Tb]`, kv_indices int32 `[B, 1 or H, Tb, Sb]`: the number of partial blocks in each
    row of blocks, whose cells need the predicate, and their columns. full_kv_*: the same for full blocks; None if they
    are listed as partial ones. *q_*: the same for each column of blocks, for the backward pass.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    q_num_blocks: Tensor | None = None
    q_indices: Tensor | None = None
    full_q_num_blocks: Tensor | None = None
    full_q_indices: Tensor | None = None


def evaluate_cells(
    allows: Predicate, q: Tokens, kv: Tokens, num_heads: int, rows: Tensor | None = None, slots: Tensor | None = None
) -> Tensor:
    """Evaluate a predicate for queries q and slots kv: booleans `[B, 1 or H, T, S]`, H only if it depends on heads."""
    cells = each_cell(allows, q, kv, arange(num_heads, q), rows, slots)
    return cells if cells.stride(1) else cells[:, :1]


def classify_blocks(allows: Predicate, q: Tokens, kv: Tokens, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return which blocks of queries and slots are full, and which are not empty: both `[B, 1 or H, Tb, Sb]`.

    Padding among the queries does not keep a block from being full: its output is never read.
    """
    (b, t), s = q.index.shape, kv.index.shape[1]
    rows_per_block = min(t, BLOCK)  # a decode step has one row, and evaluates one
    # Pad the last block by repeating its last real row or slot, which changes neither `any` nor `all`.
    rows = arange(-(-t // rows_per_block) * rows_per_block, q).clamp(max=t - 1)
    slots = arange(-(-s // BLOCK) * BLOCK, q).clamp(max=s - 1)
    whole = arange(len(slots) // BLOCK, q) < s // BLOCK  # an incomplete block is never full: its bounds are checked
    kinds = []
    at_once = max(1, _CELLS_AT_ONCE // (b * len(slots) * rows_per_block)) * rows_per_block
    # Compiled, cells are never materialised.
    for part in [rows] if torch.compiler.is_dynamo_compiling() else rows.split(at_once):
        cells = evaluate_cells(allows, q, kv, num_heads, part, slots)
        blocks = cells.reshape(*cells.shape[:2], -1, rows_per_block, len(slots) // BLOCK, BLOCK)
        padding = (q.index[:, part] < 0).reshape(len(q.index), 1, -1, rows_per_block, 1)
        some = blocks.any(5).any(3)
        kinds.append(((blocks.all(5) | padding).all(3) & whole & some, some))
    full, some = (torch.cat(kind, dim=2) for kind in zip(*kinds, strict=True))
    return full, some


def list_blocks(allows: Predicate, q: Tokens, kv: Tokens, num_heads: int, together: bool = False) -> BlockLists:
    """List exactly the non-empty blocks of queries q against slots kv. If `together`, list full blocks as partial ones.

    Tensor operations only, so that it can be part of a compiled step: no host synchronisation, no Python branch on a
    tensor's value, static shapes.
    """
    full, some = classify_blocks(allows, q, kv, num_heads)
    kv_num_blocks, kv_indices = _indices(some if together else some & ~full)
    # The compiled CPU kernel returns NaN for a row of blocks that lists none, so list one and let mask_mod mask it
    # (`attention.build_attention_metadata` undoes this for rows of padding). Not in a row with full blocks: a block in
    # both lists would count twice.
    kv_num_blocks = kv_num_blocks.masked_fill(~some.any(-1), 1)
    if together:
        return BlockLists(kv_num_blocks, kv_indices, None, None)
    lists = BlockLists(kv_num_blocks, kv_indices, *_indices(full))
    if not (torch.is_grad_enabled() and full.is_cuda):
        return lists
    by_slots = (_indices(x.transpose(-1, -2)) for x in (some & ~full, full))
    return BlockLists(*lists[:4], *itertools.chain(*by_slots))


def list_pages(lists: BlockLists, pages: PageTable) -> BlockLists:
    """Turn lists of blocks of slots into lists of pages, with room for all pages, as FlexAttention requires."""
    room = pages.physical_to_logical.shape[1] - pages.page_table.shape[1]

    def of_blocks(blocks: Tensor) -> Tensor:
        table = pages.page_table[:, None, None].expand(*blocks.shape[:3], -1)
        return torch.nn.functional.pad(table.gather(-1, blocks.long()), (0, max(room, 0)))

    full = None if lists.full_kv_indices is None else of_blocks(lists.full_kv_indices)
    return BlockLists(lists.kv_num_blocks, of_blocks(lists.kv_indices), lists.full_kv_num_blocks, full)


def make_block_mask(
    allows: Predicate, q: Tokens, kv: Tokens, lists: BlockLists, pages: PageTable | None = None
) -> BlockMask:
    """Build FlexAttention's BlockMask for queries q against slots kv from block lists. pages: the page table, None if
    slots are contiguous; with one, the lists are of pages."""
    length = kv.index.shape[1] if pages is None else pages.physical_to_logical.shape[1] * BLOCK

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if pages is None:
            return allows(Token(q, b, h, q_idx), Token(kv, b, h, kv_idx))
        slot = pages.slot_of(b, kv_idx)
        return (slot >= 0) & allows(Token(q, b, h, q_idx), Token(kv, b, h, slot.clamp(min=0)))

    return BlockMask((q.index.shape[1], length), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)


def _indices(listed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of listed blocks in each row and their indices: int32 `[B, H, Tb]` and `[B, H, Tb, Sb]`."""
    return listed.sum(-1, dtype=torch.int32), first_true(listed, listed.shape[-1]).to(torch.int32)


def first_true(flags: Tensor, count: int) -> Tensor:
    """Return the indices of the first `count` true flags along the last dimension, zero-padded: `[..., count]`."""
    size = flags.shape[-1]
    index = torch.arange(size, device=flags.device).expand(flags.shape)
    if count == 1:  # decoding: a reduction is 10 us faster on a GPU
        first = torch.where(flags, index, size).amin(-1, keepdim=True)
        return first.masked_fill(first == size, 0)
    rank = torch.where(flags, flags.cumsum(-1) - 1, count).clamp(max=count)  # count: cut off below
    return index.new_zeros(*flags.shape[:-1], count + 1).scatter(-1, rank, index)[..., :count]
