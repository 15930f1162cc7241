"""Products with the weights at memory bandwidth: the choice of kernel by device and number of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import cpu

ops = torch.library.Library("llama_flex", "FRAGMENT")


def _gemv(*args: Any) -> Tensor:
    from .gemv import gemv  # Triton comes with torch's CUDA builds only

    return gemv(*args)


ops.define(
    "gemv(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, float eps, Tensor? residual, bool gated)"
    " -> Tensor"
)
ops.impl("gemv", _gemv, "CUDA")
torch.library.register_fake(
    "llama_flex::gemv", lambda x, weight, *rest: x.new_empty(len(weight) // (1 + rest[-1])), lib=ops
)


def can_fuse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    scale: Tensor | None = None,
) -> bool:
    """Return whether `fused_linear` computes a product of x `[B, T, in]`: without gradients, of shapes that fit without
    broadcasting, in one dtype but for an int8 weight with a scale, for few rows on a CPU, and on CUDA for one row of a
    compiled step, without a scale."""
    rows, (out, size) = x.shape[:-1].numel(), weight.shape
    if torch.is_grad_enabled() or x.shape[-1] != size or not size:
        return False
    result = *x.shape[:-1], out // 2 if gated else out
    if scale is not None and (weight.dtype != torch.int8 or weight.device != x.device):
        return False
    numbers = weight if scale is None else None
    for other, shape in ((numbers, None), (scale, (out, 1)), (bias, (out,)), (norm, (size,)), (residual, result)):
        if other is None:
            continue
        if other.dtype != x.dtype or other.device != x.device or (shape is not None and other.shape != shape):
            return False
    if x.is_cuda:
        return rows == 1 and torch.compiler.is_dynamo_compiling() and x.dtype != torch.float64 and scale is None
    if x.device.type != "cpu" or x.dtype not in cpu.DTYPES or not 0 < rows <= cpu.ROWS or x.dim() > 8:
        return False
    if torch.compiler.is_dynamo_compiling():
        return x.dtype in cpu.loaded
    return not cpu.is_transformed() and cpu.load(x.dtype)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute `layers.apply_linear` in one kernel, if it can be fused: `[B, T, in]` -> `[B, T, out]`."""
    if x.is_cuda:
        y = torch.ops.llama_flex.gemv(x.reshape(-1), weight, bias, norm, eps, residual, gated)
        return y.view(*x.shape[:-1], -1)
    return cpu.few_rows(x, weight, bias, norm, eps, residual, gated, scale)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Compute weight @ x + bias: x `[B, T, in]`, weight `[out, in]` -> `[B, T, out]`. scale: of an int8 weight."""
    if not x.is_cuda and can_fuse(x, weight, bias, scale=scale):
        return fused_linear(x, weight, bias, scale=scale)
    if scale is not None:
        if weight.dtype != torch.int8:
            raise ValueError(f"a weight_scale belongs to a weight of int8, not of {weight.dtype}; set it to None")
        weight = weight.to(x.dtype).mul_(scale)
    rows, compiling = x.shape[:-1].numel(), torch.compiler.is_dynamo_compiling()
    if x.is_cuda or x.dtype.itemsize != 2 or rows > 64 or torch.is_grad_enabled() or not compiling:
        return nn.functional.linear(x, weight, bias)
    # On the CPU, torch reads 16-bit weights 1.5 times as fast if they are the left operand.
    y = torch.mm(weight, x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias
