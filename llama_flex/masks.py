"""Who may attend to whom: predicates over the attributes of tokens, and the block lists FlexAttention needs.

A mask is written once, over attributes, and knows nothing of caches: it holds in the full forward, in chunks, in cached
decoding, in ragged batches, eager and compiled. Dimensions: B batch, H heads, T query tokens, S slots.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # slots and query rows per block of a BlockMask
# Cells of the mask evaluated at once when its blocks are classified; bounds the memory of a long forward.
_CELLS_AT_ONCE = 2**24
_EMPTY = types.CellType()  # what a closure holds of a variable that has no value yet


class Tokens(NamedTuple):
    """The attributes of a batch of tokens, or of the tokens lying in a set of slots; each `[B, T]`, int32.

    index: place in the order of arrival in its sequence; -1 for padding and for a free slot.
    position: rotary position; parallel segments may share positions.
    segment: a small integer for documents, prompts, generated text; 0 unless set.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    position: Tensor
    segment: Tensor


class Token:
    """The attributes of one token as a predicate sees them: scalars in a kernel, broadcasting tensors when dense."""

    __slots__ = ("_at", "_tokens", "batch", "head")

    def __init__(self, tokens: Tokens, batch: Tensor, head: Tensor, at: Tensor) -> None:
        self._tokens, self.batch, self.head, self._at = tokens, batch, head, at

    @property
    def index(self) -> Tensor:
        """Place in the order of arrival in its sequence."""
        return self._tokens.index[self.batch, self._at]

    @property
    def position(self) -> Tensor:
        """Rotary position."""
        return self._tokens.position[self.batch, self._at]

    @property
    def segment(self) -> Tensor:
        """Segment number; 0 unless set."""
        return self._tokens.segment[self.batch, self._at]


Predicate: TypeAlias = Callable[[Token, Token], Tensor | bool]


class Mask:
    """A predicate `(q, kv) -> bool`: may query token q attend to key token kv?

    Both have `.batch .head .index .position .segment`. The predicate uses tensor operations only (`&`, `|`, `~`,
    comparisons, indexing of captured tensors); it may return a Python bool. Masks combine with `&`, `|` and `~`.
    Whatever they say, a free slot and padding are never attended to.
    """

    def __init__(self, predicate: Predicate, name: str | None = None) -> None:
        self.predicate = predicate
        self.name: str = name or str(getattr(predicate, "__name__", type(predicate).__name__))

    def __repr__(self) -> str:
        return self.name

    def __and__(self, other: Mask) -> Mask:
        return Mask(lambda q, kv: self.evaluate(q, kv) & other.evaluate(q, kv), f"({self} & {other})")

    def __or__(self, other: Mask) -> Mask:
        return Mask(lambda q, kv: self.evaluate(q, kv) | other.evaluate(q, kv), f"({self} | {other})")

    def __invert__(self) -> Mask:
        return Mask(lambda q, kv: ~self.evaluate(q, kv), f"~{self}")

    def to(self, device: torch.device | str) -> Mask:
        """This mask with the tensors that its predicate captures on `device`; itself if they are there already.

        Found in closures, defaults, partials, methods, attributes of callable objects, lists, tuples, dicts and other
        masks; a global variable is not captured, and stays where it is.
        """
        predicate = _moved(self.predicate, device)
        return self if predicate is self.predicate else Mask(predicate, self.name)

    def evaluate(self, q: Token, kv: Token) -> Tensor:
        """The predicate's answer as a boolean tensor. Raises ValueError for an answer of another kind."""
        answer = self.predicate(q, kv)
        if isinstance(answer, bool):
            return torch.full_like(kv.index, answer, dtype=torch.bool)
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
            kind = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(f"mask {self} returned {kind}; a predicate returns booleans, such as kv.index <= q.index")
        return answer

    def _allows(self, q: Token, kv: Token) -> Tensor:
        return (kv.index >= 0) & self.evaluate(q, kv)

    def dense(self, q: Tokens, kv: Tokens, num_heads: int) -> Tensor:
        """The mask as booleans, `[B, 1 or H, T, S]`: H only if the predicate looks at heads."""
        return self._cells(q, kv, num_heads, _range(q.index.shape[1], q), _range(kv.index.shape[1], q))

    def _cells(self, q: Tokens, kv: Tokens, num_heads: int, rows: Tensor, slots: Tensor) -> Tensor:
        b = q.index.shape[0]
        batch, head = _range(b, q)[:, None, None, None], _range(num_heads, q)[:, None, None]
        cells = self._allows(Token(q, batch, head, rows[:, None]), Token(kv, batch, head, slots))
        return cells.expand(b, -1, len(rows), len(slots))

    def block_mask(self, q: Tokens, kv: Tokens, num_heads: int) -> BlockMask:
        """The FlexAttention BlockMask of queries q against slots kv: exact lists of full and of partial blocks.

        Only tensor operations, so it can be part of a compiled step: no host synchronisation, no Python branch on a
        value, static shapes.
        """
        (b, t), s = q.index.shape, kv.index.shape[1]
        rows_per_block = min(t, BLOCK)  # a decoding step has one row, and evaluates one
        # Rows and slots that only fill up the last block repeat the last real one, which changes no `any` or `all`.
        rows = _range(-(-t // rows_per_block) * rows_per_block, q).clamp(max=t - 1)
        slots = _range(-(-s // BLOCK) * BLOCK, q).clamp(max=s - 1)
        whole = _range(len(slots) // BLOCK, q) < s // BLOCK  # an incomplete block is never full: it needs its bounds
        kinds = []
        for part in rows.split(max(1, _CELLS_AT_ONCE // (b * len(slots) * rows_per_block)) * rows_per_block):
            cells = self._cells(q, kv, num_heads, part, slots)
            grid = cells.reshape(*cells.shape[:2], -1, rows_per_block, len(slots) // BLOCK, BLOCK)
            kinds.append((grid.all(5).all(3) & whole, grid.any(5).any(3)))
        full, some = (torch.cat(kind, dim=2) for kind in zip(*kinds, strict=True))  # [B, 1 or H, Tb, Sb]
        partial_num, partial_idx = _list_blocks(some & ~full)
        full_num, full_idx = _list_blocks(full)
        # A row of blocks with none listed at all is NaN in the compiled CPU kernel, so it lists one, for mask_mod to
        # mask. Not a row with full blocks: a block in both lists would count twice.
        partial_num = partial_num.masked_fill(~some.any(-1), 1)

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self._allows(Token(q, b, h, q_idx), Token(kv, b, h, kv_idx))

        return BlockMask.from_kv_blocks(
            partial_num,
            partial_idx,
            full_num,
            full_idx,
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod,
            seq_lengths=(t, s),
            compute_q_blocks=False,  # only a backward pass needs them
        )


def _moved(value: Any, device: torch.device | str, seen: dict[int, Any] | None = None) -> Any:
    """`value` with the tensors it holds on `device`: in closures, defaults, partials, methods, attributes of callable
    objects, lists, tuples, dicts and other masks. The very same object if there is nothing to move."""
    seen = {} if seen is None else seen
    if id(value) in seen:  # a function that refers to itself
        return seen[id(value)]
    seen[id(value)] = value
    if isinstance(value, Tensor | Mask):
        return value.to(device)

    def parts_moved(parts: Sequence[Any]) -> list[Any] | None:
        moved = [_moved(part, device, seen) for part in parts]
        return None if all(new is old for new, old in zip(moved, parts, strict=True)) else moved

    def attributes_moved(holder: Any) -> Any:
        moved = parts_moved([vars(holder)])
        if moved is not None:
            holder = copy.copy(holder)
            vars(holder).update(moved[0])
        return holder

    if type(value) in (list, tuple):
        moved = parts_moved(value)
        return value if moved is None else type(value)(moved)
    if type(value) is dict:
        moved = parts_moved(list(value.values()))
        return value if moved is None else dict(zip(value, moved, strict=True))
    if isinstance(value, functools.partial):
        moved = parts_moved([value.func, value.args, value.keywords])
        return value if moved is None else functools.partial(moved[0], *moved[1], **moved[2])
    if isinstance(value, types.MethodType):
        holder = attributes_moved(value.__self__) if hasattr(value.__self__, "__dict__") else value.__self__
        return value if holder is value.__self__ else types.MethodType(value.__func__, holder)
    if isinstance(value, types.FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != _EMPTY]
        moved = parts_moved([value.__defaults__, value.__kwdefaults__, *(cell.cell_contents for cell in cells)])
        if moved is None:
            return value
        new = dict(zip(map(id, cells), map(types.CellType, moved[2:]), strict=True))
        closure = tuple(new.get(id(cell), cell) for cell in value.__closure__ or ())
        function = types.FunctionType(value.__code__, value.__globals__, value.__name__, moved[0], closure)
        function.__kwdefaults__ = moved[1]
        return function
    if callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
        return attributes_moved(value)
    return value


def _range(n: int, like: Tokens) -> Tensor:
    return torch.arange(n, device=like.index.device)


def _list_blocks(listed: Tensor) -> tuple[Tensor, Tensor]:
    """The number of listed blocks in each row and their indices, in order: int32 `[B, H, Tb]` and `[B, H, Tb, Sb]`."""
    order = torch.argsort(listed.to(torch.int8), dim=-1, descending=True, stable=True)
    return listed.sum(-1, dtype=torch.int32), order.to(torch.int32)


def causal() -> Mask:
    """A token attends to itself and to the tokens that arrived before it."""
    return Mask(lambda q, kv: kv.index <= q.index, "causal()")


def bidirectional() -> Mask:
    """Every token attends to every other."""
    return Mask(lambda q, kv: True, "bidirectional()")


def sliding_window(width: int | Tensor) -> Mask:
    """A token attends to the last `width` tokens, itself included, as in transformers. A tensor `[B]`: one a row."""
    name = _named("sliding_window", width, 1)
    return Mask(
        lambda q, kv: (kv.index <= q.index) & (q.index - kv.index < _of_row(width, q)),
        name,
    )


def sink(count: int | Tensor) -> Mask:
    """A token attends to the first `count` tokens, as far as they came before it (arXiv:2309.17453)."""
    name = _named("sink", count, 0)
    return Mask(lambda q, kv: (kv.index <= q.index) & (kv.index < _of_row(count, q)), name)


def prefix_lm(length: int | Tensor) -> Mask:
    """Causal, but the first `length` tokens also attend to each other in both directions (arXiv:1910.10683).

    In a cache the prefix must be appended in one piece: a token cannot attend to what has not arrived.
    """
    name = _named("prefix_lm", length, 0)
    return Mask(
        lambda q, kv: (kv.index <= q.index) | (q.index < _of_row(length, q)) & (kv.index < _of_row(length, q)),
        name,
    )


def chunked(size: int | Tensor) -> Mask:
    """Causal within chunks of `size` tokens; nothing crosses from one chunk to the next."""
    name = _named("chunked", size, 1)
    return Mask(
        lambda q, kv: (kv.index <= q.index) & (kv.index // _of_row(size, q) == q.index // _of_row(size, q)),
        name,
    )


def dilated(step: int | Tensor) -> Mask:
    """Causal, every `step`-th token counted back from the token itself (arXiv:2004.05150)."""
    name = _named("dilated", step, 1)
    return Mask(lambda q, kv: (kv.index <= q.index) & ((q.index - kv.index) % _of_row(step, q) == 0), name)


def document() -> Mask:
    """A token attends to tokens of its own segment; combine with `causal()`."""
    return Mask(lambda q, kv: q.segment == kv.segment, "document()")


def _of_row(value: int | Tensor, token: Token) -> int | Tensor:
    """A parameter that is one number for all, or a tensor `[B]` with one for each row."""
    return value[token.batch] if isinstance(value, Tensor) and value.dim() else value


def _named(name: str, value: int | Tensor, least: int) -> str:
    """The name of a mask with its parameter. Raises ValueError for a number below `least`."""
    if not isinstance(value, Tensor) and value < least:
        raise ValueError(f"{name} needs a number of at least {least}, not {value}")
    return f"{name}({value.tolist() if isinstance(value, Tensor) else value})"
