"""The KV cache: a set of slots, each holding one token's keys and values for every layer, and its attributes.

A new token takes the first free slot of its row; a mask reads attributes and never knows which slot that was. So each
operation that frees slots (`truncate`, `evict`, a rolling window) or moves rows (`fork`, `expand`, `reorder`) is short.
Dimensions: B batch, K key/value heads, S slots, T new tokens, D head dim.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .config import Dimensions
from .kernels.kv_cache import KVFormat
from .masks.block_mask import first_true
from .masks.layout import BLOCK, PageTable
from .masks.library import sink, sliding_window
from .masks.mask import Mask
from .masks.selection import selection
from .tokens import Tokens
from .usercode.arguments import whole_number, whole_numbers


class Cache:
    """A KV cache of `max_length` slots per row, plus a spare block for the padding of ragged batches and chunks.

    The spare block always reads as free, so padding is written without a branch and never attended to.
    """

    pages: PageTable | None = None  # slots are contiguous in memory
    token_indices: Tensor | None = None  # all tokens of a step are computed

    def __init__(
        self,
        dims: Dimensions,
        batch_size: int,
        max_length: int,
        form: KVFormat,
        *,
        window: int | None = None,
        sinks: int = 0,
    ) -> None:
        """Allocate `batch_size` rows of up to `max_length` tokens (rounded up to whole blocks of 128).

        form: of keys and values. window, sinks: make the cache rolling; see `Llama.new_rolling_cache`.
        Memory: 2 * L * B * K * (S + 128) * D elements of its dtype. Raises ValueError for sizes below 1.
        """
        batch_size, max_length = whole_number("batch_size", batch_size), whole_number("max_length", max_length)
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"a cache needs at least one row and one slot, not {batch_size} x {max_length}")
        self.max_length = -(-max_length // BLOCK) * BLOCK
        slots = self.max_length + BLOCK
        shape = (batch_size, dims.num_kv_heads, slots, dims.head_dim)
        self.layers, device = form.new_layers(shape, dims.num_layers), form.device
        self.tokens = Tokens(
            *(torch.full((batch_size, slots), free, dtype=torch.int32, device=device) for free in (-1, 0, 0))
        )
        self.window, self.sinks = window, sinks
        self.mask: Mask | None = None if window is None else sliding_window(window) | sink(sinks)
        self.rolled_out = torch.zeros(batch_size, dtype=torch.int32, device=device)  # tokens before this index are gone
        self.reserved = 0  # upper bound of the slots taken in any row; kept on the host
        self.slots_in_use = BLOCK if window is None else self.max_length  # whole blocks; free after those; likewise
        self._rows: Tensor | None = None  # the row of `layers` behind each row of this cache; None: the same row
        self._sharers = weakref.WeakSet([self])  # the caches whose `layers` are the same tensors

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.tokens.index.shape[0]

    @property
    def length(self) -> Tensor:
        """The index of the next token in each row, int32 `[B]`; tokens that a rolling window has passed count too."""
        held = self.tokens.index.amax(1) + 1
        return held if self.window is None else torch.maximum(held, self.rolled_out)

    @property
    def next_position(self) -> Tensor:
        """The position of the next token in each row, int32 `[B]`: one past the highest position held, plus one for
        each later token that a rolling window has passed."""
        highest = torch.where(self.tokens.index < 0, -1, self.tokens.position).amax(1)
        return highest + self.length - self.tokens.index.amax(1)

    @property
    def room(self) -> int | None:
        """The number of tokens that every row still has room for; None for a rolling cache, which has no end."""
        return self.max_length - self.reserved if self.window is None else None

    @property
    def largest_append(self) -> int:
        """The maximum number of tokens that one step can append."""
        return self.max_length - (self.reserved if self.window is None else self.sinks + self.window - 1)

    @contextmanager
    def appending(self, count: int) -> Iterator[None]:
        """Reserve room for up to `count` more tokens in every row, to be computed in this context.

        If the context fails, restore the cache, except for tokens that a rolling window has passed. Counts on the host,
        without synchronisation. Raises ValueError if there are too few slots.
        """
        if count > self.largest_append:
            held = self.max_length - self.largest_append
            raise ValueError(
                f"the cache holds {self.max_length} tokens per sequence; {held} are taken and {count} more do not fit: "
                + ("make it with a larger max_length" if self.window is None else "append fewer at a time")
            )
        self._own_layers()
        before, done = self.length, False
        self.reserved += count if self.window is None else 0
        self.slots_in_use = max(self.slots_in_use, -(-self.reserved // BLOCK) * BLOCK)
        try:
            yield
            done = True
        finally:
            if not done:  # an error, or Ctrl-C: attributes may describe keys that were never written
                self._free(self.tokens.index >= before[:, None])
                self.reserved -= count if self.window is None else 0

    def append(self, tokens: Tokens) -> Tensor:
        """Assign slots to new tokens, record their attributes and return the slots `[B, T]`; tensor operations only.

        Padding (index -1, at the end of a row) goes to the spare block.
        """
        b, t = tokens.index.shape
        if self.window is not None:
            # The next query sees back to index length - window + 1.
            self.rolled_out.copy_(torch.maximum(self.rolled_out, self.length + 1 - self.window))
            index = self.tokens.index
            self._free((index >= self.sinks) & (index < self.rolled_out[:, None]))
        row = torch.arange(b, device=tokens.index.device)[:, None]
        column = torch.arange(t, device=tokens.index.device)
        slots = first_true(self.tokens.index[:, : self.max_length] < 0, t)
        slots = torch.where(tokens.index >= 0, slots, self.max_length + column % BLOCK)
        for held, new in zip(self.tokens, tokens, strict=True):
            held[row, slots] = new
        return slots

    def drop(self, counts: Tensor) -> None:
        """Forget the last `counts` `[B]` tokens of each row, such as rejected drafts; tensor operations only."""
        self._free(self.tokens.index >= (self.length - counts)[:, None])

    def wipe(self) -> None:
        """Zero the keys and values of free slots, which may not be finite: see `KVFormat.new_layers`."""
        free = (self.tokens.index < 0)[:, None, :, None]
        for kv in self.layers:
            kv.zero(free)

    def release(self, count: int) -> None:
        """Return room for `count` tokens that was reserved in every row, and is free again."""
        self.reserved -= count if self.window is None else 0

    def truncate(self, length: int) -> None:
        """Forget all tokens of every row from index `length` on.

        Raises ValueError for a negative length, and if a rolling cache has passed tokens that the next query would see.
        """
        length = min(whole_number("length", length), torch.iinfo(torch.int32).max)
        if length < 0:
            raise ValueError(f"cannot keep {length} tokens; the length must be at least 0")
        if self.window is not None:
            kept = self.length.clamp(max=length)
            first_seen = (kept + 1 - self.window).clamp(min=self.sinks)
            if bool((first_seen < torch.minimum(self.rolled_out, kept)).any()):
                raise ValueError(f"cannot truncate to {length} tokens: the rolling window has moved past them")
        self._forget(self.tokens.index >= length, self.rolled_out.clamp(max=length))

    def evict(self, tokens: Callable[[Tokens], Tensor] | Sequence[int] | Tensor) -> None:
        """Evict some tokens: free their slots, so that no later query attends to them; leave the others as they are.

        tokens: their indices, `[N]` for all rows or `[B, N]`; or a function from all tokens held to booleans `[B, S]`,
        such as `lambda t: t.segment == 2`. The remaining keys and values still reflect the evicted tokens.
        The next token gets the index after the highest remaining index, and the position after the highest remaining
        position; a row that has lost all of its tokens starts again at 0. A rolling cache that loses its newest tokens
        does not recover those that its window has passed.
        """
        chosen, index = selection(tokens)(self.tokens), self.tokens.index
        before, left = index.amax(1), index.masked_fill(chosen, -1).amax(1)
        self._forget(chosen, torch.where(left < before, self.rolled_out.minimum(left + 1), self.rolled_out))

    def fork(self) -> Cache:
        """Return an independent cache with the same tokens; keys and values are copied when either is next written."""
        new = copy.copy(self)
        new.tokens, new.rolled_out = self.tokens.map(torch.clone), self.rolled_out.clone()
        self._sharers.add(new)
        return new

    def expand(self, n: int) -> Cache:
        """Return a fork with each row repeated n times in succession, for many continuations of one prefix."""
        if (n := whole_number("n", n)) < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        new = self.fork()
        if n > 1:
            new._select(torch.arange(self.batch_size, device=self.rolled_out.device).repeat_interleave(n))
        return new

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Replace each row i by row `rows[i]`, as in beam search; a row may be taken more than once, or dropped.

        Raises ValueError unless `rows` has one number per row of the cache, each in range.
        """
        b = self.batch_size
        rows = rows if isinstance(rows, Tensor) else whole_numbers(f"reorder needs {b} row numbers", rows)
        rows = torch.as_tensor(rows, device=self.rolled_out.device)
        if rows.shape != (b,) or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"reorder needs {b} row numbers, found {rows.dtype} {list(rows.shape)}")
        if int(rows.min()) < 0 or int(rows.max()) >= b:
            raise ValueError(f"reorder: rows must be from 0 to {b - 1}, found {rows.tolist()}")
        self._select(rows.long())
        self._count()

    def _select(self, rows: Tensor) -> None:
        self.tokens = self.tokens.map(lambda x: x[rows])
        self.rolled_out = self.rolled_out[rows]
        self._rows = rows if self._rows is None else self._rows[rows]

    def _forget(self, chosen: Tensor, rolled_out: Tensor) -> None:
        self._free(chosen)
        self.rolled_out.copy_(rolled_out)  # in place: a recorded step works on this tensor
        self._count()

    def _count(self) -> None:
        if self.window is None:
            self.reserved = int((self.tokens.index >= 0).sum(1).max())

    def _own_layers(self) -> None:
        """Copy `layers` before a write, if other caches share them or rows were moved."""
        rows, shared = self._rows, len(self._sharers) > 1
        if rows is None and not shared:
            return
        self.layers, self._rows = [kv.copy(rows) for kv in self.layers], None
        self._sharers.discard(self)
        self._sharers = weakref.WeakSet([self])

    def _free(self, chosen: Tensor) -> None:
        self.tokens.index.masked_fill_(chosen, -1)
