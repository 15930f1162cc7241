"""Kernel and tile choices for FlexAttention, measured on CUDA, and the context for eager runs."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..usercode.errors import FunctionError, diagnose


def padded_group(group: int) -> int:
    """Return the size to which a group of query heads is padded: CUDA's decoding kernel takes 1, 2, 4, 8, ... heads;
    other groups would go to a kernel that is twice as slow."""
    return 1 << (group - 1).bit_length()


def describe(device: torch.device, queries: int, group: int, mask_heads: int, flash: bool = False) -> str:
    """Say which kernel compiled attention runs, and why. mask_heads: 1 if the mask is the same for all heads. flash:
    whether FlashAttention computes long chunks."""
    if device.type == "cpu":
        return "Inductor's C++ FlexAttention, the only one on a CPU"
    if queries > 1:
        longer = f"; flash-attn-4 from {_LONG} queries on, if slots are contiguous" if flash else ""
        return f"Inductor's Triton FlexAttention: many queries{longer}"
    if mask_heads > 1 and group > 1:
        return "Inductor's Triton FlexAttention: a mask that differs between heads, and keys shared by several heads"
    padded = "" if padded_group(group) == group else f", groups of {group} heads padded to {padded_group(group)}"
    return f"Inductor's Triton flex decoding: one query{padded}"


# Queries and slots per tile of CUDA's kernels, and the number of tiles they load ahead. The first is the best on an
# H200 in 16 bits with 32/8 heads of 128: decoding at a context of 4,096 takes 15 us instead of torch's 20, and 2,048
# queries against themselves 124 instead of 141. In float32, the second is. The others are for less shared memory.
_TILES = ((64, 64, 3), (32, 64, 3), (32, 32, 3), (32, 32, 2), (16, 16, 1))
# One page per tile is better for decoding: 64 rows of 1,024 slots take 77 us instead of 87.
_TILE_OF_PAGES = 64, 128, 2
# 8,192 queries against 32,768 slots, with heads of 128, take 8.4 ms instead of 9.2 if TMA loads these tiles, and 7.9
# with the larger ones, which leave too little shared memory for masks and score functions that look up tables.
_TILE_OF_LONG, _TILE_OF_PLAIN = (128, 64, 3), (128, 128, 3)
_LONG = 8192
_PROGRAMS = 1024  # enough to keep an H200 busy: parts of the slots, times rows, times key/value heads


@functools.cache
def has_flash(device: torch.device) -> bool:
    """Return whether flash-attn-4, FlexAttention's other backend, is installed and has kernels for a device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return any(importlib.metadata.distributions(name="flash-attn-4"))


def flash_takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether flash-attn-4 has kernels for a dtype and head dimension."""
    return dtype.itemsize == 2 and head_dim in (64, 96, 128)


def kernel_options(q: Tensor, k: Tensor, paged: bool, plain: bool, flash: bool) -> Any:
    """Return FlexAttention's kernel options on CUDA: the sizes of tiles, and the choice of kernel. plain, flash: see
    `masks.plan.LayerAttention`; flash-attn-4 takes 0.4 ms to launch, so it is for long chunks, and no keys of 8 bits.

    For 2 to 127 queries torch 2.11 would choose its decoding kernel, which does not compile or gives wrong results.

    That kernel splits the slots into parts: here one per 256 or so, fewer in a batch. By default torch makes the same
    number of parts for any number of slots, and gives each its share of the list of blocks: in a long cache, one part
    then gets all the blocks of a window and works through them alone. If all blocks are in one list, as for pages,
    torch divides that list, so there are as many parts as keep a GPU busy.
    """
    row = (1 << (q.shape[3] - 1).bit_length()) * q.itemsize  # bytes; the kernels pad the head dim
    device: Any = torch.cuda.get_device_properties(q.device)
    most = device.shared_memory_per_block_optin
    long = not paged and q.itemsize == 2 and k.dtype == q.dtype and q.shape[2] >= _LONG
    if long and flash and flash_takes(q.dtype, q.shape[3]) and not torch.is_grad_enabled():
        return {"BACKEND": "FLASH"}
    tiles = _TILES if q.itemsize == 2 else _TILES[1:]
    if paged and q.itemsize == 2 and q.shape[2] == 1:
        tiles = (_TILE_OF_PAGES, *tiles)
    if long and q.shape[3] > 64:
        tiles = (*((_TILE_OF_PLAIN,) if plain else ()), _TILE_OF_LONG, *tiles)
    fitting = [tile for tile in tiles if (tile[0] + 2 * tile[1] * tile[2]) * row <= most]
    rows, slots, stages = tile = (*fitting, _TILES[-1])[0]
    options = {"fwd_BLOCK_N": slots, "fwd_num_warps": 4, "fwd_num_stages": stages}
    options |= {"fwd_num_warps": 8, "fwd_USE_TMA": True} if tile in (_TILE_OF_LONG, _TILE_OF_PLAIN) else {}
    if q.shape[2] > 1:
        return options | {"fwd_BLOCK_M": rows, "FORCE_USE_FLEX_ATTENTION": True}
    parts = _PROGRAMS // (len(q) * k.shape[1]) if paged else max(k.shape[2] // 256, 16) // len(k)
    return options | {"SPLIT_KV": 1 << max(parts.bit_length() - 1, 0)}


@contextmanager
def eager_errors(functions: str) -> Iterator[None]:
    """Run flex_attention eagerly without its warning that this is slow: the caller chose to.

    It traces the mask and the score function all the same. Raises FunctionError, in one line instead of the many that
    torch logs, if it cannot trace them; functions: their description.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(_is_no_failed_trace)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            yield
    except (IndexError, RuntimeError) as error:
        from torch._dynamo.exc import Unsupported, UserError  # slow to import; flex_attention has done so by now

        what, fault = diagnose(error)
        if isinstance(error, Unsupported | UserError) or what == "index-out-of-range":
            raise FunctionError(functions, what, fault) from error
        raise
    finally:
        log.removeFilter(_is_no_failed_trace)


def _is_no_failed_trace(record: logging.LogRecord) -> bool:
    return "failed while attempting to run meta" not in record.getMessage()
