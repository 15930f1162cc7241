"""The only call of flex_attention, and beside it the dense definition of what it computes.

Dimensions: B batch, H query heads, T query tokens, S slots, D head dim; K heads of keys and values, H a multiple of K.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .masks import Mask, Tokens

Backend: TypeAlias = Literal["flex", "dense"]
Visible: TypeAlias = BlockMask | Tensor


def visible(mask: Mask, q: Tokens, kv: Tokens, num_heads: int, backend: Backend) -> Visible:
    """What each query may attend to, computed once per mask and step and shared by all layers."""
    return mask.block_mask(q, kv, num_heads) if backend == "flex" else mask.dense(q, kv, num_heads)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Scaled dot-product attention: q `[B, H, T, D]`, k and v `[B, K, S, D]` -> `[B, H, T, D]` in q's dtype.

    Keys and values are shared by groups of H/K query heads without being repeated in memory. A query that may attend to
    nothing gets 0.
    """
    if isinstance(visible, BlockMask):
        # torch 2.13's compiled CPU kernel misreads strided values, such as a slice of a fused product: wrong by 100 %.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        with nullcontext() if torch.compiler.is_compiling() else _without_advice_to_compile():
            return flex_attention(q, k, v, block_mask=visible, enable_gqa=q.shape[1] != k.shape[1])
    return _dense(q, k, v, visible)


@contextmanager
def _without_advice_to_compile() -> Iterator[None]:
    """Run eagerly, flex_attention warns that it is slow; whoever runs this package eagerly chose to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def _dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """The definition: softmax(q k^T / sqrt(D)) over the allowed slots, in float32 or wider; differentiable."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed, -torch.inf)
    # A row with nothing allowed has softmax NaN; it attends to nothing.
    weights = torch.softmax(scores, dim=-1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return (weights @ v).to(q.dtype)
