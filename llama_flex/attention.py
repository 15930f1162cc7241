"""The only call of flex_attention, and beside it the dense definition of what it computes.

Dimensions: B batch, H query heads, T query tokens, S slots, D head dim, L layers; K heads of keys and values, H a
multiple of K; N packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from .kernels.flex_attention import kernel_options, padded_group, run_eager
from .masks.block_mask import BlockLists, PageTable
from .masks.mask import Mask
from .masks.scores import ScoreMod
from .rope import Rotary
from .tokens import Token, Tokens

Backend: TypeAlias = Literal["flex", "dense"]


class LayerAttention(NamedTuple):
    """How one layer attends: its mask, and its score function, if it has one."""

    mask: Mask
    score_mod: ScoreMod | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """The distinct ways in which a model's layers attend, and which of them each layer has, `[L]`."""

    variants: tuple[LayerAttention, ...]
    of_layer: tuple[int, ...]

    @classmethod
    def make(
        cls,
        mask: Mask | Sequence[Mask | None] | None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None,
        *,
        default: Mask,
        cache_mask: Mask | None,
        num_layers: int,
        device: torch.device,
    ) -> AttentionPlan:
        """Plan from one mask and score function for all layers, or one each; equal ones are computed once for all.

        default: instead of no mask. cache_mask: added to every mask. Tensors they capture are moved to `device`.
        Raises ValueError for what is no mask or score function, and for another number of them than of layers.
        """
        each_mask = _of_each_layer(mask, Mask, "mask", num_layers)
        each_score_mod = _of_each_layer(score_mod, ScoreMod, "score_mod", num_layers)
        # Tried on one token, so that a function's fault is not reported by a compiler.
        token = Tokens.arriving(1).map(lambda x: x.to(device))
        score = torch.zeros(1, 1, 1, 1, device=device)
        variants: dict[Hashable, LayerAttention] = {}
        of_layer = []
        for m, s in zip(each_mask, each_score_mod, strict=True):
            m = m or default
            key = m.identity(), s and s.identity()
            if key not in variants:
                m = m if cache_mask is None else m & cache_mask
                variants[key] = variant = LayerAttention(m.to(device), s and s.to(device))
                variant.mask.dense(token, token, 1)
                if variant.score_mod is not None:
                    variant.score_mod.dense(score, token, token)
            of_layer.append(list(variants).index(key))
        return cls(tuple(variants.values()), tuple(of_layer))

    @cached_property
    def structure(self) -> Hashable:
        """What a compiled graph depends on; see `CapturingFunction.structure`."""
        functions = (function for variant in self.variants for function in variant)
        return self.of_layer, tuple(function and function.structure() for function in functions)

    def check_last_token(self, tokens: Tokens, num_heads: int) -> None:
        """Raise FunctionError for a mask or score function that fails where the last of tokens `[B, T]` is the query,
        such as by a table that is too short.

        Runs on the CPU: on a GPU, an index out of bounds would be the end of the process.
        """
        tokens = tokens.map(lambda x: x.cpu())
        at = tokens.index.argmax(1, keepdim=True)
        last = tokens.map(lambda x: x.gather(1, at))
        for mask, score_mod in self.variants:
            mask.to("cpu").dense(last, tokens, num_heads)
            if score_mod is not None:
                scores = torch.zeros(len(at), num_heads, 1, tokens.index.shape[1])
                score_mod.to("cpu").dense(scores, last, tokens)


def _of_each_layer(value: Any, kind: type, name: str, num_layers: int) -> list[Any]:
    each = list(value) if isinstance(value, list | tuple) else [value] * num_layers
    if len(each) != num_layers:
        raise ValueError(f"{len(each)} {name}s for {num_layers} layers; give one, or one each")
    for function in each:
        if function is not None and not isinstance(function, kind):
            found = type(function).__name__
            raise ValueError(f"{name} must be a {kind.__name__}, found {found}; {kind.__name__}(function) is one")
    return each


class PackedRows(NamedTuple):
    """Tokens of rows in one row, without most of the padding, as all but attention takes them; N of B * T.

    token_indices: int64 `[N]`, which tokens of the rows: the real ones, and padding if there are fewer than N.
    inverse_indices: int64 `[B, T]`, where each is among the N; arbitrary for padding.
    """

    token_indices: Tensor
    inverse_indices: Tensor

    @staticmethod
    def of(token_indices: Tensor, shape: tuple[int, int]) -> PackedRows:
        """Make one of `token_indices` and the shape `(B, T)` of the rows."""
        number = torch.arange(len(token_indices), device=token_indices.device)
        inverse = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=token_indices.device)
        return PackedRows(token_indices, inverse.scatter(0, token_indices, number).view(shape))

    def pack(self, x: Tensor) -> Tensor:
        """Pack `[B, T, ...]` into `[1, N, ...]`."""
        return x.flatten(0, 1)[self.token_indices][None]

    def unpack(self, x: Tensor) -> Tensor:
        """Lay `[1, N, ...]` out as `[B, T, ...]`. Padding positions hold arbitrary values."""
        return x[0, self.inverse_indices]


class AttentionMetadata(NamedTuple):
    """Everything about the tokens of a step that a layer needs; made once a step for each variant of a plan.

    q, kv: the attributes of queries and of slots. visible: block lists for FlexAttention, or booleans
    `[B, 1 or H, T, S]`. pages: where the slots lie, if not in their order; the lists of a compiled step are of pages
    then. packed: how queries come, if not in rows. rotary: of the queries. slots: where their keys go in a cache,
    `[B, T]` or packed.
    """

    attention: LayerAttention
    q: Tokens
    kv: Tokens
    visible: BlockLists | Tensor
    pages: PageTable | None = None
    packed: PackedRows | None = None
    rotary: Rotary | None = None
    slots: Tensor | None = None


def build_attention_metadata(
    attention: LayerAttention,
    q: Tokens,
    kv: Tokens,
    num_heads: int,
    backend: Backend,
    pages: PageTable | None = None,
    packed: PackedRows | None = None,
) -> AttentionMetadata:
    """Find what each query sees: block lists (backend "flex") or booleans ("dense")."""
    mask = attention.mask
    if kv is q and not torch.compiler.is_compiling():
        # Eager FlexAttention keeps graphs of its own. Torch 2.13 fails with a TypeError where it would explain why one
        # of them does not fit, if the reason is that two tensors became one, as index and position may be too.
        q, kv = (tokens.map(torch.clone) for tokens in (q, kv))
    if backend == "dense":
        return AttentionMetadata(attention, q, kv, mask.dense(q, kv, num_heads), pages, packed)
    if pages is None or not torch.compiler.is_compiling():
        return AttentionMetadata(attention, q, kv, mask.block_lists(q, kv, num_heads), pages, packed)
    decoding = q.index.is_cuda and q.index.shape[1] == 1
    lists = mask.block_lists(q, kv, num_heads, together=decoding)
    # Rows of padding visit nothing. On a CPU they are NaN then, in padding and in the last page, which nobody reads.
    padding = (q.index < 0).all(1)[:, None, None]
    lists = lists._replace(kv_num_blocks=lists.kv_num_blocks.masked_fill(padding, 0))
    return AttentionMetadata(attention, q, kv, pages.translate(lists), pages, packed)


def attend(q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
    """Scaled dot-product attention: q `[B, H, T, D]`, k and v `[B, K, S, D]` -> `[B, H, T, D]` in q's dtype. Of
    packed tokens q and the result are `[1, H, N, D]`.

    Keys and values are shared by groups of H/K query heads without being repeated in memory. A query that may attend to
    nothing gets 0. Raises ValueError for gradients through FlexAttention on the CPU, which has none.
    """
    attention, visible, pages, packed = metadata.attention, metadata.visible, metadata.pages, metadata.packed
    if packed is not None:
        rows = packed.unpack(q.transpose(1, 2)).transpose(1, 2)
        out = attend(rows, k, v, metadata._replace(packed=None))
        return packed.pack(out.transpose(1, 2)).transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    if pages is not None and not (isinstance(visible, BlockLists) and torch.compiler.is_compiling()):
        # Dense, or eager and then computed densely: over the slots of the rows, not over all that the pool has.
        k, v, pages = pages.gather(k), pages.gather(v), None
    if not isinstance(visible, BlockLists):
        wide = v.to(torch.promote_types(v.dtype, torch.float32)).repeat_interleave(group, dim=1)
        return (attention_weights(q, k, metadata) @ wide).to(q.dtype)
    if not q.is_cuda and _wants_gradients(q, k, v, attention.score_mod):
        raise ValueError("FlexAttention has no backward on the CPU; use torch.no_grad() or backend='dense'")
    # torch 2.13's compiled CPU kernel misreads strided values, such as a slice of a fused product: wrong by 100 %.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    score_mod = _score_mod(metadata, pages)
    block_mask = attention.mask.block_mask(metadata.q, metadata.kv, 1, visible, pages)
    decoding, padded = q.is_cuda and q.shape[2] == 1, padded_group(group)
    if decoding and padded != group and visible.kv_num_blocks.shape[1] == 1:
        q = nn.functional.pad(q.unflatten(1, (-1, group)), (0, 0, 0, 0, 0, padded - group)).flatten(1, 2)
        score_mod = _score_mod(metadata, pages, lambda h: h // padded * group + (h % padded).clamp(max=group - 1))
    with nullcontext() if torch.compiler.is_compiling() else run_eager(_described(attention)):
        out = flex_attention(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=block_mask,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=kernel_options(q, k, pages is not None) if q.is_cuda else None,
        )
    return out.unflatten(1, (k.shape[1], -1))[:, :, :group].flatten(1, 2)


def attention_weights(q: Tensor, k: Tensor, metadata: AttentionMetadata, heads: Tensor | None = None) -> Tensor:
    """The definition, for dense metadata: softmax(score(q k^T / sqrt(D))) over the visible slots, `[B, H, T, S]`, in
    float32 or wider; differentiable. heads: only of these, in their order."""
    visible, score_mod = metadata.visible, metadata.attention.score_mod
    assert isinstance(visible, Tensor)
    _, h, _, d = q.shape
    wide, group = torch.promote_types(q.dtype, torch.float32), h // k.shape[1]
    head = torch.arange(h, device=q.device) if heads is None else heads
    if heads is not None:
        q, visible = q[:, heads], visible if visible.shape[1] == 1 else visible[:, heads]
    scores = q.to(wide) @ k.to(wide)[:, head // group].transpose(-1, -2) * d**-0.5
    if score_mod is not None:
        scores = score_mod.dense(scores, metadata.q, metadata.kv, head)
    scores = scores.masked_fill(~visible, -torch.inf)
    # A row with nothing visible has softmax NaN; it attends to nothing.
    return torch.softmax(scores, dim=-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)


def _wants_gradients(q: Tensor, k: Tensor, v: Tensor, score_mod: ScoreMod | None) -> bool:
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    if score_mod is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False  # compiled code cannot search a function for its tensors
    return score_mod.requires_grad()


def _score_mod(
    metadata: AttentionMetadata, pages: PageTable | None, head_of: Callable[[Tensor], Tensor] = lambda h: h
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """Return FlexAttention's score_mod. head_of: from the kernel's head to the model's."""
    function, q, kv = metadata.attention.score_mod, metadata.q, metadata.kv
    if function is None:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        h = head_of(h)
        slot = kv_idx if pages is None else pages.slot_of(b, kv_idx).clamp(min=0)
        return function.evaluate(score, Token(q, b, h, q_idx), Token(kv, b, h, slot))

    return score_mod


def _described(attention: LayerAttention) -> str:
    return " or ".join(function.described for function in attention if function is not None)
