"""The only call of flex_attention, and beside it the dense definition of what it computes.

Dimensions: B batch, H query heads, T query tokens, S slots, D head dim; K heads of keys and values, H a multiple of K.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .masks import Mask
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
    """A pattern applied to the tokens at hand; made once per step, shared by the layers that have the pattern."""

    visible: BlockMask | Tensor
    score_mod: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None


def view_of(pattern: Pattern, q: Tokens, kv: Tokens, num_heads: int, backend: Backend) -> View:
    """What each query sees: FlexAttention's block lists (backend "flex"), or booleans `[B, 1 or H, T, S]` ("dense")."""
    mask, rule = pattern
    if kv is q and not torch.compiler.is_compiling():
        # Eager FlexAttention keeps graphs of its own. Torch 2.13 fails with a TypeError where it would explain why one
        # of them does not fit, if the reason is that two tensors became one.
        kv = Tokens(*(x.clone() for x in kv))
    visible = mask.block_mask(q, kv, num_heads) if backend == "flex" else mask.dense(q, kv, num_heads)
    if rule is None:
        return View(visible, None)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return rule.evaluate(score, Token(q, b, h, q_idx), Token(kv, b, h, kv_idx))

    return View(visible, score_mod)


def attend(q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """Scaled dot-product attention: q `[B, H, T, D]`, k and v `[B, K, S, D]` -> `[B, H, T, D]` in q's dtype.

    Keys and values are shared by groups of H/K query heads without being repeated in memory. A query that may attend to
    nothing gets 0.
    """
    if isinstance(view.visible, BlockMask):
        # torch 2.13's compiled CPU kernel misreads strided values, such as a slice of a fused product: wrong by 100 %.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        with nullcontext() if torch.compiler.is_compiling() else _without_advice_to_compile():
            return flex_attention(
                q,
                k,
                v,
                score_mod=view.score_mod,
                block_mask=view.visible,
                enable_gqa=q.shape[1] != k.shape[1],
                kernel_options=_decoding_options(len(q), k.shape[2]) if q.is_cuda and q.shape[2] == 1 else None,
            )
    groups = q.shape[1] // k.shape[1]
    wide = v.to(torch.promote_types(v.dtype, torch.float32)).repeat_interleave(groups, dim=1)
    return (weights(q, k, view) @ wide).to(q.dtype)


def _decoding_options(batch: int, slots: int) -> Any:
    """How many parts the CUDA decoding kernel makes of the slots: one for about 256, fewer in a batch.

    Torch makes as many whatever the number of slots, and gives each its share of the list of blocks: in a long cache
    one part then gets all the blocks of a window, and works through them alone.
    """
    parts = max(slots // 256, 16) // batch
    return {"SPLIT_KV": 1 << max(parts.bit_length() - 1, 0)}


def weights(q: Tensor, k: Tensor, view: View) -> Tensor:
    """The definition, for a dense view: softmax(score(q k^T / sqrt(D))) over the visible slots, `[B, H, T, S]`, in
    float32 or wider; differentiable."""
    assert isinstance(view.visible, Tensor)
    (b, h, t, d), s = q.shape, k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.to(wide).repeat_interleave(h // k.shape[1], dim=1)
    scores = q.to(wide) @ k.transpose(-1, -2) * d**-0.5
    if view.score_mod is not None:
        batch, head, row, slot = (torch.arange(n, device=q.device) for n in (b, h, t, s))
        scores = view.score_mod(scores, batch[:, None, None, None], head[:, None, None], row[:, None], slot)
        if scores.shape != (b, h, t, s):
            raise ValueError(f"the score function made scores {list(scores.shape)} of {[b, h, t, s]}")
    scores = scores.masked_fill(~view.visible, -torch.inf)
    # A row with nothing visible has softmax NaN; it attends to nothing.
    return torch.softmax(scores, dim=-1).masked_fill(~view.visible.any(-1, keepdim=True), 0.0)


@contextmanager
def _without_advice_to_compile() -> Iterator[None]:
    """Run eagerly, flex_attention warns that it is slow; whoever runs this package eagerly chose to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield
