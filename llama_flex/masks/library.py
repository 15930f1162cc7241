"""Named masks, from causal to trees of drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..tokens import Token, take
from .mask import Mask

SHARED = 0  # the segment that every fused prompt sees
GENERATED = -1  # the segment of generated text, which sees every fused prompt

Parameter: TypeAlias = int | Tensor  # one number for all rows, or a tensor [B] with one per row


def _backward(function: Callable[[Token, Token], Tensor | bool], name: str) -> Mask:
    """Make a named mask under which no token attends to a later one."""
    return Mask(function, name, never_looks_ahead=True)


def causal() -> Mask:
    """Let each token attend to itself and to the tokens that arrived before it."""
    return _backward(lambda q, kv: kv.index <= q.index, "causal()")


def bidirectional() -> Mask:
    """Let every token attend to every other."""
    return Mask(lambda q, kv: True, "bidirectional()")


def trained_mask(window: int | None, is_causal: bool) -> Mask:
    """Make the mask with which a layer was trained; window: its sliding window, or None."""
    if is_causal:
        return causal() if window is None else sliding_window(window)
    return bidirectional() if window is None else bidirectional_window(window)


def sliding_window(width: Parameter) -> Mask:
    """Let each token attend to the last `width` tokens, itself included, as in transformers."""
    name = named("sliding_window", width, 1)
    return _backward(lambda q, kv: (kv.index <= q.index) & (q.index - kv.index < of_row(width, q)), name)


def bidirectional_window(reach: Parameter) -> Mask:
    """Let each token attend up to `reach` tokens before and after it: transformers' window if `is_causal` is false."""
    name = named("bidirectional_window", reach, 0)
    return Mask(lambda q, kv: (q.index - kv.index).abs() <= of_row(reach, q), name)


def sink(count: Parameter) -> Mask:
    """Let each token attend to the first `count` tokens, except those that arrived after it (arXiv:2309.17453)."""
    name = named("sink", count, 0)
    return _backward(lambda q, kv: (kv.index <= q.index) & (kv.index < of_row(count, q)), name)


def prefix_lm(length: Parameter) -> Mask:
    """Attend causally, but within the first `length` tokens in both directions (arXiv:1910.10683).

    In a cache the prefix must be appended in one piece: a token cannot attend to tokens that have not arrived.
    """
    name = named("prefix_lm", length, 0)
    return Mask(
        lambda q, kv: (kv.index <= q.index) | (q.index < of_row(length, q)) & (kv.index < of_row(length, q)), name
    )


def chunked(size: Parameter) -> Mask:
    """Attend causally within chunks of `size` tokens, and never across chunks."""
    name = named("chunked", size, 1)
    return _backward(
        lambda q, kv: (kv.index <= q.index) & (kv.index // of_row(size, q) == q.index // of_row(size, q)), name
    )


def dilated(step: Parameter) -> Mask:
    """Attend causally to every `step`-th token, counted back from the token itself (arXiv:2004.05150)."""
    name = named("dilated", step, 1)
    return _backward(lambda q, kv: (kv.index <= q.index) & ((q.index - kv.index) % of_row(step, q) == 0), name)


def global_tokens(indices: Sequence[int] | Tensor) -> Mask:
    """Let the tokens at `indices` attend to all, and all to them (arXiv:2004.05150); combine with `causal()`.

    indices: numbers, the same for every row; or a boolean tensor `[N]` or `[B, N]` that marks them among the first N.
    """
    if not isinstance(indices, Tensor):
        if not len(indices) or min(indices) < 0:
            raise ValueError(f"global_tokens needs indices of at least 0, not {list(indices)}")
        marked = torch.zeros(max(indices) + 1, dtype=torch.bool)
        marked[list(indices)] = True
    elif indices.dtype == torch.bool and indices.dim() in (1, 2) and indices.shape[-1]:
        marked = indices
    else:
        raise ValueError(f"global_tokens needs indices or booleans [N] or [B, N], not {_kind(indices)}")

    def predicate(q: Token, kv: Token) -> Tensor:
        return _marked(marked, q) | _marked(marked, kv)

    return Mask(predicate, f"global_tokens({_kind(indices) if isinstance(indices, Tensor) else list(indices)})")


def document() -> Mask:
    """Let each token attend to the tokens of its own segment; combine with `causal()`."""
    return Mask(lambda q, kv: q.segment == kv.segment, "document()")


def segments_from_positions(positions: Tensor) -> Tensor:
    """Number the documents of packed rows from 0: one begins wherever a position is not one more than the last, as in
    transformers. positions: whole rows `[B, T]`; returns segments for `document()`, `[B, T]`, int32. Raises ValueError.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.is_floating_point():
        found = _kind(positions) if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"positions must be a tensor of integers [batch, tokens], not {found}")
    positions = positions.long()
    begins = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
    return begins.cumsum(1, dtype=torch.int32)


def shared_prefix(length: Parameter) -> Mask:
    """Attend causally within each segment, and to the first `length` tokens whatever their segment."""
    name = named("shared_prefix", length, 0)
    return _backward((causal() & (document() | sink(length))).function, name)


def fused() -> Mask:
    """Attend causally, with prompts side by side: a prompt to its own segment and the shared one (segment 0), generated
    tokens (segment -1) to everything. Without segments the same as `causal()`. See `llama_flex.fuse`."""
    return _backward(
        lambda q, kv: (
            (kv.index <= q.index) & ((kv.segment == q.segment) | (kv.segment == SHARED) | (q.segment == GENERATED))
        ),
        "fused()",
    )


def tree(parents: Sequence[int] | Tensor, start: Parameter = 0) -> Mask:
    """Let each token attend to itself and its ancestors in a tree, such as drafted continuations (arXiv:2305.09781).

    parents: the number of each node's parent, a smaller one, or -1 for a root; a tensor `[B, N]` has one tree per row.
    Node n is the token with index `start` + n. Every token attends to those before `start`, and tokens after the tree
    attend to all earlier ones. Raises ValueError for a parent that is not an earlier node.
    """
    place = named("start", start, 0)
    table = torch.as_tensor(parents)
    if not table.numel() or table.dim() not in (1, 2) or table.is_floating_point():
        raise ValueError(f"tree needs a parent for each node, integers [N] or [B, N], not {_kind(table)}")
    # Nodes are numbered in depth-first order: node n and its descendants have the numbers enter[n] to leave[n] - 1, so
    # two tables of N numbers replace one of N x N.
    walks = [_depth_first(row) for row in table.reshape(-1, table.shape[-1]).tolist()]
    enter, leave = torch.tensor(walks, dtype=torch.int32, device=table.device).unbind(1)  # [number of trees, N]
    enter, leave = enter.clone().view(table.shape), leave.clone().view(table.shape)  # not aliases
    count = table.shape[-1]

    def predicate(q: Token, kv: Token) -> Tensor:
        node, other = q.index - of_row(start, q), kv.index - of_row(start, q)
        number, first, end = lookup(enter, q, node), lookup(enter, kv, other), lookup(leave, kv, other)
        ancestor = (first <= number) & (number < end)
        return (kv.index <= q.index) & (ancestor | (other < 0) | (node >= count))

    return _backward(predicate, f"tree({_kind(table)}, {place})")


def _depth_first(parents: list[int]) -> tuple[list[int], list[int]]:
    """Return each node's number in depth-first order, and the first number after those of its descendants."""
    sizes = [1] * len(parents)
    for node in range(len(parents) - 1, -1, -1):
        if not -1 <= parents[node] < node:
            raise ValueError(
                f"tree: node {node} has parent {parents[node]}; a parent must be an earlier node, or -1 for a root"
            )
        if parents[node] >= 0:
            sizes[parents[node]] += sizes[node]
    enter, free, roots = [], [0] * len(parents), 0  # free: the next free number below each node
    for node, parent in enumerate(parents):
        number = roots if parent < 0 else free[parent]
        if parent < 0:
            roots += sizes[node]
        else:
            free[parent] += sizes[node]
        enter.append(number)
        free[node] = number + 1
    return enter, [number + size for number, size in zip(enter, sizes, strict=True)]


def _marked(table: Tensor, token: Token) -> Tensor:
    return lookup(table, token, token.index) & (token.index < table.shape[-1])


def of_row(value: Parameter, token: Token) -> int | Tensor:
    """Return a parameter's value in the token's row: the one number for all, or its entry in a tensor `[B]`."""
    return take(value, token.batch) if isinstance(value, Tensor) and value.dim() else value


def lookup(table: Tensor, token: Token, at: Tensor) -> Tensor:
    """Look up entry `at` of a table `[N]`, or of the token's row of a table `[B, N]`; clamp `at` to the table."""
    at = at.clamp(0, table.shape[-1] - 1)
    return take(table, at) if table.dim() == 1 else take(table, token.batch, at)


def named(name: str, value: int | float | Tensor, least: float) -> str:
    """Return a function's name with its parameter. Raises ValueError for a number below `least`."""
    if isinstance(value, Tensor):
        return f"{name}({_kind(value)})"
    if not value >= least:  # NaN compares false
        raise ValueError(f"{name} needs a number of at least {least}, not {value}")
    return f"{name}({value})"


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
