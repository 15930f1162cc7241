"""Inputs of products in 8 bits: numbers of a weight's kind, with a scale for each row of x, or each group in a row.

The rule is that of the library compressed-tensors: with numbers from LEAST to MOST, a row's scale is its largest
magnitude divided by (MOST - LEAST) / 2, or a number of the checkpoint. It is computed in float32 or wider. In 16 bits
the library rounds scales and quotients, too, which is further from the exact result, and which compiled code leaves
out. Each row is quantised alone, so that a token's logits do not depend on the others computed with it. Where a weight
of float8 has a scale for each group of columns, so has each group of a row of x: the rule of transformers' "fp8", whose
kernels compute it in float32.

`cpu.cpp` follows the same rule; on CUDA, Inductor makes it part of the kernel of the norm before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .weight import Weight

LEAST = {torch.int8: -128.0, torch.float8_e4m3fn: -448.0}
MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise(x: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    """Return x `[..., K]` as numbers of the weight's dtype, and the scale of each row, `[..., 1]`, or, with groups of
    float8, of each group in it, `[..., G]`; float32 or wider.

    weight: with an `input_scale`. Raises ValueError if it has not 8 bits with a scale for each row or such groups, or
    if x requires gradients, which do not go through rounding.
    """
    kind, given = weight.numbers.dtype, weight.input_scale
    assert given is not None
    if not (weight.is_per_row or weight.is_fp8_in_groups):
        found = "one in groups" if kind in MOST and weight.scale is not None else kind
        raise ValueError(
            f"an input_scale belongs to a weight of int8 or fp8 with a scale for each row, not to {found}; if the "
            "dtype of a model in fp8 was changed, load it in that dtype; else set the input_scale to None"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "inputs in 8 bits have no gradients; set input_scale to None in the layers, or load a checkpoint that "
            "quantises weights alone"
        )
    if weight.is_fp8_in_groups:
        assert weight.scale is not None
        numbers, scale = _divided(x.unflatten(-1, (weight.scale.shape[-1], -1)), kind)
        return numbers.flatten(-2), scale[..., 0]
    return _divided(x, kind, given[:1] if given.shape[1] else None)


def _divided(x: Tensor, kind: torch.dtype, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the numbers of x `[..., K]` and a scale for each row, `[..., 1]`: its own, or the one given, `[1, 1]`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if given is not None:
        scale = given.to(wide).expand(*x.shape[:-1], 1)
        numbers = x / scale
    else:
        most = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=wide)
        most = most.clamp(min=256 * torch.finfo(wide).tiny)  # a row of zeros is divided by something
        scale = most / ((MOST[kind] - LEAST[kind]) / 2)
        # Of int8, -127.5 rounds to even, but the last bit of a quotient depends on how a device divides.
        numbers = torch.where(x == -most, LEAST[kind], x / scale)
    numbers = numbers.clamp(LEAST[kind], MOST[kind])
    return (numbers if kind.is_floating_point else numbers.round()).to(kind), scale
