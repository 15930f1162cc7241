"""Some rows times a weight of 4 bits on Hopper: compile and launch `int4_matmul.cu`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cuda_cpp
from .weight import CHUNK, tokens_of

_SOURCE = Path(__file__).with_suffix(".cu")
_ROWS, _THREADS = 128, 256  # rows of the weight in a tile, threads of a block
Shape = tuple[int, int, int, int]  # see `shape_of`
_TYPES = (*[ctypes.c_void_p] * 7, *[ctypes.c_int] * 3)


def matmul(
    x: Tensor,
    m: int,
    numbers: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """Compute `few_rows.few_rows` of a weight of 4 bits for m rows in 16 bits, laid out by `weight.in_chunks`."""
    k, n = 8 * numbers.shape[1], len(numbers) // (1 + gated)
    out = x.new_empty(m, n)
    given = [None if t is None else cuda_cpp.aligned(t) for t in (x, numbers, scale, zero, bias, residual)]
    device: Any = torch.cuda.get_device_properties(x.device)
    shape = tokens, tiles, split, _ = shape_of(m, len(numbers), k, device.multi_processor_count)
    blocks = split * -(-m // tokens) * -(-len(numbers) // (tiles * _ROWS))
    with torch.cuda.device(x.device):
        kernel = _kernel(shape, k // scale.shape[1], x.dtype == torch.float16, gated, x.device.index)
        cuda_cpp.launch(kernel, blocks, _THREADS, _memory(shape), (*given, out, m, n, k), _TYPES, cluster=split)
    return out


def _memory(shape: Shape) -> int:
    """Return the shared memory of a block, in bytes: for chunks of the weight and of x."""
    tokens, tiles, _, stages = shape
    return stages * (tiles * _ROWS * CHUNK // 2 + tokens * CHUNK * 2)


def shape_of(m: int, rows: int, k: int, processors: int) -> Shape:
    """Return how many rows of x and tiles of the weight a block takes, how many blocks share the columns, and how many
    chunks are under way."""
    tokens = tokens_of(m)
    tiles, stages = 2 if 64 <= tokens <= 128 else 1, 5 if tokens <= 32 else 4 if tokens <= 128 else 3
    at_a_time = processors * (2 if tokens <= 32 else 1)
    blocks, chunks = -(-m // tokens) * -(-rows // (tiles * _ROWS)), -(-k // CHUNK)

    def cost(split: int) -> float:  # a block's start and end take as long as some chunks
        return -(-blocks * split // at_a_time) * (-(-chunks // split) + 3)

    return tokens, tiles, min((1, 2, 4), key=cost), stages


@functools.cache
def _kernel(shape: Shape, group: int, half: bool, gated: bool, device: int) -> Any:
    """Return the kernel, compiled, which takes a second."""
    return cuda_cpp.load(compiled(shape, group, half, gated), "int4_matmul", _memory(shape))


def compiled(shape: Shape, group: int, half: bool, gated: bool) -> bytes:
    """Compile the kernel. Raises RuntimeError with the compiler's message."""
    defined = dict(zip(("TOKENS", "TILES", "SPLIT", "STAGES"), shape, strict=True))
    defined |= {"GROUP": group, "HALF": half, "GATED": gated}
    return cuda_cpp.compiled(_SOURCE, "sm_90a", defined, _multiply(shape[0], half))


def _multiply(tokens: int, half: bool) -> str:
    """Return the function that adds a product of 16 columns to a warp's sums."""
    count, dtype = tokens // 2, "f16" if half else "bf16"
    sums = ", ".join(f"%{i}" for i in range(count))
    others = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""
static __device__ void multiply(float (&d)[{count}], const unsigned (&a)[4], unsigned long long b) {{
    asm volatile("{{ .reg .pred add; setp.eq.u32 add, 0, 0; "
        "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{dtype}.{dtype} "
        "{{{sums}}}, {{{others}}}, %{count + 4}, add, 1, 1, 0; }}"
        : {outputs} : {inputs}, "l"(b));
}}
"""
