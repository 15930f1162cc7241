"""A paged KV cache: the keys and values of many sequences in one pool, allocated a block of slots at a time.

Masks and score functions see a row's slots numbered from 0, as in any cache; a page table says where each block lies in
memory. So whatever holds for a contiguous cache holds for a paged one.
Dimensions: B rows, T new tokens, K key/value heads, S slots of a row, Sb blocks of them, P pages, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ..cache import Cache
from ..config import Dimensions
from ..kernels.kv_cache import KVFormat, as_bytes
from ..masks.layout import BLOCK, PageTable, slot_mapping
from ..tokens import Tokens
from .block_manager import BlockManager
from .transfer import to_device_async


class PagedCache:
    """Keys, values and attributes of all sequences: pages of 128 slots, and a last page that takes padding.

    block_manager: the allocator of pages. layers: keys and values `[1, K, P * 128, D]` of each layer, the last page
    included.
    """

    def __init__(self, dims: Dimensions, pages: int, form: KVFormat) -> None:
        """Allocate the pool, keys and values in a form. Memory: `page_bytes` for each page and one more. Raises
        ValueError if a layer's keys are more than 2**31 numbers, which FlexAttention cannot address."""
        slots = (pages + 1) * BLOCK
        shape = (1, dims.num_kv_heads, slots, dims.head_dim)
        if pages > (most := self.most_pages(dims)):
            raise ValueError(f"{pages * BLOCK} slots are more than attention can address; ask for {most * BLOCK}")
        self.layers, device = form.new_layers(shape, dims.num_layers), form.device
        self.position = torch.zeros(slots, dtype=torch.int32, device=device)
        self.segment = torch.zeros(slots, dtype=torch.int32, device=device)
        self.block_manager = BlockManager(pages)

    def copy(self, pages: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages, `(from, to, tokens)` each, and zero the slots after those tokens, without synchronising."""
        source, target, count = to_device_async(torch.tensor(pages), self.position.device).unbind(1)
        rest = torch.arange(BLOCK, device=self.position.device) >= count[:, None]
        for blocks in self._blocks():
            blocks[:, target] = blocks[:, source].masked_fill_(rest[..., None], 0)
        for attribute in (self.position, self.segment):
            blocks = attribute.unflatten(0, (-1, BLOCK))
            blocks[target] = blocks[source]

    def clear(self, pages: Sequence[int]) -> None:
        """Zero pages, without synchronising; see `KVFormat.new_layers`."""
        at = to_device_async(torch.tensor(pages), self.position.device)
        for blocks in self._blocks():
            blocks.index_fill_(1, at, 0)

    def wipe(self, sequence: PagedSequence) -> None:
        """Zero the keys and values of a sequence's slots after its computed tokens, without synchronising."""
        first, rest = divmod(sequence.num_computed_tokens, BLOCK)
        if left := sequence.pages[first:]:
            self.copy([(page, page, 0 if n else rest) for n, page in enumerate(left)])

    def _blocks(self) -> Iterator[Tensor]:
        """Yield the keys and the values of each layer, split into pages: `[K, P, 128, D]`."""
        for held in itertools.chain.from_iterable((kv.k, kv.v) for kv in self.layers):
            yield as_bytes(held)[0].unflatten(1, (-1, BLOCK))

    @staticmethod
    def page_bytes(dims: Dimensions, dtype: torch.dtype) -> int:
        """Return the size of a page in bytes, over all layers. dtype: of keys and values."""
        return BLOCK * (dims.kv_numbers_per_token * dtype.itemsize + 2 * torch.int32.itemsize)

    @staticmethod
    def most_pages(dims: Dimensions) -> int:
        """Return the most pages for which offsets into a layer's keys fit in 32 bits."""
        return (2**31 - 1) // (dims.num_kv_heads * dims.head_dim * BLOCK) - 1


class PagedCacheView:
    """A paged cache as a step sees it: a row for each scheduled chunk of tokens, in the form of `layout.SlotCache`.

    A row's slots are in order of arrival. Several rows may belong to one sequence, and append to it one after the other
    in a single step: keys are stored before anything attends to them.
    """

    def __init__(
        self, cache: PagedCache, page_table: Tensor, start: Tensor, end: Tensor, token_indices: Tensor | None = None
    ) -> None:
        """page_table: see `PageTable`. start: int32 `[B]`, the index of a row's first new token. end: int32 `[B]`, how
        many tokens its sequence has after the step. token_indices: which tokens are computed, see `PackedRows`; None:
        all."""
        self.layers, self.length, self.token_indices = cache.layers, start, token_indices
        self.max_length = page_table.shape[1] * BLOCK
        self._cache, self._page_table, self._end = cache, page_table, end

    @property
    def pages(self) -> PageTable:
        """The page table of the rows."""
        b, blocks = self._page_table.shape
        count, device = len(self._cache.position) // BLOCK, self._page_table.device
        number = torch.arange(blocks, dtype=torch.int32, device=device).expand(b, -1)
        logical = torch.full((b, count), -1, dtype=torch.int32, device=device)
        logical = logical.scatter(1, self._page_table.long(), number)
        return PageTable(self._page_table, torch.where(torch.arange(count, device=device) < count - 1, logical, -1))

    @property
    def tokens(self) -> Tokens:
        """The attributes of the tokens in the slots, `[B, S]`."""
        slots = torch.arange(self.max_length, dtype=torch.int32, device=self._page_table.device)
        slots = slots.expand(len(self._page_table), -1)
        at = slot_mapping(self._page_table, slots)
        index = torch.where(slots < self._end[:, None], slots, -1)
        # Stale values, or those of padding, may be out of range for a table that a mask indexes by them.
        return Tokens(index, *(torch.where(index < 0, 0, x[at]) for x in (self._cache.position, self._cache.segment)))

    def append(self, tokens: Tokens) -> Tensor:
        """Store new tokens' attributes and return where they lie in the pool, `[B, T]`; padding goes to the last
        page."""
        column = torch.arange(tokens.index.shape[1], device=tokens.index.device)
        at = slot_mapping(self._page_table, tokens.index.clamp(min=0))
        at = torch.where(tokens.index >= 0, at, len(self._cache.position) - BLOCK + column % BLOCK)
        self._cache.position[at] = tokens.position
        self._cache.segment[at] = tokens.segment
        return at

    def drop(self, counts: Tensor) -> None:
        """Do nothing: the next step is given how many tokens its sequences have."""


class PagedSequence(Protocol):
    """The pages of a sequence, in order, and how many of its tokens are in them."""

    pages: list[int]
    num_computed_tokens: int


class PagedRows(PagedCacheView):
    """The pages of a few sequences as a cache of their own, a row each, which grows as a `Cache` does."""

    def __init__(self, cache: PagedCache, sequences: Sequence[PagedSequence], blocks: int) -> None:
        """blocks: the most blocks of slots of a sequence. Pages are added by whoever allocates them."""
        device = cache.position.device
        computed = torch.tensor([s.num_computed_tokens for s in sequences], dtype=torch.int32, device=device)
        unused = torch.full((len(sequences), blocks), cache.block_manager.num_pages, dtype=torch.int32, device=device)
        super().__init__(cache, unused, computed, computed)
        self._sequences, self._known = sequences, [0] * len(sequences)

    @property
    def largest_append(self) -> int:
        """The maximum number of tokens that one step can append."""
        return self.max_length

    def appending(self, count: int) -> AbstractContextManager[None]:
        """Read which pages the sequences have now, before appending to them."""
        for row, sequence in enumerate(self._sequences):
            if (known := self._known[row]) < len(sequence.pages):
                new = to_device_async(torch.tensor(sequence.pages[known:], dtype=torch.int32), self._page_table.device)
                self._page_table[row, known : len(sequence.pages)] = new
                self._known[row] = len(sequence.pages)
        return nullcontext()

    def append(self, tokens: Tokens) -> Tensor:
        """Store new tokens' attributes as `PagedCacheView.append` does, and count them."""
        at = super().append(tokens)
        self.length.add_((tokens.index >= 0).sum(1))
        return at

    def drop(self, counts: Tensor) -> None:
        """Forget the last `counts` `[B]` tokens of each row; tensor operations only."""
        self.length.sub_(counts)

    def wipe(self) -> None:
        """Zero the keys and values of slots after the sequences' computed tokens."""
        for sequence in self._sequences:
            self._cache.wipe(sequence)

    def release(self, count: int) -> None:
        """Do nothing: pages are counted by whoever allocates them."""


RowCache = Cache | PagedRows  # a cache with a row for each prompt
