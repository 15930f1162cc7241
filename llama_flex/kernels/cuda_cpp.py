"""Compile kernels in CUDA C++ with NVRTC, and launch them by the driver; both come with torch's CUDA builds only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor


def compiled(source: Path, architecture: str, defined: Mapping[str, int], before: str = "") -> bytes:
    """Compile a file for an architecture, such as "sm_90a". before: code that precedes it. Raises RuntimeError with the
    compiler's message."""
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        f"--include-path={source.parent}",
        *(f"-D{name}={int(x)}" for name, x in defined.items()),
    ]
    code = before.encode() + source.read_bytes()
    program = checked(nvrtc.nvrtcCreateProgram(code, source.name.encode(), 0, [], []))
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]:
            log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{source.name} does not compile: {log.decode(errors='replace')[:500]}")
        binary = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary
    finally:
        checked(nvrtc.nvrtcDestroyProgram(program))


def load(binary: bytes, name: str, memory: int) -> Any:
    """Load a kernel on the current device. memory: the most shared memory that it is launched with, in bytes."""
    kernel = checked(driver.cuModuleGetFunction(checked(driver.cuModuleLoadData(binary)), name.encode()))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(kernel, most, memory))
    return kernel


def launch(
    kernel: Any, blocks: int, threads: int, memory: int, values: Sequence[Any], types: Sequence[Any], cluster: int = 1
) -> None:
    """Launch a kernel on the current stream and device. values: its arguments, with a tensor or None for a pointer, of
    ctypes `types`. cluster: how many blocks share their memory. On devices that can, it starts while the last blocks of
    another one run, and has to wait for that itself (`griddepcontrol`)."""
    device = torch.cuda.current_device()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = memory, torch.cuda.current_stream(device).cuda_stream
    attributes = []
    if torch.cuda.get_device_capability(device) >= (9, 0):
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    if cluster > 1:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attributes[-1].value.clusterDim
        size.x, size.y, size.z = cluster, 1, 1
    config.attrs, config.numAttrs = attributes, len(attributes)
    given = tuple(0 if x is None else x.data_ptr() if isinstance(x, Tensor) else x for x in values)
    checked(driver.cuLaunchKernelEx(config, kernel, (given, tuple(types)), 0))


def aligned(x: Tensor) -> Tensor:
    """Return a tensor, or a copy of it, that can be read 16 bytes at a time."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def checked(result: tuple[Any, ...]) -> Any:
    """Return the value of a call, without its error code. Raises RuntimeError for an error."""
    error, *values = result
    if error:
        raise RuntimeError(f"CUDA: {error!r}")
    return values[0] if values else None
