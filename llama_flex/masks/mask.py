"""Masks: predicates over the attributes of a query token and a key token, and their algebra.

A mask is written once, over attributes, and knows nothing of caches: it means the same in a full forward, in chunks, in
cached decoding and in ragged batches, eager or compiled. Dimensions: B batch, H heads, T query tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..tokens import Token, TokenFunction, Tokens
from ..usercode.captured import name_of
from ..usercode.errors import FunctionError, check_scalar
from . import block_mask
from .block_mask import BlockLists
from .cells import Sparsity
from .layout import PageTable


class Mask(TokenFunction):
    """A predicate `(q, kv) -> bool`: may query token q attend to key token kv?

    Both have `.batch .head .index .position .segment`. The predicate uses tensor operations only (`&`, `|`, `~`,
    comparisons, indexing of captured tensors); it may return a Python bool. Masks combine with `&`, `|` and `~`.
    Free slots and padding are never attended to, whatever the predicate returns.
    """

    function: Callable[[Token, Token], Tensor | bool]
    kind = "mask"

    def __init__(
        self,
        function: Callable[[Token, Token], Tensor | bool],
        name: str | None = None,
        *,
        never_looks_ahead: bool = False,
    ) -> None:
        """Wrap a predicate. never_looks_ahead: promise that no query sees a later token; otherwise an Engine
        checks, at the cost of building the block lists of long prompts twice."""
        super().__init__(function, name)
        self.never_looks_ahead = never_looks_ahead

    @classmethod
    def from_mask_mod(
        cls, mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | bool], name: str | None = None
    ) -> Mask:
        """Make a mask from FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`, with `Token.index` as q_idx and kv_idx.

        So it keeps its meaning in cached decoding, where the kernel's rows and slots are not token indices.
        """
        return cls(lambda q, kv: mask_mod(q.batch, q.head, logical(q), logical(kv)), name or name_of(mask_mod))

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(
            lambda q, kv: self.evaluate(q, kv) & other.evaluate(q, kv),
            f"({self} & {other})",
            never_looks_ahead=self.never_looks_ahead or other.never_looks_ahead,
        )

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(
            lambda q, kv: self.evaluate(q, kv) | other.evaluate(q, kv),
            f"({self} | {other})",
            never_looks_ahead=self.never_looks_ahead and other.never_looks_ahead,
        )

    def __invert__(self) -> Mask:
        return Mask(lambda q, kv: ~self.evaluate(q, kv), f"~{self}")

    def evaluate(self, q: Token, kv: Token) -> Tensor:
        """Evaluate the predicate for one query and one key; return a scalar boolean tensor.

        Raises FunctionError if the predicate fails or returns anything else.
        """
        answer = self.call(q, kv)
        if isinstance(answer, bool):
            return torch.full_like(kv.index, answer, dtype=torch.bool)
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
            kind = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
            missing = "; is a `return` missing?" if answer is None else ""
            fault = f"it returned {kind}; a predicate returns booleans, such as kv.index <= q.index{missing}"
            raise FunctionError(self.described, "wrong-type", fault)
        return check_scalar(self.described, answer)

    def allows(self, q: Token, kv: Token) -> Tensor:
        """Evaluate the predicate; return false for free slots and padding."""
        return (kv.index >= 0) & self.evaluate(q, kv)

    def dense(self, q: Tokens, kv: Tokens, num_heads: int) -> Tensor:
        """Return the mask as booleans, `[B, 1 or H, T, S]`: H only if the predicate depends on heads."""
        return block_mask.evaluate_cells(self.allows, q, kv, num_heads)

    def sparsity(self, q: Tokens, kv: Tokens | None = None, num_heads: int = 1) -> Sparsity:
        """Count this mask's full, partial and empty blocks of 128 x 128, for queries q against slots kv (default: q).

        A mask that depends on heads has blocks for each of num_heads; any other counts once for all heads.
        """
        full, some = self.blocks(q, q if kv is None else kv, num_heads)
        listed, whole = int(some.sum()), int(full.sum())
        return Sparsity(whole, listed - whole, some.numel() - listed)

    def blocks(self, q: Tokens, kv: Tokens, num_heads: int) -> tuple[Tensor, Tensor]:
        """Return which blocks are full, and which are not empty; see `block_mask.classify_blocks`."""
        return block_mask.classify_blocks(self.allows, q, kv, num_heads)

    def block_lists(self, q: Tokens, kv: Tokens, num_heads: int, together: bool = False) -> BlockLists:
        """List the blocks to compute; see `block_mask.list_blocks`."""
        return block_mask.list_blocks(self.allows, q, kv, num_heads, together)

    def block_mask(
        self, q: Tokens, kv: Tokens, num_heads: int, lists: BlockLists | None = None, pages: PageTable | None = None
    ) -> BlockMask:
        """Build FlexAttention's BlockMask; see `block_mask.make_block_mask`. lists: built here by default."""
        lists = lists or self.block_lists(q, kv, num_heads)
        return block_mask.make_block_mask(self.allows, q, kv, lists, pages)


def logical(token: Token) -> Tensor:
    """Return the token's index, 0 for free slots, for functions that do not know of free slots."""
    return token.index.clamp(min=0)
