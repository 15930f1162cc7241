"""Rotary position embedding; the frequencies of each scaling type are in `checkpoint.rope_scaling`.

Su et al., "RoFormer" (arXiv:2104.09864), in the half-split layout of Hugging Face checkpoints: dimension d is paired
with d + D/2, not with its neighbour. Dimensions: B batch, H heads, T tokens, D head dim.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from .checkpoint.rope_scaling import RopeParameters
from .tokens import Tokens

Rotary: TypeAlias = tuple[Tensor, Tensor]  # cosine and sine, each [B, 1, T, D/2]


class RotaryEmbedding(nn.Module):
    """Cosines and sines of token positions. Frequencies stay float32 or wider, whatever the model's dtype."""

    inv_freq: Tensor  # [D/2]

    def __init__(self, parameters: RopeParameters, head_dim: int, context: int) -> None:
        super().__init__()
        self.rope, self.head_dim, self.context = parameters, head_dim, context
        self.limit = parameters.limit(context)
        self.register_buffer("inv_freq", torch.empty(head_dim // 2), persistent=False)
        self._make_inv_freq()

    def forward(self, tokens: Tokens) -> Rotary:
        """Return cosine and sine `[B, 1, T, D/2]` for the positions of tokens `[B, T]`.

        Frequencies that depend on a sequence's length take it from the given tokens.
        """
        inv_freq, rope = self.inv_freq, self.rope
        if self.limit is not None:
            length = torch.where(tokens.index < 0, 0, tokens.position + 1).amax(1)
            longer = rope.inverse_frequencies(self.head_dim, context=self.context, length=length, dtype=inv_freq.dtype)
            inv_freq = torch.where(length[:, None] > self.limit, longer, inv_freq)[:, None, None]
        cos, sin = cos_sin(tokens.position, inv_freq)
        scale = rope.attention_scale
        return (cos, sin) if scale == 1 else (cos * scale, sin * scale)

    def _make_inv_freq(self) -> None:
        # On the CPU, as in the reference: a frequency's last bit is a visible angle at position 100,000.
        dtype = torch.promote_types(torch.float32, self.inv_freq.dtype)
        inv_freq = self.rope.inverse_frequencies(self.head_dim, context=self.context, dtype=dtype)
        self.inv_freq = inv_freq.to(self.inv_freq.device)

    def _apply(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        # model.bfloat16() casts buffers too; frequencies in bfloat16 would be wrong.
        super()._apply(*args, **kwargs)
        self._make_inv_freq()
        return self


def cos_sin(position: Tensor, inv_freq: Tensor) -> Rotary:
    """Return the cosine and sine of every angle, each `[B, 1, T, D/2]`.

    position: `[B, T]`. inv_freq: `[D/2]` or `[B, 1, 1, D/2]`; its dtype is used throughout, float32 in the model
    whatever that of the weights: bfloat16 cannot tell positions beyond 256 apart.
    """
    angle = position[:, None, :, None].to(inv_freq.dtype) * inv_freq
    return angle.cos(), angle.sin()


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x `[B, H, T, D]` by cos and sin `[B, 1, T, D/2]`, in their dtype; return the result in x's dtype."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
