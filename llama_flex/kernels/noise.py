"""Random numbers that are a function of (seed, step, token id) alone, the same on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel(seed: Tensor, step: Tensor, size: int) -> Tensor:
    """Return standard Gumbel noise `[B, size]`, float32, from counters."""
    stream = _mix(_mix(seed) + step)[:, None]
    bits = _mix(stream + torch.arange(size, device=seed.device)) & 0xFFFFFFFF
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)  # float32 would round up to 1: noise -inf
    # -log1p(-u) is exponential, and exact where it is small, which is where the largest noise comes from.
    return -(-torch.log1p(-uniform)).log()


def _mix(x: Tensor) -> Tensor:
    """Mix int64 by the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014); they wrap around like uint64."""
    x = x + signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
