"""Attention: the only call of flex_attention, and the dense definition of what it computes.

Dimensions: B batch, H query heads, T query tokens, S slots, D head dim, L layers; K key/value heads, where H is a
multiple of K; N packed tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from .kernels import cpu
from .kernels.flex_attention import eager_errors, kernel_options, padded_group
from .masks import few_queries
from .masks.block_mask import BlockLists, list_pages
from .masks.layout import PackedRows, PageTable
from .masks.plan import LayerAttention
from .rope import Rotary
from .tokens import Tokens

Backend: TypeAlias = Literal["flex", "dense"]


class AttentionMetadata(NamedTuple):
    """Everything that a layer needs to know about a step's tokens; built once per step for each variant of a plan.

    q, kv: attributes of the queries and of the slots. visible: block lists for FlexAttention, or booleans
    `[B, 1 or H, T, S]`. pages: the page table, None if slots are contiguous; the block lists of compiled steps then
    hold page numbers. packed: the packing of the queries, None if they come in rows. rotary: cosine and sine of the
    queries. slots: the cache slots for the queries' keys and values, `[B, T]` or packed. newest: the same for the
    kernels of `kernels.cpu`, None if this step has no use for them. adapters: see `layers.apply_linear`.
    """

    attention: LayerAttention
    q: Tokens
    kv: Tokens
    visible: BlockLists | Tensor
    pages: PageTable | None = None
    packed: PackedRows | None = None
    rotary: Rotary | None = None
    slots: Tensor | None = None
    newest: cpu.Newest | None = None
    adapters: Tensor | None = None


def build_attention_metadata(
    attention: LayerAttention,
    q: Tokens,
    kv: Tokens,
    num_heads: int,
    backend: Backend,
    pages: PageTable | None = None,
    packed: PackedRows | None = None,
    rotary: Rotary | None = None,
    slots: Tensor | None = None,
    adapters: Tensor | None = None,
) -> AttentionMetadata:
    """Build the metadata of one variant: block lists for backend "flex", booleans for "dense"."""
    mask = attention.mask
    if kv is q and not torch.compiler.is_dynamo_compiling():
        # Eager FlexAttention caches graphs of its own. If one no longer fits because two tensors are now the same
        # (index and position may be, too), torch 2.13 fails with a TypeError while it explains why it recompiles.
        q, kv = (tokens.map(torch.clone) for tokens in (q, kv))
    visible: BlockLists | Tensor
    newest = None
    if backend == "dense":
        visible = mask.dense(q, kv, num_heads)
        if rotary is not None and slots is not None and attention.score_mod is None:
            newest = cpu.Newest.of(rotary, slots, visible, pages and pages.page_table, packed)
    elif pages is None or not torch.compiler.is_dynamo_compiling():
        visible = mask.block_lists(q, kv, num_heads)
    else:
        decoding = q.index.is_cuda and q.index.shape[1] <= few_queries.MOST
        lists = mask.block_lists(q, kv, num_heads, together=decoding)
        # Rows of padding visit no block; on a CPU their output and the last page are NaN, and never read.
        padding = (q.index < 0).all(1)[:, None, None]
        lists = lists._replace(kv_num_blocks=lists.kv_num_blocks.masked_fill(padding, 0))
        visible = list_pages(lists, pages)
    return AttentionMetadata(attention, q, kv, visible, pages, packed, rotary, slots, newest, adapters)


def attend(q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
    """Compute scaled dot-product attention: q `[B, H, T, D]`, k and v `[B, K, S, D]` -> `[B, H, T, D]`, in q's dtype.
    k and v: in q's dtype or 8 bits.

    For packed tokens, q and the result are `[1, H, N, D]`. FlexAttention shares keys and values among groups of H/K
    query heads without repeating them in memory. A query that may attend to nothing gets 0. Raises ValueError for
    gradients through FlexAttention on the CPU, which has no backward there.
    """
    attention, visible, pages, packed = metadata.attention, metadata.visible, metadata.pages, metadata.packed
    if packed is not None:
        rows = packed.unpack(q.transpose(1, 2)).transpose(1, 2)
        out = attend(rows, k, v, metadata._replace(packed=None))
        return packed.pack(out.transpose(1, 2)).transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    if pages is None and not torch.compiler.is_dynamo_compiling():
        k, v = (x[:, :, : metadata.kv.index.shape[1]] for x in (k, v))  # the slots in use
    if pages is not None and not (isinstance(visible, BlockLists) and torch.compiler.is_dynamo_compiling()):
        # Eager FlexAttention is dense, too: gather each row's slots instead of attending to the whole pool.
        k, v, pages = pages.gather(k), pages.gather(v), None
    if not isinstance(visible, BlockLists):
        return _grouped_matmul(attention_weights(q, k, metadata), v).to(q.dtype)
    scored = attention.score_mod
    if not q.is_cuda:
        wants_gradients = q.requires_grad or k.requires_grad or v.requires_grad
        if scored is not None and torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling():
            wants_gradients |= scored.requires_grad()  # compiled code cannot search a function
        if wants_gradients:
            raise ValueError("FlexAttention has no backward on the CPU; use torch.no_grad() or backend='dense'")
    if not (q.is_cuda and torch.compiler.is_dynamo_compiling()):  # compiled for CUDA, it takes 8 bits as they are
        k, v = k.to(q.dtype), v.to(q.dtype)
    # torch 2.13's compiled CPU kernel misreads strided values, such as a slice of a fused product: wrong by 100 %.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    shape, few = q.shape, torch.compiler.is_dynamo_compiling() and few_queries.are_few(q, visible)
    if few:
        q, group = q.flatten(1, 2)[:, :, None], group * shape[2]
        block_mask = few_queries.block_mask(metadata.q, metadata.kv, visible, pages)
    else:
        block_mask = attention.mask.block_mask(metadata.q, metadata.kv, 1, visible, pages)
    padded = padded_group(group) if q.is_cuda and q.shape[2] == 1 and visible.kv_num_blocks.shape[1] == 1 else group
    if padded != group:
        q = nn.functional.pad(q.unflatten(1, (-1, group)), (0, 0, 0, 0, 0, padded - group)).flatten(1, 2)
    layout = metadata.q, metadata.kv, pages, group, padded
    score_mod = None if scored is None else scored.score_mod(*layout)
    if few:
        score_mod = few_queries.score_mod(attention, *layout)
    options = kernel_options(q, k, pages is not None, attention.is_plain, attention.flash) if q.is_cuda else None
    with nullcontext() if torch.compiler.is_dynamo_compiling() else eager_errors(attention.described):
        out = flex_attention(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=block_mask,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=options,
        )
    return out.unflatten(1, (k.shape[1], -1))[:, :, :group].reshape(shape)


def attention_weights(q: Tensor, k: Tensor, metadata: AttentionMetadata, heads: Tensor | None = None) -> Tensor:
    """Return the attention weights by definition: the softmax of `attention_scores`, `[B, H, T, S]`."""
    scores, visible = attention_scores(q, k, metadata, heads), cast(Tensor, metadata.visible).any(-1, keepdim=True)
    visible = visible if heads is None or visible.shape[1] == 1 else visible[:, heads]
    # The softmax of a row with nothing visible is NaN; such a row attends to nothing.
    return torch.softmax(scores, dim=-1).masked_fill(~visible, 0.0)


def attention_scores(q: Tensor, k: Tensor, metadata: AttentionMetadata, heads: Tensor | None = None) -> Tensor:
    """Return the scores by definition: score(q k^T / sqrt(D)) for the visible slots, -inf for the others,
    `[B, H, T, S]`, float32 or wider; differentiable. Needs dense metadata. heads: only these heads, in this order."""
    visible, score_mod = metadata.visible, metadata.attention.score_mod
    assert isinstance(visible, Tensor)
    wide, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    if heads is not None:
        q, k, visible = q[:, heads], k[:, heads // group], visible if visible.shape[1] == 1 else visible[:, heads]
    scores = _grouped_matmul(q.to(wide), k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
    if score_mod is not None:
        scores = score_mod.dense(scores, metadata.q, metadata.kv, heads)
    return scores.masked_fill(~visible, -torch.inf)


def _grouped_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Multiply each head's matrix of x `[B, H, T, N]` by that of its group in y `[B, K, N, M]`, in x's dtype."""
    return (x.unflatten(1, (y.shape[1], -1)).flatten(2, 3) @ y.to(x.dtype)).unflatten(2, (-1, x.shape[2])).flatten(1, 2)
