"""What layers are made of besides attention: RMSNorm, and products with the weights at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# torch.mv by a name that Inductor does not know: it makes a sum of products of it, and that loop is slower.
ops = torch.library.Library("llama_flex", "FRAGMENT")
ops.define("mv(Tensor weight, Tensor x) -> Tensor")
ops.impl("mv", torch.ops.aten.mv.default, "CPU")
torch.library.register_fake("llama_flex::mv", lambda weight, x: x.new_empty(len(weight)), lib=ops)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv:1910.07467), computed in float32 or wider and rounded once."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + weight @ norm(x) + bias: x `[B, T, in]`, weight `[out, in]` -> `[B, T, out]`."""
    if _reads_once(x) and _has_kernel(x):
        return _gemv(x, weight, bias, norm, residual, gated=False)
    y = _product(x if norm is None else norm(x), weight, bias)
    return y if residual is None else residual + y


def gated(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: RMSNorm) -> Tensor:
    """SwiGLU (arXiv:2002.05202), silu(gate) * up of the halves of weight @ norm(x) + bias, `[2 * out, in]` the weight:
    `[B, T, in]` -> `[B, T, out]`."""
    if _reads_once(x) and _has_kernel(x):
        return _gemv(x, weight, bias, norm, None, gated=True)
    gate, up = _product(norm(x), weight, bias).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def _reads_once(x: Tensor, rows: int = 1) -> bool:
    """Whether a product has so few rows and is compiled: then it takes as long as reading the weights, if done well."""
    return x.shape[:-1].numel() <= rows and torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda or not _reads_once(x, rows=64 if x.dtype.itemsize == 2 else 1):
        return nn.functional.linear(x, weight, bias)
    # On the CPU torch reads 16-bit weights 1.5 times as fast where they come first: as matrix times vector, or times
    # the rows as columns.
    if _reads_once(x):
        y = torch.ops.llama_flex.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    else:
        y = torch.mm(weight, x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def _gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: RMSNorm | None, residual: Tensor | None, *, gated: bool
) -> Tensor:
    norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    y = _one_row(x.reshape(-1), weight, bias, norm_weight, eps, residual, gated)
    return y.view(*x.shape[:-1], -1)


@torch.library.custom_op("llama_flex::gemv", mutates_args=(), device_types="cuda")
def _one_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """The products above for one row x `[in]` on CUDA, each in one kernel; see `llama_flex.gemv`."""
    from .gemv import launch  # Triton comes with torch's CUDA builds only

    return launch(x, weight, bias, norm_weight, eps, residual, gated)


@_one_row.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    return x.new_empty(len(weight) // (1 + gated))
