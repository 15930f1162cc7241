"""One row times a weight of 4 bits on CUDA: compile and launch `int4_gemv.cu`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor

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
    given = [None if t is None else _aligned(t) for t in (x, numbers, scale, zero, bias, norm_weight, residual)]
    values = (*(0 if tensor is None else tensor.data_ptr() for tensor in (*given, out)), eps)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = min(-(-len(numbers) // _ROWS), _BLOCKS * processors), 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = 32 * _WARPS, 1, 1
    config.sharedMemBytes, config.hStream = _memory(k), torch.cuda.current_stream(x.device).cuda_stream
    if torch.cuda.get_device_capability(x.device) >= (9, 0):  # it may start while the last blocks of another run
        overlap = driver.CUlaunchAttribute()
        overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [overlap], 1
    with torch.cuda.device(x.device):
        kernel = _kernel(n, k, k // scale.shape[1], x.dtype == torch.float16, gated, x.device.index)
        _checked(driver.cuLaunchKernelEx(config, kernel, (values, _TYPES), 0))
    return out


def takes(x: Tensor) -> bool:
    """Return whether it multiplies x `[K]`."""
    device: Any = torch.cuda.get_device_properties(x.device)
    return x.dtype.itemsize == 2 and device.major >= 8 and _memory(len(x)) < device.shared_memory_per_block_optin - 4096


def _aligned(x: Tensor) -> Tensor:
    """Return a tensor, or a copy of it, that can be read 16 bytes at a time."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _memory(k: int) -> int:
    """Return the shared memory of a block, in bytes, but for sums."""
    columns = -(-k // (2 * _BYTES)) * 2 * _BYTES  # in whole pieces
    return _WARPS * _STAGES * _ROWS * _BYTES + 2 * columns + columns // 8


@functools.cache
def _kernel(n: int, k: int, group: int, half: bool, gated: bool, device: int) -> Any:
    """Return the kernel for n results of rows of k numbers, compiled, which takes half a second."""
    binary = compiled(torch.cuda.get_device_capability(device), n, k, group, half, gated)
    kernel = _checked(driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(binary)), b"int4_gemv"))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(kernel, most, _memory(k)))
    return kernel


def compiled(capability: tuple[int, int], n: int, k: int, group: int, half: bool, gated: bool) -> bytes:
    """Compile the kernel for a compute capability. Raises RuntimeError with the compiler's message."""
    defined = {"N": n, "K": k, "GROUP": group, "HALF": int(half), "GATED": int(gated)}
    defined |= {"WARPS": _WARPS, "STAGES": _STAGES}
    options = ["--gpu-architecture=sm_{}{}".format(*capability), "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in defined.items()]
    program = _checked(nvrtc.nvrtcCreateProgram(_SOURCE.read_bytes(), _SOURCE.name.encode(), 0, [], []))
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{_SOURCE.name} does not compile: {log.decode(errors='replace')[:500]}")
        binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary
    finally:
        _checked(nvrtc.nvrtcDestroyProgram(program))


def _checked(result: tuple[Any, ...]) -> Any:
    """Return the value of a call, without its error code. Raises RuntimeError for an error."""
    error, *values = result
    if error:
        raise RuntimeError(f"CUDA: {error!r}")
    return values[0] if values else None
