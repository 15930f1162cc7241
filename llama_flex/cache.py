"""The KV cache: a set of slots, each holding one token's keys and values for every layer, and its attributes.

Dimensions: B batch, K key/value heads, S slots, T new tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .config import LlamaConfig
from .masks import BLOCK, Tokens


class Cache:
    """Contiguous slots: the token with index i of each row lies in slot i.

    A last block of slots takes the padding of ragged batches and chunks; it always reads as free, so padding is written
    without a branch and never attended to.
    """

    def __init__(
        self, config: LlamaConfig, batch_size: int, max_length: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Allocate for `batch_size` rows of up to `max_length` tokens (rounded up to whole blocks of 128).

        Memory: 2 * L * B * K * (S + 128) * D elements of `dtype`. Raises ValueError for sizes below 1.
        """
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"a cache needs at least one row and one slot, not {batch_size} x {max_length}")
        self.max_length = -(-max_length // BLOCK) * BLOCK
        slots = self.max_length + BLOCK
        shape = (batch_size, config.num_key_value_heads, slots, config.head_dim)
        # Zeros, not empty: a masked slot still takes part in products, and 0 * NaN is NaN.
        self.layers = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]
        self.tokens = Tokens(
            *(torch.full((batch_size, slots), free, dtype=torch.int32, device=device) for free in (-1, 0, 0))
        )
        self.length = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.reserved = 0  # tokens in the fullest row at most; kept on the host

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.length.shape[0]

    def reserve(self, count: int) -> None:
        """Claim room for up to `count` more tokens in every row; on the host, so it costs no synchronisation.

        Raises ValueError if the slots do not suffice.
        """
        if self.reserved + count > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens per sequence; {self.reserved} are taken and {count} more "
                "do not fit: make it with a larger max_length"
            )
        self.reserved += count

    @contextmanager
    def appending(self, count: int) -> Iterator[None]:
        """Reserve for `count` tokens that are computed in this context; if that fails, the cache is as it was."""
        self.reserve(count)
        before, done = self.length.clone(), False
        try:
            yield
            done = True
        finally:
            if not done:  # an error, or Ctrl-C: attributes may stand for keys that were never written
                self._forget_from(before[:, None])
                self.length.copy_(before)
                self.reserved -= count

    def append(self, tokens: Tokens) -> Tensor:
        """Give slots `[B, T]` to new tokens and record their attributes. Padding (index -1) goes to the spare block."""
        b, t = tokens.index.shape
        row = torch.arange(b, device=self.length.device)[:, None]
        column = torch.arange(t, device=self.length.device)
        real = tokens.index >= 0
        slots = torch.where(real, tokens.index, self.max_length + column % BLOCK)
        for held, new in zip(self.tokens, tokens, strict=True):
            held[row, slots] = new
        self.length += real.sum(1, dtype=torch.int32)
        return slots

    def truncate(self, length: int) -> None:
        """Forget all tokens of every row from index `length` on. Raises ValueError for a negative length."""
        if length < 0:
            raise ValueError(f"cannot keep {length} tokens; give 0 or more")
        self._forget_from(length)
        self.length.clamp_(max=length)
        self.reserved = min(self.reserved, length)

    def _forget_from(self, first: int | Tensor) -> None:
        """Free the slots of tokens with index `first` (one for all, or `[B, 1]`) and later."""
        self.tokens.index.masked_fill_(self.tokens.index >= first, -1)


def store(kv: tuple[Tensor, Tensor], slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write k and v `[B, K, T, D]` of new tokens into slots `[B, T]` of one layer's kv, in place; returns kv."""
    row = torch.arange(slots.shape[0], device=slots.device)[:, None]
    for held, new in zip(kv, (k, v), strict=True):
        held[row, :, slots] = new.transpose(1, 2)  # the index dimensions come first: [B, T, K, D]
    return kv
