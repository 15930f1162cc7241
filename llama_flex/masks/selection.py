"""Choose tokens by their indices or by a function of their attributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..tokens import Tokens

# A choice of tokens: indices, [N] for all rows or [B, N], or a function from all tokens to booleans [B, T]; None: all.
Where: TypeAlias = Callable[[Tokens], Tensor] | Sequence[int] | Tensor | None


def selection(where: Callable[[Tokens], Tensor] | Sequence[int] | Tensor) -> Callable[[Tokens], Tensor]:
    """Return a function from tokens to booleans `[B, T]`, true for the chosen ones.

    Raises ValueError for invalid indices. The returned function raises it for a `where` that returns anything else.
    """
    if callable(where):

        def by_attributes(tokens: Tokens) -> Tensor:
            chosen, shape = where(tokens), tokens.index.shape
            if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != shape:
                found = f"{chosen.dtype} {list(chosen.shape)}" if isinstance(chosen, Tensor) else repr(chosen)
                raise ValueError(f"the function that selects tokens must return booleans {list(shape)}, not {found}")
            return chosen

        return by_attributes

    what = "tokens must be selected by indices from 0, integers [N] or [B, N], or by a function"
    try:
        which = torch.as_tensor(where if isinstance(where, Tensor) else list(where))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{what}, not {where!r}") from None
    which = which if which.numel() else which.long()  # an empty list becomes floats
    if which.dim() not in (1, 2) or which.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{what}, not {which.dtype} {list(which.shape)}")
    if which.numel() and int(which.min()) < 0:
        raise ValueError(f"{what}, not {int(which.min())}")

    def by_index(tokens: Tokens) -> Tensor:
        index, those = tokens.index, which.to(tokens.index.device)
        if those.dim() == 1:
            return torch.isin(index, those)
        if len(those) not in (1, len(index)):
            raise ValueError(f"tokens must be selected by indices [N] or [{len(index)}, N], not {list(those.shape)}")
        return (index[:, :, None] == those[:, None]).any(-1)

    return by_index
