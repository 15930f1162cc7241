"""A few rows times a weight matrix on CUDA, with scale, SwiGLU and residual, in one kernel.

The step of a small batch, like that of one sequence (see `gemv`), reads each weight once, and is bound by memory;
tensor cores make its arithmetic free. A program multiplies some rows of the weight by all rows of x. Weights of 8 and 4
bits become numbers of x's dtype in registers. Inputs with a scale for each group of columns take this kernel for any
number of rows: a program has some of them, and multiplies a group's product by both scales.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .weight import nf4_on

# Rows and columns of the weight that a program multiplies at a time, its warps, and how many such pieces it loads
# ahead: the best on the matrices of the 8B shape, on an H200, and then for less shared memory. By bits of the weight.
_TILES = {
    16: ((64, 256, 4, 4), (64, 128, 4, 4), (64, 64, 4, 2)),
    8: ((16, 512, 1, 4), (16, 256, 1, 4), (16, 128, 1, 2)),
    4: ((32, 256, 2, 4), (32, 128, 2, 4), (32, 128, 2, 2)),
}
# The same for SwiGLU, whose two halves take twice the memory.
_GATED_TILES = {
    16: ((64, 128, 4, 4), (64, 64, 4, 2)),
    8: ((16, 256, 1, 4), (16, 128, 1, 2)),
    4: ((32, 256, 2, 4), (32, 128, 2, 4), (32, 128, 2, 2)),
}
# The same for more than 32 rows of x, of which a program takes 64 at a time.
_LARGE_TILES = {8: ((64, 128, 4, 4), (64, 128, 4, 2)), 4: ((64, 256, 4, 2), (64, 128, 4, 2))}


def few_rows(
    x: Tensor,
    x_scale: Tensor | None,
    numbers: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """Compute residual + x @ weight.T + bias for x `[M, K]`, weight `[N, K]` -> `[M, N]`; gated: silu of the first half
    times the second, `[M, N/2]`. x_scale: float32 `[M]`, factors of the rows, or `[M * G]`, of each group in them, or
    None. numbers, scale, zero: see `weight.Weight`; if packed, x has its columns in the order of `weight.apart`.
    Accumulates in float32, and rounds where torch's own operations round."""
    (m, k), n = x.shape, len(numbers) // (1 + gated)
    assert numbers.is_contiguous()
    x, x_scale = x.contiguous(), None if x_scale is None else x_scale.contiguous()
    table = nf4_on(x.device).view(torch.int16) if numbers.dtype == torch.uint8 else None
    numbers = numbers if table is None else numbers.view(torch.int32)
    bits = 4 if numbers.dtype == torch.int32 else 8 * numbers.itemsize
    tokens = min(64, max(16, triton.next_power_of_2(m)))
    device: Any = torch.cuda.get_device_properties(x.device)
    tiles = (_LARGE_TILES if m > 32 else _GATED_TILES if gated else _TILES)[bits]
    tiles = tiles if table is None else tiles[1:]  # reading a table takes registers
    most = device.shared_memory_per_block_optin
    x_grouped = x_scale is not None and scale is not None and scale.shape[1] > 1
    if x_grouped:
        assert scale is not None
        few, group = m <= 32, k // scale.shape[1]
        tiles = tuple((16 if few else 64, group, 1 if few else 4, stages) for stages in (4, 2))
    fitting = [t for t in tiles if t[3] * t[1] * (t[0] * bits // 8 * (1 + gated) + 2 * tokens) < 0.9 * most]
    rows, columns, warps, stages = (*fitting, tiles[-1])[0]
    out = x.new_empty(m, n)
    overlap = device.major >= 9
    sizes = {
        "K": k,
        "TOKENS": tokens,
        "ROWS": rows,
        "COLUMNS": columns,
        "GROUP": k if scale is None else k // scale.shape[1],
        "PACKED": bits == 4,
        "GROUPED": scale is not None and (bits == 4 or zero is not None or scale.shape[1] > 1),
        "X_GROUPED": x_grouped,
        "STAGES": stages,
        "GATED": gated,
        "OVERLAP": overlap,
    }
    _kernel[(triton.cdiv(m, tokens), triton.cdiv(n, rows))](
        x, x_scale, numbers, scale, zero, table, bias, residual, out, m, n, **sizes, num_warps=warps, launch_pdl=overlap
    )
    return out


@triton.jit
def _kernel(
    x,
    x_scale,
    weight,
    scale,
    zero,
    table,
    bias,
    residual,
    out,
    m,
    n,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    GROUPED: tl.constexpr,
    X_GROUPED: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:  # the next kernel may start while the last programs of this one run
        gdc_launch_dependents()
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if X_GROUPED:
        token = token.to(tl.int64)  # of a long prompt, times K, more than 32 bits
    is_row = row < n
    is_token = token < m
    dtype: tl.constexpr = out.dtype.element_ty
    EACH: tl.constexpr = 8 if PACKED else 1  # columns in an element of the weight
    WIDTH: tl.constexpr = COLUMNS // EACH
    place = tl.arange(0, WIDTH)
    at = weight + row[:, None].to(tl.int64) * (K // EACH) + place[None, :]
    at_up = at + n.to(tl.int64) * (K // EACH)
    at_x = x + token[None, :] * K + place[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    total_up = tl.zeros((ROWS, TOKENS), tl.float32)
    if OVERLAP:
        gdc_wait()
    for begin in tl.range(0, K // EACH, WIDTH, num_stages=STAGES):
        start = begin * EACH
        inside = is_row[:, None] & (begin + place < K // EACH)[None, :]
        seen = (begin + place < K // EACH)[:, None] & is_token[None, :]
        w = tl.load(at + begin, mask=inside, other=0.0, eviction_policy="evict_first")
        w_up = tl.load(at_up + begin, mask=inside, other=0.0, eviction_policy="evict_first") if GATED else w
        if PACKED:
            w = _unpacked(w, scale, zero, table, row, is_row, start, K, ROWS, COLUMNS, GROUP, dtype)
            if GATED:
                w_up = _unpacked(w_up, scale, zero, table, row + n, is_row, start, K, ROWS, COLUMNS, GROUP, dtype)
            for i in tl.static_range(8):
                v = tl.load(at_x + begin + i * (K // 8), mask=seen, other=0.0, eviction_policy="evict_last")
                total = tl.dot(w[i], v, total)
                if GATED:
                    total_up = tl.dot(w_up[i], v, total_up)
        elif X_GROUPED:  # the columns are those of a group
            v = tl.load(at_x + start, mask=seen, other=0.0, eviction_policy="evict_last")
            group = start // GROUP
            factor = tl.load(x_scale + token * (K // GROUP) + group, mask=is_token, other=0.0)[None, :]
            each = tl.load(scale + row * (K // GROUP) + group, mask=is_row, other=0.0)[:, None]
            total += tl.dot(w.to(dtype), v) * each * factor
            if GATED:
                each_up = tl.load(scale + (row + n) * (K // GROUP) + group, mask=is_row, other=0.0)[:, None]
                total_up += tl.dot(w_up.to(dtype), v) * each_up * factor
        else:
            v = tl.load(at_x + start, mask=seen, other=0.0, eviction_policy="evict_last")
            if GROUPED:
                w = _of_groups(w, scale, zero, row, is_row, start, K, ROWS, COLUMNS, GROUP, dtype)
                if GATED:
                    w_up = _of_groups(w_up, scale, zero, row + n, is_row, start, K, ROWS, COLUMNS, GROUP, dtype)
            total = tl.dot(w.to(dtype), v, total)
            if GATED:
                total_up = tl.dot(w_up.to(dtype), v, total_up)
    inside = is_row[:, None] & is_token[None, :]
    if x_scale is not None and not X_GROUPED:
        factor = tl.load(x_scale + token, mask=is_token, other=0.0)[None, :]
        total *= factor
        if GATED:
            total_up *= factor
    y = _finished(total, None if GROUPED else scale, bias, row, is_row, dtype)
    if GATED:
        y_up = _finished(total_up, None if GROUPED else scale, bias, row + n, is_row, dtype)
        y = (y * tl.sigmoid(y)).to(dtype).to(tl.float32) * y_up
    to = token[None, :] * n + row[:, None]
    if residual is not None:
        y = y.to(dtype).to(tl.float32) + tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + to, y.to(dtype), mask=inside)


@triton.jit
def _finished(total, scale, bias, row, is_row, dtype: tl.constexpr):
    if scale is not None:
        total *= tl.load(scale + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    return total.to(dtype).to(tl.float32)


@triton.jit
def _unpacked(
    words,
    scale,
    zero,
    table,
    row,
    is_row,
    start,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    dtype: tl.constexpr,
):
    # Returns eight tiles `[ROWS, COLUMNS / 8]`.
    BASE: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    COUNT: tl.constexpr = COLUMNS // GROUP if GROUP < COLUMNS else 1  # groups among the columns
    group = start // GROUP + tl.arange(0, COUNT)
    at = row[:, None] * (K // GROUP) + group[None, :]
    inside = is_row[:, None] & (group < K // GROUP)[None, :]
    s = tl.load(scale + at, mask=inside, other=0.0)
    if table is None:
        if zero is None:
            z = tl.full((ROWS, COUNT), BASE + 8, dtype)
        else:
            z = tl.load(zero + at, mask=inside, other=0).to(dtype) + BASE
        w = _nibbles(words, dtype)
        z, s = _of_words(z, ROWS, COUNT, COLUMNS // 8), _of_words(s, ROWS, COUNT, COLUMNS // 8)
        return (
            (w[0] - z) * s,
            (w[1] - z) * s,
            (w[2] - z) * s,
            (w[3] - z) * s,
            (w[4] - z) * s,
            (w[5] - z) * s,
            (w[6] - z) * s,
            (w[7] - z) * s,
        )
    else:
        s = _of_words(s, ROWS, COUNT, COLUMNS // 8)
        return (
            _looked_up(table, words, s, dtype),
            _looked_up(table, words >> 4, s, dtype),
            _looked_up(table, words >> 8, s, dtype),
            _looked_up(table, words >> 12, s, dtype),
            _looked_up(table, words >> 16, s, dtype),
            _looked_up(table, words >> 20, s, dtype),
            _looked_up(table, words >> 24, s, dtype),
            _looked_up(table, words >> 28, s, dtype),
        )


@triton.jit
def _of_groups(
    numbers,
    scale,
    zero,
    row,
    is_row,
    start,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    dtype: tl.constexpr,
):
    # Returns the weights of a tile of int8, `[ROWS, COLUMNS]`. The differences are exact, also in bfloat16.
    COUNT: tl.constexpr = COLUMNS // GROUP if GROUP < COLUMNS else 1
    group = start // GROUP + tl.arange(0, COUNT)
    at = row[:, None] * (K // GROUP) + group[None, :]
    inside = is_row[:, None] & (group < K // GROUP)[None, :]
    w = numbers.to(dtype)
    if zero is not None:
        z = tl.load(zero + at, mask=inside, other=0).to(dtype) - 128
        w -= _of_words(z, ROWS, COUNT, COLUMNS)
    return w * _of_words(tl.load(scale + at, mask=inside, other=0.0), ROWS, COUNT, COLUMNS)


@triton.jit
def _looked_up(table, words, scale, dtype: tl.constexpr):
    # A value comes in halves: loads of 32 bits would be copied to shared memory ahead, as the weight is, one by one.
    at = table + 2 * (words & 15)
    low, high = tl.load(at).to(tl.int32), tl.load(at + 1).to(tl.int32)
    return ((high << 16 | low & 0xFFFF).to(tl.float32, bitcast=True) * scale).to(dtype)


@triton.jit
def _of_words(x, ROWS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    shape: tl.constexpr = (ROWS, COUNT, WIDTH // COUNT)
    return tl.reshape(tl.broadcast_to(x[:, :, None], shape), (ROWS, WIDTH))


@triton.jit
def _nibbles(words, dtype: tl.constexpr):
    # Eight tiles: 128 (bfloat16) or 1024 (float16), which end in zeros, plus the number in each four bits. Two words at
    # a time, as a register holds two numbers.
    ONES: tl.constexpr = "0x43004300" if dtype == tl.bfloat16 else "0x64006400"
    END: tl.constexpr = ", 0x000f000f, " + ONES + ", 0xea;"
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        "{ .reg .b32 l, h, t; prmt.b32 l, $8, $9, 0x5410; prmt.b32 h, $8, $9, 0x7632;"
        "lop3.b32 $0, l" + END + "shr.u32 t, l, 4; lop3.b32 $1, t" + END + "shr.u32 t, l, 8; lop3.b32 $2, t" + END +
        "shr.u32 t, l, 12; lop3.b32 $3, t" + END + "lop3.b32 $4, h" + END + "shr.u32 t, h, 4; lop3.b32 $5, t" + END +
        "shr.u32 t, h, 8; lop3.b32 $6, t" + END + "shr.u32 t, h, 12; lop3.b32 $7, t" + END + "}",
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
        [words],
        dtype=(tl.uint16, tl.uint16, tl.uint16, tl.uint16, tl.uint16, tl.uint16, tl.uint16, tl.uint16),
        is_pure=True,
        pack=2,
    )  # fmt: skip
    return (
        a.to(dtype, bitcast=True),
        b.to(dtype, bitcast=True),
        c.to(dtype, bitcast=True),
        d.to(dtype, bitcast=True),
        e.to(dtype, bitcast=True),
        f.to(dtype, bitcast=True),
        g.to(dtype, bitcast=True),
        h.to(dtype, bitcast=True),
    )
