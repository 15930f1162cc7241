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


def gemv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    config=None,
) -> Tensor:
    """Compute residual + weight @ norm(x) + bias for x `[K]`, weight `[N, K]` -> `[N]`; gated: silu of the first half
    times the second, `[N/2]`. Accumulates in float32, and rounds where torch's own operations round."""
    n, k = len(weight) // (1 + gated), weight.shape[1]
    assert weight.is_contiguous()
    assert x.is_contiguous()
    # Found by trying all sizes on the matrices of the 1B, 3B and 8B shapes, on an H200.
    rows, columns, warps = (4, 1024, 4) if k < 4096 else (4, 2048, 8) if k < 8192 else (2, 2048, 4)
    rows, columns, warps = config or (rows, columns, warps)
    rows = rows // 2 if gated else rows
    out = x.new_empty(n)
    overlap = torch.cuda.get_device_capability(x.device) >= (9, 0)
    sizes = {"K": k, "ROWS": rows, "COLUMNS": columns, "GATED": gated, "OVERLAP": overlap}
    _kernel[(triton.cdiv(n, rows),)](
        x, weight, scale, bias, norm_weight, residual, out, n, eps, **sizes, num_warps=warps, launch_pdl=overlap
    )
    return out


@triton.jit
def _kernel(
    x,
    weight,
    scale,
    bias,
    norm_weight,
    residual,
    out,
    n,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:  # the next kernel may start while the last programs of this one run
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = row < n
    at = weight + row[:, None].to(tl.int64) * K + column[None, :]
    at_up = at + n.to(tl.int64) * K
    inside = is_row[:, None] & (column < K)[None, :]
    w = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
    w_up = tl.load(at_up, mask=inside, other=0.0, eviction_policy="evict_first") if GATED else w
    if OVERLAP:  # weights do not depend on the previous kernel; all else does
        gdc_wait()
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total_up = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.static_range(0, K, COLUMNS):  # unrolled: all weights are in flight before the first is needed
        is_column = start + column < K
        if start > 0:
            inside = is_row[:, None] & is_column[None, :]
            w = tl.load(at + start, mask=inside, other=0.0, eviction_policy="evict_first")
            if GATED:
                w_up = tl.load(at_up + start, mask=inside, other=0.0, eviction_policy="evict_first")
        v = tl.load(x + start + column, mask=is_column, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if norm_weight is not None:
            squares += v * v
            v *= tl.load(norm_weight + start + column, mask=is_column, other=0.0, eviction_policy="evict_last").to(
                tl.float32
            )
        total += w.to(tl.float32) * v[None, :]
        if GATED:
            total_up += w_up.to(tl.float32) * v[None, :]
    # The root mean square is one number for the whole row, so the division can come last.
    rms = 1.0 if norm_weight is None else tl.rsqrt(tl.sum(squares, 0) / K + eps)
    y = _finished(total, rms, scale, bias, row, is_row, out.dtype.element_ty)
    if GATED:
        y = y * tl.sigmoid(y)
        y = y.to(out.dtype.element_ty).to(tl.float32)
        y *= _finished(total_up, rms, scale, bias, row + n, is_row, out.dtype.element_ty)
    if residual is not None:
        y += tl.load(residual + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=is_row)


@triton.jit
def _finished(total, rms, scale, bias, row, is_row, dtype: tl.constexpr):
    y = tl.sum(total, 1) * rms
    if scale is not None:
        y *= tl.load(scale + row, mask=is_row, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
    return y.to(dtype).to(tl.float32)
