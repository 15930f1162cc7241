"""The only call of flex_attention, and beside it the dense definition of what it computes.

Dimensions: B batch, H query heads, T query tokens, S slots, D head dim; K heads of keys and values, H a multiple of K.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from .faults import FunctionError, fault_of
from .masks import BlockLists, Mask, slot_of
from .paging import Packed, Pages
from .rules import Token, Tokens
from .scores import ScoreMod

Backend: TypeAlias = Literal["flex", "dense"]


class Pattern(NamedTuple):
    """How one layer attends: who sees whom, and what is done to the scores."""

    mask: Mask
    score_mod: ScoreMod | None = None


@dataclass(frozen=True)
class Layers:
    """The distinct patterns of a model, and which of them each layer has."""

    patterns: tuple[Pattern, ...]
    of_layer: tuple[int, ...]

    @cached_property
    def structure(self) -> Hashable:
        """What a compiled graph depends on; see `Rule.structure`."""
        rules = (rule for pattern in self.patterns for rule in pattern)
        return self.of_layer, tuple(rule and rule.structure() for rule in rules)


class View(NamedTuple):
    """A pattern's mask applied to the tokens at hand; made once per step, shared by the layers that have the pattern.

    visible: block lists for FlexAttention, or booleans `[B, 1 or H, T, S]`. pages: where the slots are in memory, if
    not in their order; the lists of a compiled step are of pages then. packed: how queries come, if not in rows.
    """

    q: Tokens
    kv: Tokens
    visible: BlockLists | Tensor
    pages: Pages | None = None
    packed: Packed | None = None


def view_of(
    pattern: Pattern,
    q: Tokens,
    kv: Tokens,
    num_heads: int,
    backend: Backend,
    pages: Pages | None = None,
    packed: Packed | None = None,
) -> View:
    """What each query sees: block lists (backend "flex") or booleans ("dense")."""
    if kv is q and not torch.compiler.is_compiling():
        # Eager FlexAttention keeps graphs of its own. Torch 2.13 fails with a TypeError where it would explain why one
        # of them does not fit, if the reason is that two tensors became one, as index and position may be too.
        q, kv = (Tokens(*(x.clone() for x in tokens)) for tokens in (q, kv))
    if backend == "dense":
        return View(q, kv, pattern.mask.dense(q, kv, num_heads), pages, packed)
    if pages is None or not torch.compiler.is_compiling():
        return View(q, kv, pattern.mask.block_lists(q, kv, num_heads), pages, packed)
    decoding = q.index.is_cuda and q.index.shape[1] == 1
    lists = pattern.mask.block_lists(q, kv, num_heads, together=decoding)
    # Rows of padding visit nothing. On a CPU they are NaN then, in padding and in the last page, which nobody reads.
    padding = (q.index < 0).all(1)[:, None, None]
    lists = lists._replace(partial_num=lists.partial_num.masked_fill(padding, 0))
    return View(q, kv, pages.listed(lists), pages, packed)


def try_last(layers: Layers, tokens: Tokens, num_heads: int) -> None:
    """Raise FunctionError for a mask or score function that fails where the last of tokens `[B, T]` is the query, such
    as by a table that is too short.

    On the CPU: on a GPU, an index out of bounds would be the end of the process.
    """
    tokens = Tokens(*(x.cpu() for x in tokens))
    at = tokens.index.argmax(1, keepdim=True)
    last = Tokens(*(x.gather(1, at) for x in tokens))
    for mask, score_mod in layers.patterns:
        mask.to("cpu").dense(last, tokens, num_heads)
        if score_mod is not None:
            scores = torch.zeros(len(at), num_heads, 1, tokens.index.shape[1])
            score_mod.to("cpu").dense(scores, last, tokens)


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, view: View) -> Tensor:
    """Scaled dot-product attention: q `[B, H, T, D]`, k and v `[B, K, S, D]` -> `[B, H, T, D]` in q's dtype. Of
    packed tokens q and the result are `[1, H, N, D]`.

    Keys and values are shared by groups of H/K query heads without being repeated in memory. A query that may attend to
    nothing gets 0. Raises ValueError for gradients through FlexAttention on the CPU, which has none.
    """
    if view.packed is not None:
        rows = view.packed.rows(q.transpose(1, 2)).transpose(1, 2)
        out = attend(rows, k, v, pattern, view._replace(packed=None))
        return view.packed.pack(out.transpose(1, 2)).transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    if view.pages is not None and not (isinstance(view.visible, BlockLists) and torch.compiler.is_compiling()):
        # Dense, or eager and then computed densely: over the slots of the rows, not over all that the pool has.
        k, v, view = view.pages.in_order(k), view.pages.in_order(v), view._replace(pages=None)
    if isinstance(view.visible, BlockLists):
        if not q.is_cuda and _wants_gradients(q, k, v, pattern.score_mod):
            raise ValueError("FlexAttention has no backward on the CPU; use torch.no_grad() or backend='dense'")
        # torch 2.13's compiled CPU kernel misreads strided values, such as a slice of a fused product: wrong by 100 %.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        score_mod = _score_mod(pattern, view)
        block_mask = pattern.mask.block_mask(view.q, view.kv, 1, view.visible, view.pages)
        decoding, padded = q.is_cuda and q.shape[2] == 1, _padded(group)
        if decoding and padded != group and view.visible.partial_num.shape[1] == 1:
            q = nn.functional.pad(q.unflatten(1, (-1, group)), (0, 0, 0, 0, 0, padded - group)).flatten(1, 2)
            score_mod = _score_mod(pattern, view, lambda h: h // padded * group + (h % padded).clamp(max=group - 1))
        with nullcontext() if torch.compiler.is_compiling() else _eagerly(pattern):
            out = flex_attention(
                q,
                k,
                v,
                score_mod=score_mod,
                block_mask=block_mask,
                enable_gqa=q.shape[1] != k.shape[1],
                kernel_options=_kernel_options(q, k, view.pages is not None) if q.is_cuda else None,
            )
        return out.unflatten(1, (k.shape[1], -1))[:, :, :group].flatten(1, 2)
    wide = v.to(torch.promote_types(v.dtype, torch.float32)).repeat_interleave(group, dim=1)
    return (weights(q, k, pattern, view) @ wide).to(q.dtype)


def _wants_gradients(q: Tensor, k: Tensor, v: Tensor, score_mod: ScoreMod | None) -> bool:
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    if score_mod is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False  # what is compiled cannot look through a rule for its tensors
    return score_mod.requires_grad()


def _score_mod(
    pattern: Pattern, view: View, head_of: Callable[[Tensor], Tensor] = lambda h: h
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """FlexAttention's score_mod. head_of: the model's head of the kernel's."""
    rule, (q, kv, _, pages, _) = pattern.score_mod, view
    if rule is None:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        h = head_of(h)
        slot = kv_idx if pages is None else slot_of(pages.block_of, b, kv_idx).clamp(min=0)
        return rule.evaluate(score, Token(q, b, h, q_idx), Token(kv, b, h, slot))

    return score_mod


def _padded(group: int) -> int:
    """CUDA's decoding kernel takes groups of 1, 2, 4, 8 heads; the others would go to one that is twice as slow."""
    return 1 << (group - 1).bit_length()


def kernel(device: torch.device, queries: int, group: int, mask_heads: int) -> str:
    """Which kernel compiled attention runs, and why. mask_heads: 1 if the mask is the same for all heads."""
    if device.type == "cpu":
        return "Inductor's C++ FlexAttention, the only one on a CPU"
    if queries > 1:
        return "Inductor's Triton FlexAttention: many queries"
    if mask_heads > 1 and group > 1:
        return "Inductor's Triton FlexAttention: a mask that differs between heads, and keys shared by several heads"
    padded = "" if _padded(group) == group else f", groups of {group} heads padded to {_padded(group)}"
    return f"Inductor's Triton flex decoding: one query{padded}"


# Queries and slots of a tile of CUDA's kernels, and for how many tiles ahead they load. The first is the best on an
# H200 with 16 bits, 32/8 heads of 128: decoding at a context of 4,096 takes 15 us instead of torch's 20, and 2,048
# queries against themselves 124 instead of 141. In float32 the second is. The others are for what does not fit.
_TILES = ((64, 64, 3), (32, 64, 3), (32, 32, 3), (32, 32, 2), (16, 16, 1))
# A page a tile is better where one query decodes: 64 rows of 1,024 slots take 77 us instead of 87.
_TILE_OF_PAGES = 64, 128, 2
_PROGRAMS = 1024  # that keep an H200 busy: parts of the slots, of all rows and key heads together


def _kernel_options(q: Tensor, k: Tensor, paged: bool) -> Any:
    """The sizes of CUDA's kernels, and which one it is.

    For 2 to 127 queries torch 2.11 would take its decoding kernel, and cannot compile it or gets wrong results.

    That kernel makes a number of parts of the slots, here one for about 256 and fewer in a batch. Torch makes as many
    whatever the number of slots, and gives each its share of the list of blocks: in a long cache one part then gets
    all the blocks of a window, and works through them alone. Where the blocks are in one list, as they are for pages,
    it is the list that torch divides, so there are as many parts as keep a GPU busy.
    """
    row = (1 << (q.shape[3] - 1).bit_length()) * q.itemsize  # bytes; the kernels pad the head dim
    device: Any = torch.cuda.get_device_properties(q.device)
    most = device.shared_memory_per_block_optin
    tiles = _TILES if q.itemsize == 2 else _TILES[1:]
    if paged and q.itemsize == 2 and q.shape[2] == 1:
        tiles = (_TILE_OF_PAGES, *tiles)
    fitting = [tile for tile in tiles if (tile[0] + 2 * tile[1] * tile[2]) * row <= most]
    rows, slots, stages = (*fitting, _TILES[-1])[0]
    options = {"fwd_BLOCK_N": slots, "fwd_num_warps": 4, "fwd_num_stages": stages}
    if q.shape[2] > 1:
        return options | {"fwd_BLOCK_M": rows, "FORCE_USE_FLEX_ATTENTION": True}
    parts = _PROGRAMS // (len(q) * k.shape[1]) if paged else max(k.shape[2] // 256, 16) // len(k)
    return options | {"SPLIT_KV": 1 << max(parts.bit_length() - 1, 0)}


def weights(q: Tensor, k: Tensor, pattern: Pattern, view: View, heads: Tensor | None = None) -> Tensor:
    """The definition, for a dense view: softmax(score(q k^T / sqrt(D))) over the visible slots, `[B, H, T, S]`, in
    float32 or wider; differentiable. heads: only of these, in their order."""
    assert isinstance(view.visible, Tensor)
    _, h, _, d = q.shape
    visible = view.visible
    wide, group = torch.promote_types(q.dtype, torch.float32), h // k.shape[1]
    head = torch.arange(h, device=q.device) if heads is None else heads
    if heads is not None:
        q, visible = q[:, heads], visible if visible.shape[1] == 1 else visible[:, heads]
    scores = q.to(wide) @ k.to(wide)[:, head // group].transpose(-1, -2) * d**-0.5
    if pattern.score_mod is not None:
        scores = pattern.score_mod.dense(scores, view.q, view.kv, head)
    scores = scores.masked_fill(~visible, -torch.inf)
    # A row with nothing visible has softmax NaN; it attends to nothing.
    return torch.softmax(scores, dim=-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)


@contextmanager
def _eagerly(pattern: Pattern) -> Iterator[None]:
    """Run eagerly, flex_attention warns that it is slow; whoever runs this package eagerly chose to. And it traces mask
    and score function all the same: what it cannot trace is their fault, in one line, instead of the many it logs."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(_is_no_failed_trace)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            yield
    except (IndexError, RuntimeError) as error:
        from torch._dynamo.exc import Unsupported, UserError  # slow to import, and imported by flex_attention here

        what, fault = fault_of(error)
        if isinstance(error, Unsupported | UserError) or what == "index-out-of-range":
            rules = " or ".join(rule.described for rule in pattern if rule is not None)
            raise FunctionError(rules, what, fault) from error
        raise
    finally:
        log.removeFilter(_is_no_failed_trace)


def _is_no_failed_trace(record: logging.LogRecord) -> bool:
    return "failed while attempting to run meta" not in record.getMessage()
