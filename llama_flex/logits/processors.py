"""Rules that the host applies to a request's logits before the draw: n-grams, a grammar, a user's functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .grammar import Matcher, set_bits
from .parameters import LogitsProcessor


class RequestProcessors:
    """The rules of one request that depend on its tokens so far, with the state that follows those tokens.

    All is a function of the tokens: after a preemption, an interrupt or a restart the state is made again from them.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        ngram_size: int = 0,
        matcher: Matcher | None = None,
        functions: Sequence[LogitsProcessor] = (),
    ) -> None:
        self._prompt = list(prompt)
        self._ngrams = _Ngrams(ngram_size, prompt) if ngram_size else None
        self._matcher = matcher
        self.functions = functions

    def advance(self, new: list[int]) -> Any:
        """Return the grammar's state after the new tokens, for `fill_masks`; None without a grammar."""
        return self._matcher and self._matcher.advance(new)

    def complete(self, new: Sequence[int], bits: np.ndarray) -> None:
        """Complete the mask of the tokens that may follow: all of them, or what `fill_masks` has left. Raises
        ValueError as `Matcher.complete` does."""
        if self._matcher is not None:
            self._matcher.complete(bits)
        if self._ngrams is not None:
            set_bits(bits, self._ngrams.banned(new), False)

    def apply(self, new: Sequence[int], logits: Tensor) -> Tensor:
        """Return logits `[V]` after the functions. Raises ValueError if one returns anything but such logits."""
        for function in self.functions:
            found = function([*self._prompt, *new], logits)
            name = getattr(function, "__name__", type(function).__name__)
            if not isinstance(found, Tensor) or found.shape != logits.shape or not found.is_floating_point():
                what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"the logits processor {name} must return logits, floating point [{len(logits)}], not {what}"
                )
            logits = found.to(logits.device, logits.dtype)
        return logits


class _Ngrams:
    """The n-grams of a request's tokens: for each n - 1 tokens, those that followed."""

    def __init__(self, size: int, prompt: Sequence[int]) -> None:
        self._size, self._prompt = size, list(prompt)
        self._reset()

    def _reset(self) -> None:
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], list[int]] = {}

    def banned(self, new: Sequence[int]) -> list[int]:
        """Return the tokens that would repeat an n-gram."""
        ids, n = [*self._prompt, *new], self._size
        if self._ids != ids[: len(self._ids)]:
            self._reset()
        first = max(len(self._ids), n - 1)
        self._ids = ids
        for end in range(first, len(ids)):
            self._next.setdefault(tuple(ids[end - n + 1 : end]), []).append(ids[end])
        return self._next.get(tuple(ids[len(ids) - n + 1 :]), []) if len(ids) >= n - 1 else []


def apply_masks(logits: Tensor, bits: Tensor) -> Tensor:
    """Return logits `[R, V]` with -inf where a token's bit, see `fill_masks`, is not set."""
    return logits.masked_fill(~unpack_bits(bits)[:, : logits.shape[1]], -torch.inf)


def unpack_bits(bits: Tensor) -> Tensor:
    """Return bits, int32 `[R, N]`, as bool `[R, 32 * N]`."""
    each = bits[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bits.device)
    return (each & 1).bool().flatten(1)
