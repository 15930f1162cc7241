"""Attention plans: the mask and score function of each layer. Dimensions: B batch, T tokens, L layers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tokens import Tokens
from .library import causal
from .mask import Mask
from .scores import ScoreMod


class LayerAttention(NamedTuple):
    """The mask of a layer, and its score function if it has one: one variant of a plan.

    is_plain: whether there is no score function, and the mask is this package's own and looks up no table. flash:
    whether flash-attn-4 computes long chunks.
    """

    mask: Mask
    score_mod: ScoreMod | None = None
    is_plain: bool = False
    flash: bool = False

    @property
    def functions(self) -> tuple[Mask | ScoreMod, ...]:
        """The mask, and the score function if there is one."""
        return (self.mask,) if self.score_mod is None else (self.mask, self.score_mod)

    def check(self, device: torch.device) -> None:
        """Raise FunctionError if the mask or the score function fails for one token."""
        token = Tokens.arriving(1).map(lambda x: x.to(device))
        self.mask.dense(token, token, 1)
        if self.score_mod is not None:
            self.score_mod.dense(torch.zeros(1, 1, 1, 1, device=device), token, token)

    @property
    def described(self) -> str:
        """The mask and the score function, for messages."""
        return " or ".join(function.described for function in self.functions)


@dataclass(frozen=True)
class AttentionPlan:
    """The distinct variants of attention in a model, and the number of each layer's variant, `[L]`."""

    variants: tuple[LayerAttention, ...]
    of_layer: tuple[int, ...]

    @classmethod
    def make(
        cls,
        mask: Mask | Sequence[Mask | None] | None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None,
        *,
        default: Sequence[Mask],
        cache_mask: Mask | None,
        device: torch.device,
    ) -> AttentionPlan:
        """Build a plan from one mask and score function for all layers, or one per layer; equal layers share a variant.

        default: the mask of each layer if none is given. cache_mask: combined (`&`) with every mask. Captured tensors
        are moved to `device`. Raises ValueError for anything but masks and score functions, and for a list without one
        per layer.
        """
        each_mask = _of_each_layer(mask, Mask, "mask", len(default))
        each_score_mod = _of_each_layer(score_mod, ScoreMod, "score_mod", len(default))
        functions = {id(f): f for f in (*each_mask, *each_score_mod, *default) if f is not None}
        identities = {n: f.identity() for n, f in functions.items()}  # of each once: most layers have the same
        variants: dict[Hashable, LayerAttention] = {}
        of_layer = []
        for m, s, own in zip(each_mask, each_score_mod, default, strict=True):
            m = m or own
            key = identities[id(m)], s and identities[id(s)]
            if key not in variants:
                m = m if cache_mask is None else m & cache_mask
                plain = s is None and m.is_own() and not m.captured()
                variants[key] = variant = LayerAttention(m.to(device), s and s.to(device), plain)
                if not plain:  # tried on one token, so that a function's fault is not first reported by a compiler
                    variant.check(device)
            of_layer.append(list(variants).index(key))
        return cls(tuple(variants.values()), tuple(of_layer))

    @cached_property
    def is_own(self) -> bool:
        """Whether all masks and score functions are made of this package's functions only."""
        return all(function.is_own() for variant in self.variants for function in variant.functions)

    @cached_property
    def structure(self) -> Hashable:
        """A key for compiled graphs; see `CapturingFunction.structure`."""
        variants = ((*(f.structure() for f in variant.functions), variant.flash) for variant in self.variants)
        return self.of_layer, tuple(variants)

    @cached_property
    def with_flash(self) -> AttentionPlan:
        """This plan, with flash-attn-4 for what it has operations for."""
        return AttentionPlan(tuple(v._replace(flash=v.is_plain) for v in self.variants), self.of_layer)

    @cached_property
    def backward(self) -> AttentionPlan:
        """This plan, but no token sees a later one, as when each is computed before the next one exists."""
        if all(v.mask.never_looks_ahead for v in self.variants):
            return self
        variants = (v._replace(mask=v.mask & causal(), is_plain=False) for v in self.variants)
        return AttentionPlan(tuple(variants), self.of_layer)

    def check_new_tokens(
        self, count: int, positions: Tensor | None, segments: Tensor | None, start: int, num_heads: int
    ) -> None:
        """Raise FunctionError if a mask or score function fails for the last of `count` tokens from `start` on."""
        index = start + torch.arange(count, dtype=torch.int32)[None]
        tokens = Tokens(index, index if positions is None else positions, 0 * index if segments is None else segments)
        rows = max(len(x) for x in tokens)
        self.check_last_token(tokens.map(lambda x: x.expand(rows, -1)), num_heads)

    def check_last_token(self, tokens: Tokens, num_heads: int) -> None:
        """Raise FunctionError if a mask or score function fails with the last of tokens `[B, T]` as the query.

        A table may be too short, for example. Runs on the CPU: on a GPU, an index out of bounds would end the process.
        """
        tokens = tokens.map(lambda x: x.cpu())
        at = tokens.index.argmax(1, keepdim=True)
        last = tokens.map(lambda x: x.gather(1, at))
        for mask, score_mod, *_ in self.variants:
            mask.to("cpu").dense(last, tokens, num_heads)
            if score_mod is not None:
                scores = torch.zeros(len(at), num_heads, 1, tokens.index.shape[1])
                score_mod.to("cpu").dense(scores, last, tokens)


def _of_each_layer(value: Any, kind: type, name: str, num_layers: int) -> list[Any]:
    each = list(value) if isinstance(value, list | tuple) else [value] * num_layers
    if len(each) != num_layers:
        raise ValueError(f"{len(each)} {name}s for {num_layers} layers; give one, or one per layer")
    for function in each:
        if function is not None and not isinstance(function, kind):
            found = type(function).__name__
            raise ValueError(f"{name} must be a {kind.__name__}, found {found}; wrap it: {kind.__name__}(function)")
    return each
