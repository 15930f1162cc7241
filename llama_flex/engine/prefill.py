"""Append prompts to a cache in chunks of few sizes, so that prompts of all lengths share compiled steps.

Dimensions: R rows, N tokens of a row, T tokens of a chunk, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..interp.capture import Capture
from ..interp.hook_points import Probe
from ..masks.layout import last_tokens
from ..masks.mask import Mask
from ..masks.plan import AttentionPlan
from ..tokens import Tokens
from .model_runner import ModelRunner
from .paged_cache import RowCache
from .transfer import to_device_async

# Chunk sizes in tokens: the largest that the prompt still fills, the last one padded. A GPU needs large ones.
CHUNKS = {"cpu": (512, 128), "cuda": (8192, 2048, 512, 128)}
_LEAST_MEMORY = 40 * 10**9  # bytes of a GPU that has room for what a layer makes of the largest chunk


def prefill(
    runner: ModelRunner,
    rows: Sequence[np.ndarray],
    plan: AttentionPlan,
    cache: RowCache,
    probes: Mapping[int, Probe] | None = None,
    captures: Sequence[Capture] = (),
    adapters: Tensor | None = None,
) -> Iterator[Tensor]:
    """Append rows of tokens (ids, positions and segments, `[3, N]` each) to a cache; yield the last layer's output of
    each chunk, `[R, T, E]`.

    If any token sees one of a later chunk, all are computed in one chunk. Shorter rows are padded at the end. adapters:
    see `Llama.step`.
    """
    device = runner.model.device
    sizes = _sizes(runner, len(rows), cache.largest_append)
    longest = max(row.shape[1] for row in rows)
    whole = 1 << (-(-longest // sizes[-1]) * sizes[-1] - 1).bit_length()
    width = max(whole, longest + 2 * sizes[-1])  # if chunks are split, the last one reaches further
    padded = np.zeros((3, len(rows), width), np.int64)
    for n, row in enumerate(rows):
        padded[:, n, : row.shape[1]] = row
    ids, positions, segments = to_device_async(torch.from_numpy(padded), device).unbind(0)
    positions, segments = positions.to(torch.int32), segments.to(torch.int32)
    length = to_device_async(torch.tensor([row.shape[1] for row in rows], dtype=torch.int32), device)
    chunks = _chunks(longest, sizes, cache.largest_append)
    if masks := tuple(v.mask for v in plan.variants if not v.mask.never_looks_ahead):
        column = torch.arange(width, dtype=torch.int32, device=device)
        index = torch.where(column < length[:, None], cache.length[:, None] + column, -1)
        if _looks_ahead(runner, masks, Tokens(index, positions, segments), chunks, whole):
            chunks = _chunks(longest, (whole,), cache.largest_append)
    for start, size, count in chunks:
        here = (length - start).clamp(0, count)
        chunk = [_part(x, start, start + size) for x in (ids, positions, segments)]
        with cache.appending(count):
            output, captured = runner.step(chunk[0], here, chunk[1], chunk[2], plan, cache, probes, adapters)
            for each in captures:
                assert captured is not None
                each.add(captured, plan, cache)
        yield output[:, :count]


def newest_outputs(rows: Sequence[np.ndarray], outputs: Iterable[Tensor]) -> Iterator[Tensor | None]:
    """Yield None for each chunk but the last, and then the outputs `[R, 1, E]` at each row's last token."""
    counts, ends, start = torch.tensor([row.shape[1] for row in rows], device="cpu"), None, 0
    for x in outputs:
        left = counts - start
        here = (left > 0) & (left <= x.shape[1])
        if here.any():
            end = last_tokens(x, to_device_async(left.clamp(0, x.shape[1]), x.device), 1)
            # A row that has not ended yet gets anything.
            ends = end if ends is None else torch.where(to_device_async(here, x.device)[:, None, None], end, ends)
        start += x.shape[1]
        yield ends if start == counts.max() else None


def _sizes(runner: ModelRunner, rows: int, most: int) -> tuple[int, ...]:
    """Return the chunk sizes for so many rows, of which at most so many tokens are appended at a time."""
    device = runner.model.device
    sizes = CHUNKS[device.type]
    if runner.backend == "dense":
        sizes = sizes[-2:]  # a dense chunk takes memory for each slot
    elif device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        sizes = sizes if rows == 1 and memory >= _LEAST_MEMORY else sizes[1:]
    # In a larger one than `most` needs, the rest would be padding.
    return tuple(size for size, smaller in zip(sizes, (*sizes[1:], -1), strict=True) if smaller < most)


def _looks_ahead(
    runner: ModelRunner, masks: tuple[Mask, ...], tokens: Tokens, chunks: Sequence[tuple[int, int, int]], width: int
) -> bool:
    """Return whether any of these tokens sees one of a later chunk, among the first `width`, under any of the masks.

    They are evaluated, at the cost of making the block lists of the chunks: compiled if steps are, else only for the
    cells in question.
    """
    heads, found, longest = runner.model.dims.num_heads, [], sum(chunks[-1][::2])
    column = torch.arange(tokens.index.shape[1], device=tokens.index.device)
    for start, size, count in chunks[:-1]:
        end = start + count
        here, later = (
            tokens._replace(index=tokens.index.masked_fill(out, -1)) for out in (column >= end, column < end)
        )
        q = Tokens(*(_part(x, start, start + size) for x in here))
        kv = Tokens(*(_part(x, 0, width) if runner.compile else _part(x, end, longest) for x in later))
        run = runner.run_for(q.index.shape, kv.index.shape, *(mask.structure() for mask in masks))
        found.append(run("looks ahead", _sees_any, masks, q, kv, heads))
    return bool(found) and bool(torch.stack(found).any())


def _chunks(longest: int, sizes: Sequence[int], most: int) -> list[tuple[int, int, int]]:
    """Split prompts of up to `longest` tokens into chunks: for each its start, its size with padding, and how many of
    its tokens are appended, at most `most`, since a rolling cache may have less room than a chunk."""
    padded, start, chunks = -(-longest // sizes[-1]) * sizes[-1], 0, []
    while start < longest:
        size = next((size for size in sizes if start + size <= padded), sizes[-1])
        chunks.append((start, size, min(size, longest - start, most)))
        start += max(chunks[-1][2], 1)  # a full cache appends none, and raises an error on the attempt
    return chunks


def _part(x: Tensor, start: int, end: int) -> Tensor:
    """Copy columns of `[R, T]`: a slice keeps the strides of the whole, and every new stride would recompile."""
    return x[:, start:end].clone(memory_format=torch.contiguous_format)


def _sees_any(masks: Sequence[Mask], q: Tokens, kv: Tokens, num_heads: int) -> Tensor:
    """Return whether any query q, padding aside, sees any key kv under any of the masks, as a boolean tensor."""
    real = Mask(lambda q, kv: q.index >= 0)
    return torch.stack([(real & mask).blocks(q, kv, num_heads)[1].any() for mask in masks]).any()
