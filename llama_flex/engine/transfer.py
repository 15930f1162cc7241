"""Asynchronous copies between host and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def to_device_async(x: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device, without synchronising."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def pad_rows(rows: Sequence[Sequence[float]], size: int, dtype: torch.dtype) -> Tensor:
    """Return rows of numbers as one tensor `[R, size]`, padded with zeros."""
    padded = torch.zeros(len(rows), size, dtype=dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=dtype)
    return padded


_ALIGNMENT = 64  # bytes: every input begins where vectors may be loaded


class StagingBuffer:
    """The inputs of one step, written by the host and read by the device, always in the same memory: one block, for
    one copy."""

    def __init__(self, device: torch.device, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        size, parts = 0, dict[str, tuple[int, torch.dtype, tuple[int, ...]]]()
        for name, (dtype, shape) in shapes.items():
            start = -(-size // _ALIGNMENT) * _ALIGNMENT
            parts[name] = start // dtype.itemsize, dtype, shape
            size = start + math.prod(shape) * dtype.itemsize
        self._device, self._block = device, torch.zeros(size, dtype=torch.uint8, device=device)
        self.on_device = _split(self._block, parts)
        self._hosts = []  # two, so that one is filled while the other is copied
        for _ in range(2 if device.type == "cuda" else 0):
            pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
            self._hosts.append((pinned, _split(pinned, parts), torch.cuda.Event()))

    def fill(self) -> dict[str, np.ndarray]:
        """Return the arrays to fill with the next step's inputs, before `send`."""
        arrays = self.on_device
        if self._hosts:
            self._hosts.reverse()
            _, arrays, sent = self._hosts[0]
            sent.synchronize()
        return {name: x.numpy() for name, x in arrays.items()}

    def send(self) -> None:
        """Copy the filled arrays to the device, without synchronising."""
        for pinned, _, sent in self._hosts[:1]:
            self._block.copy_(pinned, non_blocking=True)
            sent.record(torch.cuda.current_stream(self._device))


def _split(block: Tensor, parts: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Return parts of a block of memory as tensors of their own: compilers would trace views to their base. parts: for
    each its first element, dtype and shape."""
    found = {}
    for name, (start, dtype, shape) in parts.items():
        stride = torch.empty(shape, device="meta").stride()
        found[name] = torch.empty(0, dtype=dtype, device=block.device).set_(
            block.untyped_storage(), start, shape, stride
        )
    return found


def read_async(x: Tensor) -> Callable[[], list[list[float]]]:
    """Enqueue a copy of x from GPU to host; return a function that waits for this copy alone and returns its values."""
    if not x.is_cuda:
        return x.tolist
    copied, done = torch.empty_like(x, device="cpu", pin_memory=True), torch.cuda.Event()
    copied.copy_(x, non_blocking=True)
    done.record(torch.cuda.current_stream(x.device))

    def read() -> list[list[float]]:
        done.synchronize()
        return copied.tolist()

    return read
