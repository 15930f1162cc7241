"""Few queries as heads of a single one, for FlexAttention's decoding kernel on CUDA, which takes one query.

That kernel splits the slots among programs and reads keys once for all heads that share them. So T queries of H heads
become one query of H * T heads, head by head, and their masks part of the score function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..tokens import Token, Tokens
from .block_mask import BlockLists, make_block_mask
from .layout import PageTable
from .plan import LayerAttention

MOST = 16


def are_few(q: Tensor, lists: BlockLists) -> bool:
    """Return whether compiled attention of queries `[B, H, T, D]` goes this way: not if its mask depends on heads, or
    for gradients, which that kernel lacks."""
    return q.is_cuda and 1 < q.shape[2] <= MOST and lists.kv_num_blocks.shape[1] == 1 and not torch.is_grad_enabled()


def block_mask(q: Tokens, kv: Tokens, lists: BlockLists, pages: PageTable | None) -> BlockMask:
    """Return the mask of the single query: all slots that hold tokens, of the blocks listed for the few."""
    return make_block_mask(_holds_token, q.map(lambda x: x[:, :1]), kv, lists, pages)


def score_mod(
    attention: LayerAttention, q: Tokens, kv: Tokens, pages: PageTable | None, group: int, padded: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return FlexAttention's score_mod, which applies mask and score function. group, padded: see `ScoreMod.score_mod`;
    here `group` counts the heads of the single query."""
    count = q.index.shape[1]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        h = h if padded == group else h // padded * group + (h % padded).clamp(max=group - 1)
        slot = kv_idx if pages is None else pages.slot_of(b, kv_idx).clamp(min=0)
        query, key = Token(q, b, h // count, h % count), Token(kv, b, h // count, slot)
        if attention.score_mod is not None:
            score = attention.score_mod.evaluate(score, query, key)
        return torch.where(attention.mask.evaluate(query, key), score, -torch.inf)

    return score_mod


def _holds_token(q: Token, kv: Token) -> Tensor:
    return kv.index >= 0
