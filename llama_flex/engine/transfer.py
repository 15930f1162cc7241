"""Asynchronous copies between host and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


class StagingBuffer:
    """The inputs of one step, written by the host and read by the device, always in the same memory: one block, for
    one copy."""

    def __init__(self, device: torch.device, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._device, self._shapes = device, shapes
        self._block = self._allocate(device=device)
        self.on_device = self._split(self._block)
        self._hosts = []  # two, so that one is filled while the other is copied
        for _ in range(2 if device.type == "cuda" else 0):
            pinned = self._allocate(pin_memory=True)
            self._hosts.append((pinned, self._split(pinned), torch.cuda.Event()))

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

    def _allocate(self, **options: Any) -> Tensor:
        sizes = (_aligned(math.prod(shape) * dtype.itemsize) for dtype, shape in self._shapes.values())
        return torch.zeros(sum(sizes), dtype=torch.uint8, **options)

    def _split(self, block: Tensor) -> dict[str, Tensor]:
        """Return the block's parts as tensors of their own, not views, which compilers would trace to their base."""
        parts, start, storage = {}, 0, block.untyped_storage()
        for name, (dtype, shape) in self._shapes.items():
            stride = torch.empty(shape, device="meta").stride()
            empty = torch.empty(0, dtype=dtype, device=block.device)
            parts[name] = empty.set_(storage, start // dtype.itemsize, shape, stride)
            start += _aligned(math.prod(shape) * dtype.itemsize)
        return parts


def _aligned(size: int) -> int:
    """Round a number of bytes up, so that every part begins where vectors may be loaded."""
    return -(-size // 64) * 64


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
