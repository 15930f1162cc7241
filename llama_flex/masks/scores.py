"""Score functions, which change the scaled product of a query and a key before the softmax.

Like a mask, a score function reads token attributes and captured tensors, and means the same wherever it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..tokens import Token, TokenFunction, Tokens, take
from ..usercode.captured import name_of
from ..usercode.errors import FunctionError, check_scalar
from .cells import arange, each_cell
from .layout import PageTable
from .library import GENERATED, lookup, named
from .mask import logical

ScoreFunction: TypeAlias = Callable[[Tensor, Token, Token], Tensor]


class ScoreMod(TokenFunction):
    """A function `(score, q, kv) -> score`, of tensor operations only. `a >> b` applies a, then b.

    Scores are the products of queries and keys divided by sqrt(head_dim), in float32 or wider; masking comes after.
    """

    function: ScoreFunction
    kind = "score function"

    @classmethod
    def from_score_mod(
        cls, score_mod: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor], name: str | None = None
    ) -> ScoreMod:
        """Wrap FlexAttention's `score_mod(score, b, h, q_idx, kv_idx)`, with `Token.index` as q_idx and kv_idx."""

        def function(score: Tensor, q: Token, kv: Token) -> Tensor:
            return score_mod(score, q.batch, q.head, logical(q), logical(kv))

        return cls(function, name or name_of(score_mod))

    def __rshift__(self, other: ScoreMod) -> ScoreMod:
        if not isinstance(other, ScoreMod):
            return NotImplemented
        return ScoreMod(lambda score, q, kv: other.evaluate(self.evaluate(score, q, kv), q, kv), f"({self} >> {other})")

    def evaluate(self, score: Tensor, q: Token, kv: Token) -> Tensor:
        """Return the changed score of one query and one key, a scalar tensor.

        Raises FunctionError if the function fails or does not return one floating-point number.
        """
        changed = self.call(score, q, kv)
        if not isinstance(changed, Tensor) or not changed.is_floating_point():
            kind = changed.dtype if isinstance(changed, Tensor) else type(changed).__name__
            missing = "; is a `return` missing?" if changed is None else ""
            fault = f"it returned {kind}; a score function must return the score, such as score * 2{missing}"
            raise FunctionError(self.described, "wrong-type", fault)
        return check_scalar(self.described, changed).to(score.dtype)

    def dense(self, scores: Tensor, q: Tokens, kv: Tokens, heads: Tensor | None = None) -> Tensor:
        """Change scores `[B, H, T, S]`. heads: their head numbers in the model, default 0 to H - 1."""
        heads = arange(scores.shape[1], q) if heads is None else heads
        return each_cell(self.evaluate, q, kv, heads, scores=scores)

    def score_mod(
        self, q: Tokens, kv: Tokens, pages: PageTable | None, group: int, padded: int
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return FlexAttention's score_mod. pages: the page table, None if slots are contiguous. padded: the number of
        the kernel's heads for each `group` heads of the model."""

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            h = h if padded == group else h // padded * group + (h % padded).clamp(max=group - 1)
            slot = kv_idx if pages is None else pages.slot_of(b, kv_idx).clamp(min=0)
            return self.evaluate(score, Token(q, b, h, q_idx), Token(kv, b, h, slot))

        return score_mod


def alibi(slopes: Tensor | int) -> ScoreMod:
    """Subtract a penalty that grows with the distance between positions (arXiv:2108.12409).

    slopes: `[H]`; or the number of heads, for the paper's slopes: 2^(-8/H), 2^(-16/H), ... if H is a power of two, else
    those of the next lower power, followed by every other one of the next higher.
    """
    if not isinstance(slopes, Tensor):
        if slopes < 1:
            raise ValueError(f"alibi needs the number of heads, at least 1, not {slopes}")
        lower = 1 << (slopes.bit_length() - 1)
        exponents = [8 * (i + 1) / lower for i in range(lower)] + [4 * (2 * i + 1) / lower for i in range(lower)]
        name, slopes = f"alibi({slopes})", 2.0 ** -torch.tensor(exponents[:slopes])
    else:
        name = named("alibi", slopes, 0)
    return ScoreMod(lambda score, q, kv: score - take(slopes, q.head) * (q.position - kv.position).abs(), name)


def softcap(cap: float) -> ScoreMod:
    """Keep scores within (-cap, cap): cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118)."""
    if not 0 < cap < math.inf:
        raise ValueError(f"softcap needs a positive number, not {cap}")
    return ScoreMod(lambda score, q, kv: cap * torch.tanh(score / cap), f"softcap({cap})")


def relative_bias(table: Tensor) -> ScoreMod:
    """Add a bias by distance: table `[2R + 1]` or `[H, 2R + 1]` for keys R positions after the query to R before it;
    keys further away get the bias of the nearer end (arXiv:1910.10683, without its buckets)."""
    if table.dim() not in (1, 2) or table.shape[-1] % 2 == 0:
        raise ValueError(f"relative_bias needs a table [2R + 1] or [H, 2R + 1], not {list(table.shape)}")
    reach = table.shape[-1] // 2

    def function(score: Tensor, q: Token, kv: Token) -> Tensor:
        at = (q.position - kv.position).clamp(-reach, reach) + reach
        return score + (take(table, at) if table.dim() == 1 else take(table, q.head, at))

    return ScoreMod(function, named("relative_bias", table, 0))


def temperature(scale: Tensor) -> ScoreMod:
    """Multiply scores by a factor for the query's position: scale `[N]` or `[B, N]`, the last for all positions beyond.

    For example `1 + 0.1 * log(1 + floor(position / 8192))`, or log(position) / log(trained length) (arXiv:2202.12172).
    """
    if scale.dim() not in (1, 2) or not scale.numel() or not scale.is_floating_point():
        raise ValueError(f"temperature needs factors [N] or [B, N], not {scale.dtype} {list(scale.shape)}")
    return ScoreMod(lambda score, q, kv: score * lookup(scale, q, q.position), named("temperature", scale, 0))


def segment_weights(log_weights: Tensor) -> ScoreMod:
    """Weight each segment for generated tokens (segment -1): add log_weights `[N]` or `[B, N]` of segments 0 to N - 1
    to their scores, so that a weight of 2 counts as a segment given twice; add 0 to other segments."""
    if log_weights.dim() not in (1, 2) or not log_weights.is_floating_point():
        raise ValueError(
            f"segment_weights needs log-weights [N] or [B, N], not {log_weights.dtype} {list(log_weights.shape)}"
        )
    count = log_weights.shape[-1]

    def function(score: Tensor, q: Token, kv: Token) -> Tensor:
        weighted = (q.segment == GENERATED) & (kv.segment >= 0) & (kv.segment < count)
        return score + torch.where(weighted, lookup(log_weights, kv, kv.segment), 0.0)

    return ScoreMod(function, named("segment_weights", log_weights, 0))
