"""Products with the weights at memory bandwidth: the choice of kernel by device and number of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ops = torch.library.Library("llama_flex", "FRAGMENT")
# torch.mv under a name that Inductor does not know: it would turn mv into a sum of products, a slower loop.
ops.define("mv(Tensor weight, Tensor x) -> Tensor")
ops.impl("mv", torch.ops.aten.mv.default, "CPU")
torch.library.register_fake("llama_flex::mv", lambda weight, x: x.new_empty(len(weight)), lib=ops)


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


def can_fuse(x: Tensor) -> bool:
    """Return whether x `[B, T, in]` is one row of a compiled step on CUDA, the case that `fused_linear` computes."""
    return _is_memory_bound(x) and x.is_cuda and x.dtype != torch.float64


def fused_linear(x: Tensor, module: Any, norm: Any, residual: Tensor | None, gated: bool) -> Tensor:
    """Compute `layers.apply_linear` in one kernel, if `can_fuse(x)`: `[B, T, in]` -> `[B, T, out]`; see `gemv`."""
    norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    y = torch.ops.llama_flex.gemv(x.reshape(-1), module.weight, module.bias, norm_weight, eps, residual, gated)
    return y.view(*x.shape[:-1], -1)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute weight @ x + bias: x `[B, T, in]`, weight `[out, in]` -> `[B, T, out]`."""
    if x.is_cuda or not _is_memory_bound(x, rows=64 if x.dtype.itemsize == 2 else 1):
        return nn.functional.linear(x, weight, bias)
    # On the CPU, torch reads 16-bit weights 1.5 times as fast if they are the left operand: weight times vector, or
    # weight times the transposed rows.
    if _is_memory_bound(x):
        y = torch.ops.llama_flex.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    else:
        y = torch.mm(weight, x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def _is_memory_bound(x: Tensor, rows: int = 1) -> bool:
    """Return whether a product is compiled and has at most `rows` rows: then reading the weights is all it costs."""
    return x.shape[:-1].numel() <= rows and torch.compiler.is_compiling() and not torch.is_grad_enabled()
