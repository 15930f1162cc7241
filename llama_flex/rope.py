"""Rotary position embedding: inverse frequencies for every scaling type, and their application.

Su et al., "RoFormer" (arXiv:2104.09864), in the half-split layout of Hugging Face checkpoints: dimension d is paired
with d + D/2, not with its neighbour. Dimensions: B batch, H heads, T tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .checkpoint.rope_parameters import RopeParameters
from .tokens import Tokens

Rotary: TypeAlias = tuple[Tensor, Tensor]  # cosine and sine, each [B, 1, T, D/2]


class RotaryEmbedding(nn.Module):
    """Rotations of tokens by their positions. Frequencies stay float32 or wider whatever the model's dtype."""

    inv_freq: Tensor  # [D/2]

    def __init__(self, parameters: RopeParameters, head_dim: int, context: int) -> None:
        super().__init__()
        self.rope, self.head_dim, self.context = parameters, head_dim, context
        self.limit = parameters.limit(context)
        self.register_buffer("inv_freq", torch.empty(head_dim // 2), persistent=False)
        self._make_inv_freq()

    def forward(self, tokens: Tokens) -> Rotary:
        """Return cosine and sine `[B, 1, T, D/2]` for the positions of tokens `[B, T]`.

        Where the length of a sequence matters it is that of the tokens given.
        """
        inv_freq = self.inv_freq
        if self.limit is not None:
            length = torch.where(tokens.index < 0, 0, tokens.position + 1).amax(1)
            longer = inverse_frequencies(
                self.rope, self.head_dim, context=self.context, length=length, dtype=inv_freq.dtype
            )
            inv_freq = torch.where(length[:, None] > self.limit, longer, inv_freq)[:, None, None]
        cos, sin = cos_sin(tokens.position, inv_freq)
        scale = attention_scale(self.rope)
        return cos * scale, sin * scale

    def _make_inv_freq(self) -> None:
        # Computed on the CPU, where the reference computes it: one unit in the last place of a frequency is a visible
        # angle at position 100,000.
        dtype = torch.promote_types(torch.float32, self.inv_freq.dtype)
        inv_freq = inverse_frequencies(self.rope, self.head_dim, context=self.context, dtype=dtype)
        self.inv_freq = inv_freq.to(self.inv_freq.device)

    def _apply(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        # model.bfloat16() casts buffers too; frequencies in bfloat16 would be wrong.
        super()._apply(*args, **kwargs)
        self._make_inv_freq()
        return self


def cos_sin(position: Tensor, inv_freq: Tensor) -> Rotary:
    """Return cosine and sine of every angle: position `[B, T]` and inv_freq `[D/2]` or `[B, 1, 1, D/2]` -> two of
    `[B, 1, T, D/2]`.

    Computed in inv_freq's dtype, float32 in the model whatever its weights are: bfloat16 cannot tell positions beyond
    256 apart.
    """
    angle = position[:, None, :, None].to(inv_freq.dtype) * inv_freq
    return angle.cos(), angle.sin()


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x `[B, H, T, D]` by `cos`, `sin` `[B, 1, T, D/2]`; the arithmetic is theirs, the result in x's dtype."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def inverse_frequencies(
    parameters: RopeParameters,
    head_dim: int,
    *,
    context: int | None = None,
    length: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the angle per position of each pair of dimensions, `[D/2]`, radians.

    context: the model's `max_position_embeddings`, which "dynamic" needs. length `[B]`: of sequences beyond the
    type's `limit`, for each of which there is a row of the result, `[B, D/2]`.
    """
    device = "cpu" if length is None else length.device
    exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    return _FREQUENCIES[parameters.rope_type](parameters, exponent, context, length)


def attention_scale(p: RopeParameters) -> float:
    """Return the factor of cosine and sine, which makes attention sharper: 1, but for "yarn" and "longrope"."""
    if p.attention_factor is not None:
        return float(p.attention_factor)
    if p.rope_type == "yarn":
        if p.mscale and p.mscale_all_dim:
            return _mscale(p.factor, p.mscale) / _mscale(p.factor, p.mscale_all_dim)
        return _mscale(p.factor, 1.0)
    if p.rope_type == "longrope":
        assert p.factor is not None and p.original_max_position_embeddings is not None  # noqa: PT018
        if p.factor > 1:
            return math.sqrt(1 + math.log(p.factor) / math.log(p.original_max_position_embeddings))
    return 1.0


def _default(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    return 1.0 / p.rope_theta**exponent


def _linear(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    """Position interpolation (arXiv:2306.15595)."""
    assert p.factor is not None
    return 1.0 / p.rope_theta**exponent / p.factor


def _dynamic(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    """Dynamic NTK scaling (described in arXiv:2309.00071): a base that grows with sequences beyond the context."""
    assert p.factor is not None and context is not None  # noqa: PT018
    longest: Any = context if length is None else length.to(exponent.dtype).clamp(min=context)[:, None]
    growth = (p.factor * longest / context - (p.factor - 1)) ** (2 * len(exponent) / (2 * len(exponent) - 2))
    return 1.0 / (p.rope_theta * growth) ** exponent


def _yarn(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    """YaRN (arXiv:2309.00071): stretch slow pairs by `factor`, keep fast ones, a ramp over the dimensions between."""
    assert p.factor is not None and p.original_max_position_embeddings is not None  # noqa: PT018
    pairs, trained = len(exponent), p.original_max_position_embeddings

    def pair(turns: float) -> float:
        """Return the pair that turns so often within the trained context."""
        return pairs * math.log(trained / (turns * 2 * math.pi)) / math.log(p.rope_theta)

    low, high = pair(p.beta_fast or 32), pair(p.beta_slow or 1)
    if p.truncate in (None, True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    high += 0.001 if low == high else 0  # as the reference avoids dividing by zero
    slow = ((torch.arange(pairs, dtype=exponent.dtype, device=exponent.device) - low) / (high - low)).clamp(0, 1)
    fast = 1 - slow
    wavelength = p.rope_theta**exponent
    return 1.0 / (p.factor * wavelength) * (1 - fast) + 1.0 / wavelength * fast


def _longrope(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    """LongRoPE (arXiv:2402.13753): a factor for each pair, one list for the trained context, one for longer texts."""
    factors = p.short_factor if length is None else p.long_factor
    return 1.0 / (torch.tensor(factors, dtype=exponent.dtype, device=exponent.device) * p.rope_theta**exponent)


def _llama3(p: RopeParameters, exponent: Tensor, context: int | None, length: Tensor | None) -> Tensor:
    """Llama 3.1: stretch wavelengths beyond the trained context by `factor`, keep short ones, a ramp in between."""
    assert p.factor is not None and p.low_freq_factor is not None and p.high_freq_factor is not None  # noqa: PT018
    assert p.original_max_position_embeddings is not None
    inv_freq = 1.0 / p.rope_theta**exponent
    wavelength = 2 * math.pi / inv_freq
    turns = p.original_max_position_embeddings / wavelength  # turns of the pair within the trained context
    ramp = (turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)
    blended = (1 - ramp) * inv_freq / p.factor + ramp * inv_freq
    slow = wavelength > p.original_max_position_embeddings / p.low_freq_factor
    fast = wavelength < p.original_max_position_embeddings / p.high_freq_factor
    return torch.where(slow, inv_freq / p.factor, torch.where(fast, inv_freq, blended))


def _mscale(factor: float | None, weight: float) -> float:
    assert factor is not None
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


_FREQUENCIES: dict[str, Callable[[RopeParameters, Tensor, int | None, Tensor | None], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
