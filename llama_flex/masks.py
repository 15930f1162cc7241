"""Who may attend to whom: predicates over the attributes of tokens, and the block lists FlexAttention needs.

A mask is written once, over attributes, and knows nothing of caches: it holds in the full forward, in chunks, in cached
decoding, in ragged batches, eager and compiled. Dimensions: B batch, H heads, T query tokens, S slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .faults import FunctionError
from .rules import Rule, Token, Tokens, arange, each_cell, name_of, take

if TYPE_CHECKING:
    from .paging import Pages

BLOCK = 128  # slots and query rows per block of a BlockMask
# Cells of the mask evaluated at once when its blocks are classified; bounds the memory of a long forward.
_CELLS_AT_ONCE = 2**24
SHARED = 0  # the segment that every fused prompt sees
GENERATED = -1  # the segment of generated text, which sees every fused prompt


Parameter: TypeAlias = int | Tensor  # one number for all rows, or a tensor [B] with one a row
Predicate: TypeAlias = Callable[[Token, Token], Tensor | bool]


class Sparsity(NamedTuple):
    """How many blocks of a mask are full, partial and empty. Empty ones cost nothing; full ones skip the predicate."""

    full: int
    partial: int
    empty: int

    @property
    def computed(self) -> float:
        """The fraction of blocks that attention computes."""
        return (self.full + self.partial) / sum(self)

    def __str__(self) -> str:
        return f"{self.full} full, {self.partial} partial, {self.empty} empty blocks: {self.computed:.1%} computed"


class BlockLists(NamedTuple):
    """The blocks that FlexAttention computes: how many in each row of blocks, int32 `[B, 1 or H, Tb]`, and which,
    `[B, 1 or H, Tb, Sb]`; those that need the predicate, and, if they are apart, those that are allowed as a whole."""

    partial_num: Tensor
    partial_idx: Tensor
    full_num: Tensor | None
    full_idx: Tensor | None
    # The same by slots, for a backward pass: how many blocks of queries list a block of slots, and which.
    partial_q_num: Tensor | None = None
    partial_q_idx: Tensor | None = None
    full_q_num: Tensor | None = None
    full_q_idx: Tensor | None = None


class Mask(Rule):
    """A predicate `(q, kv) -> bool`: may query token q attend to key token kv?

    Both have `.batch .head .index .position .segment`. The predicate uses tensor operations only (`&`, `|`, `~`,
    comparisons, indexing of captured tensors); it may return a Python bool. Masks combine with `&`, `|` and `~`.
    Whatever they say, a free slot and padding are never attended to.
    """

    function: Predicate
    kind = "mask"

    def __init__(self, function: Predicate, name: str | None = None, *, never_looks_ahead: bool = False) -> None:
        """never_looks_ahead: promise that no query sees a token that arrives after it; without the promise an Engine
        finds out, at the cost of making the block lists of long prompts once more."""
        super().__init__(function, name)
        self.never_looks_ahead = never_looks_ahead

    @classmethod
    def from_mask_mod(
        cls, mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | bool], name: str | None = None
    ) -> Mask:
        """The mask of FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`, read over the order of arrival.

        So it means the same in cached decoding, where the rows and slots of the attention call are others.
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
        """The predicate's answer for one query and one key, a boolean tensor without dimensions.

        Raises FunctionError for a predicate that fails, or answers with anything else.
        """
        answer = self.ask(q, kv)
        if isinstance(answer, bool):
            return torch.full_like(kv.index, answer, dtype=torch.bool)
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
            kind = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
            missing = "; is a `return` missing?" if answer is None else ""
            fault = f"it returned {kind}; a predicate returns booleans, such as kv.index <= q.index{missing}"
            raise FunctionError(self.described, "wrong-type", fault)
        return one_value(answer, self)

    def _allows(self, q: Token, kv: Token) -> Tensor:
        return (kv.index >= 0) & self.evaluate(q, kv)

    def dense(self, q: Tokens, kv: Tokens, num_heads: int) -> Tensor:
        """The mask as booleans, `[B, 1 or H, T, S]`: H only if the predicate looks at heads."""
        return self._cells(q, kv, num_heads)

    def _cells(
        self, q: Tokens, kv: Tokens, num_heads: int, rows: Tensor | None = None, slots: Tensor | None = None
    ) -> Tensor:
        cells = each_cell(self._allows, q, kv, arange(num_heads, q), rows, slots)
        return cells if cells.stride(1) else cells[:, :1]

    def sparsity(self, q: Tokens, kv: Tokens | None = None, num_heads: int = 1) -> Sparsity:
        """How many blocks of 128 x 128 this mask lists for queries q against slots kv (default: against themselves).

        A mask that looks at heads has blocks for each of num_heads; any other counts once for all.
        """
        full, some = self.blocks(q, q if kv is None else kv, num_heads)
        listed, whole = int(some.sum()), int(full.sum())
        return Sparsity(whole, listed - whole, some.numel() - listed)

    def blocks(self, q: Tokens, kv: Tokens, num_heads: int) -> tuple[Tensor, Tensor]:
        """Which blocks of query rows and slots are full, and which allow anything: `[B, 1 or H, Tb, Sb]` both.

        What padding among the queries sees is nobody's concern, so it keeps no block from being full.
        """
        (b, t), s = q.index.shape, kv.index.shape[1]
        rows_per_block = min(t, BLOCK)  # a decoding step has one row, and evaluates one
        # Rows and slots that only fill up the last block repeat the last real one, which changes no `any` or `all`.
        rows = arange(-(-t // rows_per_block) * rows_per_block, q).clamp(max=t - 1)
        slots = arange(-(-s // BLOCK) * BLOCK, q).clamp(max=s - 1)
        whole = arange(len(slots) // BLOCK, q) < s // BLOCK  # an incomplete block is never full: it needs its bounds
        kinds = []
        at_once = max(1, _CELLS_AT_ONCE // (b * len(slots) * rows_per_block)) * rows_per_block
        # Compiled, cells are never in memory.
        for part in [rows] if torch.compiler.is_compiling() else rows.split(at_once):
            cells = self._cells(q, kv, num_heads, part, slots)
            blocks = cells.reshape(*cells.shape[:2], -1, rows_per_block, len(slots) // BLOCK, BLOCK)
            padding = (q.index[:, part] < 0).reshape(len(q.index), 1, -1, rows_per_block, 1)
            some = blocks.any(5).any(3)
            kinds.append(((blocks.all(5) | padding).all(3) & whole & some, some))
        full, some = (torch.cat(kind, dim=2) for kind in zip(*kinds, strict=True))
        return full, some

    def block_lists(self, q: Tokens, kv: Tokens, num_heads: int, together: bool = False) -> BlockLists:
        """The blocks of queries q against slots kv, exactly. together: none apart as allowed as a whole.

        Only tensor operations, so it can be part of a compiled step: no host synchronisation, no Python branch on a
        value, static shapes.
        """
        full, some = self.blocks(q, kv, num_heads)
        partial_num, partial_idx = _list_blocks(some if together else some & ~full)
        # A row of blocks with none listed at all is NaN in the compiled CPU kernel, so it lists one, for mask_mod to
        # mask (`attention.view_of` knows rows that nobody reads). Not a row with full blocks: a block in both lists
        # would count twice.
        partial_num = partial_num.masked_fill(~some.any(-1), 1)
        if together:
            return BlockLists(partial_num, partial_idx, None, None)
        lists = BlockLists(partial_num, partial_idx, *_list_blocks(full))
        if not (torch.is_grad_enabled() and full.is_cuda):
            return lists
        by_slots = (_list_blocks(x.transpose(-1, -2)) for x in (some & ~full, full))
        return BlockLists(*lists[:4], *itertools.chain(*by_slots))

    def block_mask(
        self, q: Tokens, kv: Tokens, num_heads: int, lists: BlockLists | None = None, pages: Pages | None = None
    ) -> BlockMask:
        """The FlexAttention BlockMask of queries q against slots kv. lists: its block lists, where they are known.
        pages: where the slots are in memory, if not in their order; the lists are of pages then."""
        lists = lists or self.block_lists(q, kv, num_heads)
        length = kv.index.shape[1] if pages is None else pages.block_of.shape[1] * BLOCK

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            if pages is None:
                return self._allows(Token(q, b, h, q_idx), Token(kv, b, h, kv_idx))
            slot = slot_of(pages.block_of, b, kv_idx)
            return (slot >= 0) & self._allows(Token(q, b, h, q_idx), Token(kv, b, h, slot.clamp(min=0)))

        return BlockMask((q.index.shape[1], length), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)


def slot_of(block_of: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """Which slot of a row lies at a place of the pool, negative if none does; block_of: see `paging.Pages`."""
    return take(block_of, row, place // BLOCK) * BLOCK + place % BLOCK


def _list_blocks(listed: Tensor) -> tuple[Tensor, Tensor]:
    """The number of listed blocks in each row and their indices, in order: int32 `[B, H, Tb]` and `[B, H, Tb, Sb]`."""
    return listed.sum(-1, dtype=torch.int32), first_true(listed, listed.shape[-1]).to(torch.int32)


def first_true(flags: Tensor, count: int) -> Tensor:
    """The indices of the first `count` true flags along the last dimension, in order, then zeros: `[..., count]`."""
    size = flags.shape[-1]
    index = torch.arange(size, device=flags.device).expand(flags.shape)
    if count == 1:  # decoding: a reduction is 10 us faster on a GPU
        first = torch.where(flags, index, size).amin(-1, keepdim=True)
        return first.masked_fill(first == size, 0)
    rank = torch.where(flags, flags.cumsum(-1) - 1, count).clamp(max=count)  # count: not wanted
    return index.new_zeros(*flags.shape[:-1], count + 1).scatter(-1, rank, index)[..., :count]


def one_value(answer: Tensor, rule: Rule) -> Tensor:
    """An answer for one query and one key without dimensions. Raises FunctionError for one of several numbers."""
    if answer.numel() != 1:
        fault = (
            f"it returned {list(answer.shape)} for one query and one key, not one value: use operations of single "
            "elements, and tables at an index, `table[kv.index]`"
        )
        raise FunctionError(rule.described, "wrong-shape", fault)
    return answer.reshape(())


def _backward(function: Predicate, name: str) -> Mask:
    """A named mask under which no token attends to a later one."""
    return Mask(function, name, never_looks_ahead=True)


def causal() -> Mask:
    """A token attends to itself and to the tokens that arrived before it."""
    return _backward(lambda q, kv: kv.index <= q.index, "causal()")


def bidirectional() -> Mask:
    """Every token attends to every other."""
    return Mask(lambda q, kv: True, "bidirectional()")


def sliding_window(width: Parameter) -> Mask:
    """A token attends to the last `width` tokens, itself included, as in transformers."""
    name = named("sliding_window", width, 1)
    return _backward(lambda q, kv: (kv.index <= q.index) & (q.index - kv.index < of_row(width, q)), name)


def bidirectional_window(reach: Parameter) -> Mask:
    """A token attends to those at most `reach` before or after it: transformers' window where `is_causal` is false."""
    name = named("bidirectional_window", reach, 0)
    return Mask(lambda q, kv: (q.index - kv.index).abs() <= of_row(reach, q), name)


def sink(count: Parameter) -> Mask:
    """A token attends to the first `count` tokens, as far as they came before it (arXiv:2309.17453)."""
    name = named("sink", count, 0)
    return _backward(lambda q, kv: (kv.index <= q.index) & (kv.index < of_row(count, q)), name)


def prefix_lm(length: Parameter) -> Mask:
    """Causal, but the first `length` tokens also attend to each other in both directions (arXiv:1910.10683).

    In a cache the prefix must be appended in one piece: a token cannot attend to what has not arrived.
    """
    name = named("prefix_lm", length, 0)
    return Mask(
        lambda q, kv: (kv.index <= q.index) | (q.index < of_row(length, q)) & (kv.index < of_row(length, q)), name
    )


def chunked(size: Parameter) -> Mask:
    """Causal within chunks of `size` tokens; nothing crosses from one chunk to the next."""
    name = named("chunked", size, 1)
    return _backward(
        lambda q, kv: (kv.index <= q.index) & (kv.index // of_row(size, q) == q.index // of_row(size, q)), name
    )


def dilated(step: Parameter) -> Mask:
    """Causal, every `step`-th token counted back from the token itself (arXiv:2004.05150)."""
    name = named("dilated", step, 1)
    return _backward(lambda q, kv: (kv.index <= q.index) & ((q.index - kv.index) % of_row(step, q) == 0), name)


def global_tokens(indices: Sequence[int] | Tensor) -> Mask:
    """The tokens at `indices` attend to all and all attend to them (arXiv:2004.05150); combine with `causal()`.

    indices: numbers, the same for every row; or a boolean tensor `[N]` or `[B, N]` that says it of the first N tokens.
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
    """A token attends to tokens of its own segment; combine with `causal()`."""
    return Mask(lambda q, kv: q.segment == kv.segment, "document()")


def shared_prefix(length: Parameter) -> Mask:
    """Causal within each segment, and every token attends to the first `length` tokens, of whatever segment."""
    name = named("shared_prefix", length, 0)
    return _backward((causal() & (document() | sink(length))).function, name)


def fused() -> Mask:
    """Prompts side by side: causal; a prompt attends to its own segment and to the shared one (segment 0), generated
    tokens (segment -1) to everything. Without segments the same as `causal()`. See `llama_flex.fuse`."""
    return _backward(
        lambda q, kv: (
            (kv.index <= q.index) & ((kv.segment == q.segment) | (kv.segment == SHARED) | (q.segment == GENERATED))
        ),
        "fused()",
    )


def tree(parents: Sequence[int] | Tensor, start: Parameter = 0) -> Mask:
    """A token attends to itself and its ancestors in a tree, such as of drafted continuations (arXiv:2305.09781).

    parents: for each node the number of its parent, a smaller one, or -1 for a root; a tensor `[B, N]`: a tree a row.
    Node n is the token with index `start` + n. Every token attends to those before `start`, and the tokens after the
    tree attend to all that came before them. Raises ValueError for a parent that is not an earlier node.
    """
    place = named("start", start, 0)
    table = torch.as_tensor(parents)
    if not table.numel() or table.dim() not in (1, 2) or table.is_floating_point():
        raise ValueError(f"tree needs a parent for each node, integers [N] or [B, N], not {_kind(table)}")
    # Nodes numbered in the order of a depth-first walk: those under node n have the numbers enter[n] to leave[n] - 1,
    # so two tables of N numbers answer what would else take N x N.
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
    """For each node its number in a depth-first walk, and the first number after those of its descendants."""
    sizes = [1] * len(parents)
    for node in range(len(parents) - 1, -1, -1):
        if not -1 <= parents[node] < node:
            raise ValueError(f"tree: node {node} has parent {parents[node]}; give an earlier node, or -1 for a root")
        if parents[node] >= 0:
            sizes[parents[node]] += sizes[node]
    enter, free, roots = [], [0] * len(parents), 0  # free: the next number to give below each node
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


def logical(token: Token) -> Tensor:
    """The place in the order of arrival for functions that know no free slots: those, of index -1, read as 0."""
    return token.index.clamp(min=0)


def of_row(value: Parameter, token: Token) -> int | Tensor:
    """A parameter that is one number for all, or a tensor `[B]` with one for each row."""
    return take(value, token.batch) if isinstance(value, Tensor) and value.dim() else value


def lookup(table: Tensor, token: Token, at: Tensor) -> Tensor:
    """The entry `at` of a table `[N]`, or of the token's row of a table `[B, N]`; of the nearest one if outside."""
    at = at.clamp(0, table.shape[-1] - 1)
    return take(table, at) if table.dim() == 1 else take(table, token.batch, at)


def named(name: str, value: int | float | Tensor, least: float) -> str:
    """The name of a rule with its parameter. Raises ValueError for a number below `least`."""
    if isinstance(value, Tensor):
        return f"{name}({_kind(value)})"
    if not value >= least:  # NaN compares false
        raise ValueError(f"{name} needs a number of at least {least}, not {value}")
    return f"{name}({value})"


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
