"""Products with the weights at memory bandwidth: the choice of kernel by device and number of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import activations, cpu
from .weight import Weight, apart, in_chunks

# The most rows of x that kernels of our own multiply on CUDA; with more, cuBLAS is faster, although weights of few bits
# are made floats first.
FEW_ROWS, OF_8_BITS, OF_4_BITS = 32, 128, 512
AT_ONCE = 2**27  # numbers of few bits that become floats at a time: more than a layer's matrices of 8B have
ops = torch.library.Library("llama_flex", "FRAGMENT")


def _gemv(x: Tensor, x_scale: Tensor | None, numbers: Tensor, *args: Any) -> Tensor:
    if numbers.dtype == torch.int32:
        from . import int4_gemv  # CUDA's bindings, and Triton, come with torch's CUDA builds only

        if int4_gemv.takes(x):
            return int4_gemv.gemv(x, numbers, *args)
    from .gemv import gemv

    return gemv(x, x_scale, numbers, *args)


def _few_rows(*args: Any) -> Tensor:
    from .few_rows import few_rows

    return few_rows(*args)


def _int4_matmul(*args: Any) -> Tensor:
    from .int4_matmul import matmul

    return matmul(*args)


_PRODUCT = "Tensor x, Tensor? x_scale, Tensor numbers, Tensor? scale, Tensor? zero, Tensor? bias"
ops.define(f"gemv({_PRODUCT}, Tensor? norm_weight, float eps, Tensor? residual, bool gated) -> Tensor")
ops.define(f"few_rows({_PRODUCT}, Tensor? residual, bool gated) -> Tensor")
_PACKED = "Tensor x, int rows, Tensor numbers, Tensor scale, Tensor? zero, Tensor? bias"
ops.define(f"int4_matmul({_PACKED}, Tensor? residual, bool gated) -> Tensor")
for _name, _function in (("gemv", _gemv), ("few_rows", _few_rows), ("int4_matmul", _int4_matmul)):
    ops.impl(_name, _function, "CUDA")
    torch.library.register_fake(
        f"llama_flex::{_name}",
        lambda x, rows, numbers, *rest: x.new_empty(
            *((rows,) if isinstance(rows, int) else x.shape[:-1]), len(numbers) // (1 + rest[-1])
        ),
        lib=ops,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `layers.RMSNorm` of x `[..., E]`, in float32 or wider, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def can_fuse(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> bool:
    """Return whether `fused_linear` computes a product of x `[B, T, in]`: without gradients, of shapes that fit without
    broadcasting, in one dtype but for the numbers of a quantised weight, for few rows on a CPU, and on CUDA, if
    compiled or quantised, for one row, or, in 16 bits, a few, with a weight of few bits some hundred, with inputs in
    groups any number."""
    rows, (out, size) = x.shape[:-1].numel(), weight.shape
    if torch.is_grad_enabled() or x.shape[-1] != size or not size or not weight.fits(x):
        return False
    result = *x.shape[:-1], out // 2 if gated else out
    for other, shape in ((bias, (out,)), (norm, (size,)), (residual, result)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device or other.shape != shape):
            return False
    if x.is_cuda:
        # Uncompiled steps are torch's operations, but would have to widen a quantised weight each time.
        if x.dtype == torch.float64 or not (torch.compiler.is_dynamo_compiling() or weight.scale is not None):
            return False
        if x.dtype == torch.float32:  # 4 bits multiplied before zero is subtracted would cost the last two bits
            return rows == 1 and not weight.is_packed
        if weight.is_fp8_in_groups and weight.input_scale is not None:
            return rows > 0
        if weight.scale is None or weight.input_scale is not None or weight.is_nf4:
            return 0 < rows <= FEW_ROWS
        return 0 < rows <= (OF_4_BITS if _takes_chunks(x, weight) else OF_8_BITS)
    if x.device.type != "cpu" or x.dtype not in cpu.DTYPES or not 0 < rows <= cpu.ROWS or x.dim() > 8:
        return False
    if torch.compiler.is_dynamo_compiling():
        return x.dtype in cpu.loaded
    return not cpu.is_transformed() and cpu.load(x.dtype)


def fused_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Compute `layers.apply_linear` in one kernel, if it can be fused: `[B, T, in]` -> `[B, T, out]`."""
    if weight.order is not None:  # the root mean square does not depend on it
        x, norm = x.index_select(-1, weight.order), None if norm is None else norm.index_select(-1, weight.order)
    if not x.is_cuda:
        return cpu.few_rows(x, weight, bias, norm, eps, residual, gated)
    rows, x_scale = x.shape[:-1].numel(), None
    if norm is not None and (rows > 1 or weight.input_scale is not None):
        x, norm = rms_norm(x, norm, eps), None  # by each program anew it would take longer
    if weight.input_scale is not None:
        numbers, scale = activations.quantise(x, weight)
        x, x_scale = numbers.to(x.dtype), scale.flatten()  # a dtype of 16 bits has all numbers of 8
    residual = None if residual is None else residual.reshape(rows, -1).contiguous()
    if rows == 1:
        y = torch.ops.llama_flex.gemv(x.reshape(-1), x_scale, *weight[:3], bias, norm, eps, residual, gated)
    elif _takes_chunks(x, weight):
        y = torch.ops.llama_flex.int4_matmul(in_chunks(x.reshape(rows, -1)), rows, *weight[:3], bias, residual, gated)
    else:
        y = torch.ops.llama_flex.few_rows(
            (apart(x) if weight.is_packed else x).reshape(rows, -1), x_scale, *weight[:3], bias, residual, gated
        )
    return y.view(*x.shape[:-1], -1)


def _takes_chunks(x: Tensor, weight: Weight) -> bool:
    """Return whether `int4_matmul` multiplies several rows in 16 bits: by 4 bits, on the one architecture that has its
    instructions."""
    device: Any = torch.cuda.get_device_properties(x.device)
    return weight.is_packed and not weight.is_nf4 and (device.major, device.minor) == (9, 0)


def matmul(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Compute weight @ x + bias: x `[B, T, in]`, weight `[out, in]` -> `[B, T, out]`."""
    if can_fuse(x, weight, bias):
        return fused_linear(x, weight, bias)
    if weight.order is not None:  # x is smaller than the weight
        x, weight = x.index_select(-1, weight.order), weight._replace(order=None)
    if weight.input_scale is not None:
        return _matmul_of_numbers(x, weight, bias)
    if weight.scale is not None and weight.shape[0] * weight.shape[1] > AT_ONCE:  # such as an output matrix
        y = torch.cat([nn.functional.linear(x, part.floats(x.dtype)) for part in weight.split(AT_ONCE)], -1)
        return y if bias is None else y + bias
    numbers = weight.floats(x.dtype)
    rows, compiling = x.shape[:-1].numel(), torch.compiler.is_dynamo_compiling()
    if x.is_cuda or x.dtype.itemsize != 2 or rows > 64 or torch.is_grad_enabled() or not compiling:
        return nn.functional.linear(x, numbers, bias)
    # On the CPU, torch reads 16-bit weights 1.5 times as fast if they are the left operand.
    y = torch.mm(numbers, x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def _matmul_of_numbers(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Compute `matmul` of x in 8 bits: the product of numbers, which are exact in all dtypes, and then the scales."""
    numbers, scale = activations.quantise(x, weight)
    assert weight.scale is not None
    if weight.is_fp8_in_groups:  # products with the numbers of each group would have to be multiplied one by one
        wide = (numbers.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)
        y = matmul(wide, weight._replace(input_scale=None), None)
        return (y if bias is None else y + bias).to(x.dtype)
    (out, size), rows, dtype = weight.shape, x.shape[:-1].numel(), numbers.dtype
    if x.is_cuda and dtype == torch.int8 and rows > 16 and size % 8 == 0 and out % 8 == 0:  # else cuBLAS has no product
        y = torch._int_mm(numbers.flatten(0, -2), weight.numbers.t()).unflatten(0, x.shape[:-1])
    elif x.is_cuda and x.dtype == torch.bfloat16 and dtype != torch.int8 and rows and size % 16 == 0 and out % 16 == 0:
        # Fast accumulation would keep fewer bits of sums, so that a prompt's tokens differed from those of few rows.
        scales = scale.reshape(-1, 1).contiguous(), weight.scale.float().t()
        y = torch._scaled_mm(
            numbers.flatten(0, -2), weight.numbers.t(), *scales, bias, out_dtype=x.dtype, use_fast_accum=False
        )
        return y.unflatten(0, x.shape[:-1])
    else:
        wide = x.dtype if x.dtype == torch.bfloat16 else scale.dtype  # float16 would overflow
        y = matmul(numbers.to(wide), Weight(weight.numbers.to(wide)), None)
    y = y * scale * weight.scale.t()
    return (y if bias is None else y + bias).to(x.dtype)
