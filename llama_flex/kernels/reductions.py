"""Reductions over the vocabulary, `[B, V]` -> `[B]`: the choice of kernel by device.

On a CPU a decoded token's logits are few: what takes time is to call operations, so one does the work of ten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu


def argmax(x: Tensor) -> Tensor:
    """Return the first index of the largest value."""
    if (found := cpu.summarise(x)) is not None:
        return found[:, 0].long()
    # Compiled for CUDA, a maximum and a minimum are split across many programs, where argmax of a single row runs in
    # one: 24 us per decoded token.
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), index, x.shape[-1] - 1).amin(-1)


def logsumexp(x: Tensor) -> Tensor:
    """Return log(sum(exp(x))), in x's dtype."""
    return x.logsumexp(-1) if (found := cpu.summarise(x)) is None else found[:, 1].to(x.dtype)


def all_finite(x: Tensor) -> Tensor:
    """Return whether all values are finite."""
    return x.abs().amax(-1).isfinite() if (found := cpu.summarise(x)) is None else found[:, 2] > 0
