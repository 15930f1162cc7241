"""One row times a weight of 4 bits on CUDA: compile and launch `int4_gemv.cu`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cuda_cpp

_SOURCE = Path(__file__).with_suffix(".cu")
_ROWS, _BYTES = 16, 128  # rows of the weight in a block, and bytes of each that a warp fetches at a time
_WARPS, _STAGES, _BLOCKS = 8, 2, 3  # of a block, pieces that each has in flight, blocks of a processor: best on an H200
_TYPES = (*[ctypes.c_void_p] * 8, ctypes.c_float)


def gemv(
    x: Tensor,
    numbers: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """Compute `gemv.gemv` of a weight of 4 bits for x `[K]` in 16 bits -> `[N]`; gated: `[N/2]`."""
    n, k = len(numbers) // (1 + gated), len(x)
    out = x.new_empty(n)
    given = [None if t is None else cuda_cpp.aligned(t) for t in (x, numbers, scale, zero, bias, norm_weight, residual)]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    blocks = min(-(-len(numbers) // _ROWS), _BLOCKS * processors)
    with torch.cuda.device(x.device):
        kernel = _kernel(n, k, k // scale.shape[1], x.dtype == torch.float16, gated, x.device.index)
        cuda_cpp.launch(kernel, blocks, 32 * _WARPS, _memory(k), (*given, out, eps), _TYPES)
    return out


def takes(x: Tensor) -> bool:
    """Return whether it multiplies x `[K]`."""
    device: Any = torch.cuda.get_device_properties(x.device)
    return x.dtype.itemsize == 2 and device.major >= 8 and _memory(len(x)) < device.shared_memory_per_block_optin - 4096


def _memory(k: int) -> int:
    """Return the shared memory of a block, in bytes, but for sums."""
    columns = -(-k // (2 * _BYTES)) * 2 * _BYTES  # in whole pieces
    return _WARPS * _STAGES * _ROWS * _BYTES + 2 * columns + columns // 8


@functools.cache
def _kernel(n: int, k: int, group: int, half: bool, gated: bool, device: int) -> Any:
    """Return the kernel for n results of rows of k numbers, compiled, which takes half a second."""
    binary = compiled(torch.cuda.get_device_capability(device), n, k, group, half, gated)
    return cuda_cpp.load(binary, "int4_gemv", _memory(k))


def compiled(capability: tuple[int, int], n: int, k: int, group: int, half: bool, gated: bool) -> bytes:
    """Compile the kernel for a compute capability. Raises RuntimeError with the compiler's message."""
    defined = {"N": n, "K": k, "GROUP": group, "HALF": half, "GATED": gated, "WARPS": _WARPS, "STAGES": _STAGES}
    return cuda_cpp.compiled(_SOURCE, "sm_{}{}".format(*capability), defined)
