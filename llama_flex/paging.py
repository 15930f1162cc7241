"""Pages: the keys and values of many sequences in one pool, a block of slots at a time.

To masks and score functions a row's slots are what they always are, numbered from 0; only where a block of them lies in
memory is looked up. So whatever holds for a cache holds for a paged one.
Dimensions: B rows, T new tokens, K key/value heads, S slots of a row, Sb blocks of them, P pages, D head dim.
"""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import LlamaConfig
from .masks import BLOCK, BlockLists
from .rules import Tokens


class Pages(NamedTuple):
    """Where the blocks of slots of each row lie, and back.

    of_block: int32 `[B, Sb]`, the page of each block; that of blocks without one is the last page, which takes padding.
    block_of: int32 `[B, P]`, which block of a row's slots a page holds, or -1 if none of that row's.
    """

    of_block: Tensor
    block_of: Tensor

    def listed(self, lists: BlockLists) -> BlockLists:
        """Lists of blocks of slots as lists of pages, with room for all pages, which FlexAttention asks for."""
        room = self.block_of.shape[1] - self.of_block.shape[1]

        def pages(blocks: Tensor) -> Tensor:
            table = self.of_block[:, None, None].expand(*blocks.shape[:3], -1)
            return torch.nn.functional.pad(table.gather(-1, blocks.long()), (0, max(room, 0)))

        full_idx = None if lists.full_idx is None else pages(lists.full_idx)
        return BlockLists(lists.partial_num, pages(lists.partial_idx), lists.full_num, full_idx)

    def in_order(self, pool: Tensor) -> Tensor:
        """The slots of every row, `[B, K, S, D]`, out of a pool `[1, K, P * 128, D]`."""
        b, blocks = self.of_block.shape
        slots = torch.arange(blocks * BLOCK, device=pool.device).expand(b, -1)
        found = pool[0][:, places(self.of_block, slots)].transpose(0, 1)
        nothing = (self.of_block == self.block_of.shape[1] - 1).repeat_interleave(BLOCK, dim=1)
        return found.masked_fill_(nothing[:, None, :, None], 0)  # for padding may be NaN


class Packed(NamedTuple):
    """Tokens of rows in one row, without most of the padding, as all but attention takes them; N of B * T.

    chosen: int64 `[N]`, which tokens of the rows: the real ones, and some padding if there are fewer than N. of_row:
    int64 `[B, T]`, where each is among the N; of padding anything.
    """

    chosen: Tensor
    of_row: Tensor

    @staticmethod
    def of(chosen: Tensor, shape: tuple[int, int]) -> Packed:
        """From `chosen` and the shape `(B, T)` of the rows."""
        number = torch.arange(len(chosen), device=chosen.device)
        of_row = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=chosen.device)
        return Packed(chosen, of_row.scatter(0, chosen, number).view(shape))

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to `[1, N, ...]`."""
        return x.flatten(0, 1)[self.chosen][None]

    def rows(self, x: Tensor) -> Tensor:
        """`[1, N, ...]` to `[B, T, ...]`; padding gets what is of another token."""
        return x[0, self.of_row]


def places(of_block: Tensor, slots: Tensor) -> Tensor:
    """Where slots `[B, T]` lie in the pool, int64 `[B, T]`; of_block: see `Pages`."""
    return of_block.gather(1, slots.long() // BLOCK).long() * BLOCK + slots % BLOCK


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's, on a device; does not wait."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class PagedCache:
    """Keys, values and attributes of all sequences: pages of 128 slots, and a last page that takes padding.

    pool: which pages are taken. layers: keys and values `[1, K, P * 128, D]` of each layer, the last page included.
    """

    def __init__(self, config: LlamaConfig, pages: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate. Memory: `page_bytes` for each page and one more. Raises ValueError for a pool whose keys are more
        than 2**31 numbers in a layer, which FlexAttention cannot address."""
        slots = (pages + 1) * BLOCK
        shape = (1, config.num_key_value_heads, slots, config.head_dim)
        if pages > (most := self.most_pages(config)):
            raise ValueError(f"{pages * BLOCK} slots are more than attention can address; ask for {most * BLOCK}")
        # Zeros, not empty: see `clear`.
        self.layers = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]
        self.position = torch.zeros(slots, dtype=torch.int32, device=device)
        self.segment = torch.zeros(slots, dtype=torch.int32, device=device)
        self.pool = Pool(pages)

    def copy(self, pages: Sequence[tuple[int, int, int]]) -> None:
        """Copy what is in some pages to others, `(from, to, tokens)` each, and clear the rest; does not wait."""
        source, target, count = sent(torch.tensor(pages), self.position.device).unbind(1)
        rest = torch.arange(BLOCK, device=self.position.device) >= count[:, None]
        for blocks in self._blocks():
            blocks[:, target] = blocks[:, source].masked_fill_(rest[..., None], 0)
        for attribute in (self.position, self.segment):
            blocks = attribute.unflatten(0, (-1, BLOCK))
            blocks[target] = blocks[source]

    def clear(self, pages: Sequence[int]) -> None:
        """Leave nothing of whom pages were before: a masked slot still takes part in products, and 0 * NaN is NaN. Does
        not wait."""
        at = sent(torch.tensor(pages), self.position.device)
        for blocks in self._blocks():
            blocks.index_fill_(1, at, 0)

    def _blocks(self) -> Iterator[Tensor]:
        """Keys and values of each layer by pages, `[K, P, 128, D]`."""
        for held in itertools.chain.from_iterable(self.layers):
            yield held[0].unflatten(1, (-1, BLOCK))

    @staticmethod
    def page_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
        """What a page takes in all layers."""
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return BLOCK * (numbers * dtype.itemsize + 2 * torch.int32.itemsize)

    @staticmethod
    def most_pages(config: LlamaConfig) -> int:
        """With how many pages the offsets within a layer's keys are still numbers of 32 bits."""
        return (2**31 - 1) // (config.num_key_value_heads * config.head_dim * BLOCK) - 1


class Rows:
    """What a step sees of a paged cache: a row each for some sequences, as the model takes a cache.

    In a row, slots are in the order of arrival. Several rows may be of one sequence, and append to it one after the
    other in a single step: keys are stored before anything attends to them.
    """

    mask = None  # a rolling cache has one

    def __init__(
        self, cache: PagedCache, of_block: Tensor, start: Tensor, end: Tensor, chosen: Tensor | None = None
    ) -> None:
        """of_block: see `Pages`. start: int32 `[B]`, the index of a row's first new token. end: int32 `[B]`, how many
        tokens its sequence has after the step. chosen: which tokens are computed, see `Packed`; None: all."""
        self.layers, self.length, self.chosen = cache.layers, start, chosen
        self.max_length = of_block.shape[1] * BLOCK
        self._cache, self._of_block, self._end = cache, of_block, end

    @property
    def pages(self) -> Pages:
        """Where the slots are."""
        b, blocks = self._of_block.shape
        count, device = len(self._cache.position) // BLOCK, self._of_block.device
        number = torch.arange(blocks, dtype=torch.int32, device=device).expand(b, -1)
        block_of = torch.full((b, count), -1, dtype=torch.int32, device=device)
        block_of = block_of.scatter(1, self._of_block.long(), number)
        return Pages(self._of_block, torch.where(torch.arange(count, device=device) < count - 1, block_of, -1))

    @property
    def tokens(self) -> Tokens:
        """The attributes of the tokens in the slots, `[B, S]`."""
        slots = torch.arange(self.max_length, dtype=torch.int32, device=self._of_block.device)
        slots = slots.expand(len(self._of_block), -1)
        at = places(self._of_block, slots)
        index = torch.where(slots < self._end[:, None], slots, -1)
        # What was there before, or in padding, is more than a table may have that a rule looks it up in.
        return Tokens(index, *(torch.where(index < 0, 0, x[at]) for x in (self._cache.position, self._cache.segment)))

    def append(self, tokens: Tokens) -> Tensor:
        """Where new tokens lie in the pool, `[B, T]`, their attributes recorded; padding goes to the last page."""
        column = torch.arange(tokens.index.shape[1], device=tokens.index.device)
        at = places(self._of_block, tokens.index.clamp(min=0))
        at = torch.where(tokens.index >= 0, at, len(self._cache.position) - BLOCK + column % BLOCK)
        self._cache.position[at] = tokens.position
        self._cache.segment[at] = tokens.segment
        return at


class Pool:
    """Which pages are taken, by how many rows, and what is known of what they hold, so that rows can share it.

    A page that nobody has any more, but of which something is known, is kept until it is needed: the longest unused
    first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.users = [0] * count
        self._free = list(range(count))[::-1]
        self._unused: OrderedDict[int, None] = OrderedDict()  # nobody's, but known; oldest first
        self._page_of: dict[bytes, int] = {}  # full pages by what they hold
        self._holds: dict[int, bytes] = {}
        self._after: dict[bytes, dict[int, np.ndarray]] = {}  # pages by what came before them, with their first tokens
        self._before: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """How many pages can be taken."""
        return len(self._free) + len(self._unused)

    def take(self) -> int:
        """A page for one row alone; there must be one."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            if page in self._holds:
                del self._page_of[self._holds.pop(page)]
            if page in self._before:
                before = self._before.pop(page)
                del self._after[before][page]
                if not self._after[before]:
                    del self._after[before]
        self.users[page] = 1
        return page

    def find(self, content: bytes) -> int | None:
        """The page with this content, with one user more; None if there is none."""
        page = self._page_of.get(content)
        if page is not None:
            self.users[page] += 1
            self._unused.pop(page, None)
        return page

    def find_beginning(self, before: bytes, tokens: np.ndarray) -> tuple[int, int]:
        """Of the newest few pages after `before` the one that begins most like tokens `[3, N]`, and with how many."""
        best = -1, 0
        for page, held in itertools.islice(reversed(self._after.get(before, {}).items()), 8):
            n = min(held.shape[1], tokens.shape[1])
            differs = (held[:, :n] != tokens[:, :n]).any(0)
            best = max(best, (page, int(differs.argmax()) if differs.any() else n), key=operator.itemgetter(1))
        return best

    def name(self, page: int, content: bytes) -> None:
        """Say what a full page holds. A page of the same content that is known already stays the known one."""
        if content not in self._page_of and page not in self._holds:
            self._page_of[content], self._holds[page] = page, content

    def begin(self, page: int, before: bytes, tokens: np.ndarray) -> None:
        """Say with which tokens `[3, N]` a page begins, and after what; it may be filled further."""
        self._before[page] = before
        self._after.setdefault(before, {})[page] = tokens

    def give_back(self, page: int) -> None:
        """One user less."""
        self.users[page] -= 1
        if not self.users[page]:
            if page in self._before or page in self._holds:
                self._unused[page] = None
            else:
                self._free.append(page)
