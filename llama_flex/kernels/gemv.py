"""One row times a weight matrix on CUDA, with norm, SwiGLU and residual, in one kernel.

Decoding one sequence consists of these products: each weight is read once and used once, so memory bandwidth is the
limit. cuBLAS reads the large matrices at 85 to 95 % of it and the small ones at 60 %, and normalisation, SwiGLU and
residuals cost kernels of their own, each about 2 us of a layer's 110 (8B shape, H200).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .weight import nf4_on


def gemv(
    x: Tensor,
    x_scale: Tensor | None,
    numbers: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """Compute residual + weight @ norm(x) + bias for x `[K]`, weight `[N, K]` -> `[N]`; gated: silu of the first half
    times the second, `[N/2]`. x_scale: float32 `[1]`, a factor of the product, or `[G]`, of each group of x, or None.
    numbers, scale, zero: see `weight.Weight`. Accumulates in float32, and rounds where torch's own operations round."""
    n, k = len(numbers) // (1 + gated), len(x)
    assert numbers.is_contiguous()
    assert x.is_contiguous()
    table = nf4_on(x.device) if numbers.dtype == torch.uint8 else None
    numbers = numbers if table is None else numbers.view(torch.int32)
    bits = 4 if numbers.dtype == torch.int32 else 8 * numbers.itemsize
    rows, columns, warps = _tile(bits, len(numbers), k)
    rows = rows // 2 if gated else rows
    out = x.new_empty(n)
    capability = torch.cuda.get_device_capability(x.device)
    overlap = capability >= (9, 0)
    sizes = {
        "K": k,
        "ROWS": rows,
        "COLUMNS": columns,
        "GROUP": k if scale is None else k // scale.shape[1],
        "PACKED": bits == 4,
        "GROUPED": scale is not None and (bits == 4 or zero is not None or scale.shape[1] > 1),
        "X_GROUPED": x_scale is not None and len(x_scale) > 1,
        "GATED": gated,
        "FLOAT8": capability >= (8, 9) and table is None,  # whether the device converts it
        "OVERLAP": overlap,
    }
    _kernel[(triton.cdiv(n, rows),)](
        x,
        x_scale,
        numbers,
        scale,
        zero,
        table,
        bias,
        norm_weight,
        residual,
        out,
        n,
        eps,
        **sizes,
        num_warps=warps,
        launch_pdl=overlap,
    )
    return out


def _tile(bits: int, n: int, k: int) -> tuple[int, int, int]:
    """Return the rows and columns that a program multiplies at a time, and its warps, for a weight `[N, K]` of so many
    bits: found by trying all on the matrices of the 8B shape, and with 16 bits of the 1B and 3B shapes, on an H200."""
    if bits == 8:
        return (4, 4096, 4) if 2048 < k <= 4096 else (4, 2048, 2)
    if bits == 4:
        return (4 if n <= 4096 else 8, *((4096, 4) if 2048 < k <= 4096 else (2048, 2)))
    return (4, 1024, 4) if k < 4096 else (4, 2048, 8) if k < 8192 else (2, 2048, 4)


@triton.jit
def _kernel(
    x,
    x_scale,
    weight,
    scale,
    zero,
    table,
    bias,
    norm_weight,
    residual,
    out,
    n,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    GROUPED: tl.constexpr,
    X_GROUPED: tl.constexpr,
    GATED: tl.constexpr,
    FLOAT8: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:  # the next kernel may start while the last programs of this one run
        gdc_launch_dependents()
    EACH: tl.constexpr = 8 if PACKED else 1  # columns in an element of the weight
    WIDTH: tl.constexpr = COLUMNS // EACH
    SIZE: tl.constexpr = K // EACH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, WIDTH)
    column = place // 4 * 32 + place % 4 if PACKED else place  # the first of an element; the next is 4 further
    is_row = row < n
    at = weight + row[:, None].to(tl.int64) * SIZE + place[None, :]
    at_up = at + n.to(tl.int64) * SIZE
    inside = is_row[:, None] & (place < SIZE)[None, :]
    w = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
    w_up = tl.load(at_up, mask=inside, other=0.0, eviction_policy="evict_first") if GATED else w
    if OVERLAP:  # weights do not depend on the previous kernel; all else does
        gdc_wait()
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    total_up = tl.zeros((ROWS, WIDTH), tl.float32)
    squares = tl.zeros((WIDTH,), tl.float32)
    for begin in tl.static_range(0, SIZE, WIDTH):  # unrolled: all weights are in flight before the first is needed
        is_place = begin + place < SIZE
        if begin > 0:
            inside = is_row[:, None] & is_place[None, :]
            w = tl.load(at + begin, mask=inside, other=0.0, eviction_policy="evict_first")
            if GATED:
                w_up = tl.load(at_up + begin, mask=inside, other=0.0, eviction_policy="evict_first")
        summed = tl.zeros((WIDTH,), tl.float32)
        part = tl.zeros((ROWS, WIDTH), tl.float32)
        part_up = tl.zeros((ROWS, WIDTH), tl.float32)
        each = _four_bits(w, FLOAT8) if PACKED else (w,)
        each_up = _four_bits(w_up, FLOAT8) if PACKED and GATED else (w_up,)
        for i in tl.static_range(EACH):
            here = begin * EACH + column + 4 * i
            v = tl.load(x + here, mask=is_place, other=0.0, eviction_policy="evict_last").to(tl.float32)
            if norm_weight is not None:
                squares += v * v
                v *= tl.load(norm_weight + here, mask=is_place, other=0.0, eviction_policy="evict_last").to(tl.float32)
            if X_GROUPED:
                v *= tl.load(x_scale + here // GROUP, mask=is_place, other=0.0)
            if PACKED:
                summed += v
                part += _value(each[i], table) * v[None, :]
                if GATED:
                    part_up += _value(each_up[i], table) * v[None, :]
            elif GROUPED:
                group = here // GROUP
                total += _of_groups(w, scale, zero, row, group, inside, K // GROUP) * v[None, :]
                if GATED:
                    total_up += _of_groups(w_up, scale, zero, row + n, group, inside, K // GROUP) * v[None, :]
            else:
                total += _widened(w) * v[None, :]
                if GATED:
                    total_up += _widened(w_up) * v[None, :]
        if PACKED:
            group = (begin * EACH + column) // GROUP
            total += _scaled(part, summed, scale, zero, table, row, group, inside, K // GROUP, FLOAT8)
            if GATED:
                total_up += _scaled(part_up, summed, scale, zero, table, row + n, group, inside, K // GROUP, FLOAT8)
    # The root mean square is one number for the whole row, so the division can come last.
    factor = 1.0 if norm_weight is None else tl.rsqrt(tl.sum(squares, 0) / K + eps)
    if x_scale is not None and not X_GROUPED:
        factor *= tl.load(x_scale)
    dtype: tl.constexpr = out.dtype.element_ty
    y = _finished(total, factor, None if GROUPED else scale, bias, row, is_row, dtype)
    if GATED:
        y = y * tl.sigmoid(y)
        y = y.to(dtype).to(tl.float32)
        y *= _finished(total_up, factor, None if GROUPED else scale, bias, row + n, is_row, dtype)
    if residual is not None:
        y += tl.load(residual + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out + row, y.to(dtype), mask=is_row)


@triton.jit
def _finished(total, factor, scale, bias, row, is_row, dtype: tl.constexpr):
    y = tl.sum(total, 1) * factor
    if scale is not None:
        y *= tl.load(scale + row, mask=is_row, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
    return y.to(dtype).to(tl.float32)


@triton.jit
def _value(number, table):
    return number.to(tl.float32) if table is None else tl.load(table + number)


@triton.jit
def _scaled(part, summed, scale, zero, table, row, group, inside, GROUPS: tl.constexpr, FLOAT8: tl.constexpr):
    at = row[:, None] * GROUPS + group[None, :]
    if table is None:  # the sum of (numbers - zero) * x is that of numbers * x without zero times the sum of x
        z = 8.0 if zero is None else tl.load(zero + at, mask=inside, other=0).to(tl.float32)
        part = (part * 512.0 if FLOAT8 else part) - z * summed[None, :]
    return part * tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _of_groups(w, scale, zero, row, group, inside, GROUPS: tl.constexpr):
    at = row[:, None] * GROUPS + group[None, :]
    w = _widened(w)
    if zero is not None:
        w -= tl.load(zero + at, mask=inside, other=0).to(tl.float32) - 128.0
    return w * tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _widened(w):
    if w.dtype == tl.int8:
        # A byte in the last bits of a float's fraction is added to 2 ** 23: quicker than to convert it.
        w = tl.inline_asm_elementwise(
            "{ .reg .b32 t; xor.b32 t, $4, 0x80808080;"
            "prmt.b32 $0, t, 0x4b000000, 0x7440; prmt.b32 $1, t, 0x4b000000, 0x7441;"
            "prmt.b32 $2, t, 0x4b000000, 0x7442; prmt.b32 $3, t, 0x4b000000, 0x7443; }",
            "=r,=r,=r,=r,r",
            [w],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
        return w - (2.0**23 + 128.0)
    return w.to(tl.float32)


@triton.jit
def _four_bits(w, FLOAT8: tl.constexpr):
    # Eight tiles of the numbers in words. In the last bits of a float8_e4m3fn, a number is 512 times as large as that.
    if FLOAT8:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 l, h, p; .reg .b16 a, b;"
            "and.b32 l, $8, 0x0f0f0f0f; shr.u32 h, $8, 4; and.b32 h, h, 0x0f0f0f0f; mov.b32 {a, b}, l;"
            "cvt.rn.f16x2.e4m3x2 p, a; mov.b32 {$0, $2}, p; cvt.rn.f16x2.e4m3x2 p, b; mov.b32 {$4, $6}, p;"
            "mov.b32 {a, b}, h;"
            "cvt.rn.f16x2.e4m3x2 p, a; mov.b32 {$1, $3}, p; cvt.rn.f16x2.e4m3x2 p, b; mov.b32 {$5, $7}, p; }",
            "=h,=h,=h,=h,=h,=h,=h,=h,r",
            [w],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        return (w & 15, w >> 4 & 15, w >> 8 & 15, w >> 12 & 15, w >> 16 & 15, w >> 20 & 15, w >> 24 & 15, w >> 28 & 15)
