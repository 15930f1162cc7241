"""Asynchronous copies between host and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    """The inputs of one step, written by the host and read by the device, always in the same memory."""

    def __init__(self, device: torch.device, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.on_device = {n: torch.zeros(shape, dtype=dtype, device=device) for n, (dtype, shape) in shapes.items()}
        self._device = device
        self._hosts = []  # two, so that one is filled while the other is copied
        for _ in range(2 if device.type == "cuda" else 0):
            pinned = {n: torch.zeros(shape, dtype=dtype, pin_memory=True) for n, (dtype, shape) in shapes.items()}
            self._hosts.append((pinned, torch.cuda.Event()))

    def fill(self) -> dict[str, np.ndarray]:
        """Return the arrays to fill with the next step's inputs, before `send`."""
        if not self._hosts:
            return {n: x.numpy() for n, x in self.on_device.items()}
        self._hosts.reverse()
        pinned, sent = self._hosts[0]
        sent.synchronize()
        return {n: x.numpy() for n, x in pinned.items()}

    def send(self) -> None:
        """Copy the filled arrays to the device, without synchronising."""
        for pinned, sent in self._hosts[:1]:
            for name, x in pinned.items():
                self.on_device[name].copy_(x, non_blocking=True)
            sent.record(torch.cuda.current_stream(self._device))


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
