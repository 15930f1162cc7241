"""The layout of tokens in memory: slots in pages, and rows packed without their padding.

Dimensions: B rows, T tokens, N packed tokens, K key/value heads, S slots of a row, Sb blocks of them, P pages, D head
dim, E hidden size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.kv_cache import KV, as_bytes
from ..tokens import Tokens, take

BLOCK = 128  # slots and query rows per block of a BlockMask, and slots per page


class PageTable(NamedTuple):
    """The map from each row's blocks of slots to pages of a pool, and back.

    page_table: int32 `[B, Sb]`, the page of each block; a block without one has the last page, which takes padding.
    physical_to_logical: int32 `[B, P]`, the row's block that each page holds, -1 if it holds none.
    """

    page_table: Tensor
    physical_to_logical: Tensor

    def slot_of(self, row: Tensor, place: Tensor) -> Tensor:
        """Return the slot of a row that is stored at a place of the pool, negative if none is."""
        return take(self.physical_to_logical, row, place // BLOCK) * BLOCK + place % BLOCK

    def gather(self, pool: Tensor) -> Tensor:
        """Copy the slots of every row, `[B, K, S, D]`, from a pool `[1, K, P * 128, D]`; zeros for missing pages."""
        b, blocks = self.page_table.shape
        slots = torch.arange(blocks * BLOCK, device=pool.device).expand(b, -1)
        found = as_bytes(pool)[0][:, slot_mapping(self.page_table, slots)].transpose(0, 1)
        missing = (self.page_table == self.physical_to_logical.shape[1] - 1).repeat_interleave(BLOCK, dim=1)
        return found.masked_fill_(missing[:, None, :, None], 0).view(pool.dtype)  # padding may be NaN


def slot_mapping(page_table: Tensor, slots: Tensor) -> Tensor:
    """Return the places of slots `[B, T]` in the pool, int64 `[B, T]`; page_table: see `PageTable`."""
    return page_table.gather(1, slots.long() // BLOCK).long() * BLOCK + slots % BLOCK


class PackedRows(NamedTuple):
    """The packing of rows `[B, T]` into one row of N tokens, without most of the padding, for all but attention.

    token_indices: int64 `[N]`, the packed tokens among the B * T: the real ones, then padding if fewer than N.
    inverse_indices: int64 `[B, T]`, the place of each token among the N; arbitrary for padding.
    """

    token_indices: Tensor
    inverse_indices: Tensor

    @staticmethod
    def of(token_indices: Tensor, shape: tuple[int, int]) -> PackedRows:
        """Build the packing from `token_indices` and the shape `(B, T)` of the rows."""
        number = torch.arange(len(token_indices), device=token_indices.device)
        inverse = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=token_indices.device)
        return PackedRows(token_indices, inverse.scatter(0, token_indices, number).view(shape))

    def pack(self, x: Tensor) -> Tensor:
        """Pack `[B, T, ...]` into `[1, N, ...]`."""
        return x.flatten(0, 1)[self.token_indices][None]

    def unpack(self, x: Tensor) -> Tensor:
        """Unpack `[1, N, ...]` into `[B, T, ...]`; padding gets arbitrary values."""
        return x[0, self.inverse_indices]


def last_tokens(x: Tensor, lengths: Tensor | None, count: int) -> Tensor:
    """Return the last `count` real tokens of each row, `[B, T, E]` -> `[B, count, E]`."""
    b, t, e = x.shape
    end = torch.full((b,), t, device=x.device) if lengths is None else lengths
    kept = end[:, None] - count + torch.arange(count, device=x.device)
    return x.gather(1, kept.clamp(min=0)[:, :, None].expand(-1, -1, e))


class SlotCache(Protocol):
    """The interface of a cache, contiguous or paged, to a step.

    layers: each layer's keys and values. tokens: the attributes of the tokens in each row's slots. pages: the page
    table, None if slots are contiguous. token_indices: the packed tokens, see `PackedRows`; None if all are computed.
    """

    layers: list[KV]
    max_length: int
    token_indices: Tensor | None

    @property
    def length(self) -> Tensor: ...
    @property
    def tokens(self) -> Tokens: ...
    @property
    def pages(self) -> PageTable | None: ...
    def append(self, tokens: Tokens) -> Tensor: ...
    def drop(self, counts: Tensor) -> None: ...
