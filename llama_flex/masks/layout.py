"""How tokens lie in memory: slots in pages, and rows without their padding.

Dimensions: B rows, T tokens, N packed tokens, K key/value heads, S slots of a row, Sb blocks of them, P pages, D head
dim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..tokens import Tokens, take

BLOCK = 128  # slots and query rows per block of a BlockMask, and slots per page


class PageTable(NamedTuple):
    """The map from each row's blocks of slots to pages of a pool, and back.

    page_table: int32 `[B, Sb]`, the page of each block; blocks without one have the last page, which takes padding.
    physical_to_logical: int32 `[B, P]`, the block of a row's slots that a page holds, -1 if it holds none.
    """

    page_table: Tensor
    physical_to_logical: Tensor

    def slot_of(self, row: Tensor, place: Tensor) -> Tensor:
        """Return the slot of a row that lies at a place of the pool, negative if none does."""
        return take(self.physical_to_logical, row, place // BLOCK) * BLOCK + place % BLOCK

    def gather(self, pool: Tensor) -> Tensor:
        """Copy the slots of every row, `[B, K, S, D]`, out of a pool `[1, K, P * 128, D]`; zeros where no page is."""
        b, blocks = self.page_table.shape
        slots = torch.arange(blocks * BLOCK, device=pool.device).expand(b, -1)
        found = pool[0][:, slot_mapping(self.page_table, slots)].transpose(0, 1)
        missing = (self.page_table == self.physical_to_logical.shape[1] - 1).repeat_interleave(BLOCK, dim=1)
        return found.masked_fill_(missing[:, None, :, None], 0)  # padding may be NaN


def slot_mapping(page_table: Tensor, slots: Tensor) -> Tensor:
    """Return where slots `[B, T]` lie in the pool, int64 `[B, T]`; page_table: see `PageTable`."""
    return page_table.gather(1, slots.long() // BLOCK).long() * BLOCK + slots % BLOCK


class PackedRows(NamedTuple):
    """Tokens of rows in one row, without most of the padding, as all but attention takes them; N of B * T.

    token_indices: int64 `[N]`, which tokens of the rows: the real ones, and padding if there are fewer than N.
    inverse_indices: int64 `[B, T]`, where each is among the N; arbitrary for padding.
    """

    token_indices: Tensor
    inverse_indices: Tensor

    @staticmethod
    def of(token_indices: Tensor, shape: tuple[int, int]) -> PackedRows:
        """Make one of `token_indices` and the shape `(B, T)` of the rows."""
        number = torch.arange(len(token_indices), device=token_indices.device)
        inverse = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=token_indices.device)
        return PackedRows(token_indices, inverse.scatter(0, token_indices, number).view(shape))

    def pack(self, x: Tensor) -> Tensor:
        """Pack `[B, T, ...]` into `[1, N, ...]`."""
        return x.flatten(0, 1)[self.token_indices][None]

    def unpack(self, x: Tensor) -> Tensor:
        """Lay `[1, N, ...]` out as `[B, T, ...]`. Padding positions hold arbitrary values."""
        return x[0, self.inverse_indices]


class SlotCache(Protocol):
    """The interface of a cache, contiguous or paged, to a step.

    layers: each layer's keys and values. tokens: the attributes of what the slots of a row hold. pages: where the slots
    lie, if not in their order. token_indices: of packed tokens, see `PackedRows`.
    """

    layers: list[tuple[Tensor, Tensor]]
    max_length: int
    token_indices: Tensor | None

    @property
    def length(self) -> Tensor: ...
    @property
    def tokens(self) -> Tokens: ...
    @property
    def pages(self) -> PageTable | None: ...
    def append(self, tokens: Tokens) -> Tensor: ...
