"""What masks and score functions share: the attributes of tokens that they read, and the tensors that they carry.

A rule is a function over the attributes of a query token and a key token. It knows nothing of caches, so it holds in
the full forward, in chunks, in cached decoding, in ragged batches, eager and compiled.
Dimensions: B batch, H heads, T tokens (queries), S slots (keys).
"""

from __future__ import annotations

import copy
import dis
import functools
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from .faults import FunctionError, fault_of

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

    @classmethod
    def arriving(cls, count: int, *, batch: int = 1, segments: Tensor | None = None) -> Tokens:
        """`count` tokens in their order of arrival, as a forward without a cache sees them; on the CPU.

        segments: `[count]` or `[B, count]`, default 0.
        """
        index = torch.arange(count, dtype=torch.int32).expand(batch, -1)
        return cls(index, index, torch.zeros_like(index) if segments is None else segments.int().expand(batch, -1))


class Token:
    """The attributes of one token as a rule sees them, each a tensor without dimensions."""

    __slots__ = ("_at", "_tokens", "batch", "head")

    def __init__(self, tokens: Tokens, batch: Tensor, head: Tensor, at: Tensor) -> None:
        self._tokens, self.batch, self.head, self._at = tokens, batch, head, at

    @property
    def index(self) -> Tensor:
        """Place in the order of arrival in its sequence."""
        return take(self._tokens.index, self.batch, self._at)

    @property
    def position(self) -> Tensor:
        """Rotary position."""
        return take(self._tokens.position, self.batch, self._at)

    @property
    def segment(self) -> Tensor:
        """Segment number; 0 unless set."""
        return take(self._tokens.segment, self.batch, self._at)


# Some tokens: their indices, [N] for all rows or [B, N], or a function from all of them to booleans [B, T]; None: all.
Where: TypeAlias = Callable[[Tokens], Tensor] | Sequence[int] | Tensor | None


def selection(where: Callable[[Tokens], Tensor] | Sequence[int] | Tensor) -> Callable[[Tokens], Tensor]:
    """A function from tokens to booleans `[B, T]`. Raises ValueError, here or when called, for what is no choice."""
    if callable(where):

        def by_attributes(tokens: Tokens) -> Tensor:
            chosen, shape = where(tokens), tokens.index.shape
            if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != shape:
                found = f"{chosen.dtype} {list(chosen.shape)}" if isinstance(chosen, Tensor) else repr(chosen)
                raise ValueError(f"the function that chooses tokens returned {found}, not booleans {list(shape)}")
            return chosen

        return by_attributes

    what = "tokens are chosen by indices from 0, integers [N] or [B, N], or by a function"
    try:
        which = torch.as_tensor(where if isinstance(where, Tensor) else list(where))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{what}, not {where!r}") from None
    which = which if which.numel() else which.long()  # an empty list comes as floats
    if which.dim() not in (1, 2) or which.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{what}, not {which.dtype} {list(which.shape)}")
    if which.numel() and int(which.min()) < 0:
        raise ValueError(f"{what}, not {int(which.min())}")

    def by_index(tokens: Tokens) -> Tensor:
        index, those = tokens.index, which.to(tokens.index.device)
        if those.dim() == 1:
            return torch.isin(index, those)
        if len(those) not in (1, len(index)):
            raise ValueError(f"tokens are chosen by indices [N] or [{len(index)}, N], not {list(those.shape)}")
        return (index[:, :, None] == those[:, None]).any(-1)

    return by_index


def take(table: Tensor, *at: Tensor) -> Tensor:
    """`table[at]`, as the operator that a compiled step makes of `[]`; see `compiling.inductor`."""
    return torch.ops.aten.index(table, at)


def each_cell(
    function: Callable[..., Tensor],
    q: Tokens,
    kv: Tokens,
    heads: Tensor,
    rows: Tensor | None = None,
    slots: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """What a function of a query and a key token returns for every cell, `[B, heads, rows, slots]`.

    The function is asked for one cell at a time, as FlexAttention asks it, and torch.vmap makes one computation of
    that; what does not depend on a dimension has stride 0 there. heads: which ones. rows, slots: which queries and keys
    (default all). scores: of those cells; the function takes its cell's score first.
    """

    def cell(*at: Tensor) -> Tensor:
        *score, batch, head, row, slot = at
        return function(*score, Token(q, batch, head, row), Token(kv, batch, head, slot))

    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        cell = torch.vmap(cell, in_dims=dims if scores is None else (0, *dims))
    rows = arange(q.index.shape[1], q) if rows is None else rows
    slots = arange(kv.index.shape[1], kv) if slots is None else slots
    return cell(*([] if scores is None else [scores]), arange(len(q.index), q), heads, rows, slots)


def arange(n: int, like: Tokens) -> Tensor:
    """`0 .. n-1` on the device of `like`."""
    return torch.arange(n, device=like.index.device)


class Rule:
    """A function over a query token and a key token, with a name, and with the tensors that it captures.

    Captured tensors are found in closures, defaults, partials, methods, attributes of objects, lists, tuples, dicts and
    other rules. A global variable is not captured; `to` raises ValueError for one that would have to move.
    """

    kind = "function"  # what it is called in messages

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        if not callable(function):
            raise ValueError(f"{type(self).__name__} needs a function of a query and a key token, found {function!r}")
        self.function = function
        self.name: str = name or name_of(function)

    def __repr__(self) -> str:
        return self.name

    @property
    def described(self) -> str:
        """What it is and what it is called, for messages."""
        return f"{self.kind} {self.name}"

    def ask(self, *args: Any) -> Any:
        """What the function returns. Raises FunctionError, which says what is wrong and in which line, for what torch
        and Python raise; exceptions of its own come through."""
        if torch.compiler.is_compiling():  # the compiler reports what it cannot trace
            return self.function(*args)
        try:
            return self.function(*args)
        except (ArithmeticError, AttributeError, LookupError, NameError, RuntimeError, TypeError) as error:
            raise FunctionError(self.described, *fault_of(error)) from error

    def to(self, device: torch.device | str) -> Self:
        """This rule with the tensors that it captures on `device`; itself if they are there already."""
        return _moved(self, device, {})

    def structure(self) -> Hashable:
        """What a compiled graph of this rule depends on: its code, its constants, the kinds of its tensors.

        Rules of one structure differ only in the values of their tensors, and share compiled steps.
        """
        return _structure(self, lambda t: (t.shape, t.stride(), t.dtype, t.device), set())

    def requires_grad(self) -> bool:
        """Whether a tensor that it captures does."""
        found: list[bool] = []
        _structure(self, lambda t: found.append(t.requires_grad), set())
        return any(found)

    def identity(self) -> Hashable:
        """Equal for rules that compute the same: of one structure, with the very same tensors."""
        return _structure(self, id, set())


def name_of(function: Callable[..., Any]) -> str:
    """What a function is called."""
    return str(getattr(function, "__name__", type(function).__name__))


class _Parts(NamedTuple):
    """A value taken apart: what it is, what it holds, and how to make one that holds something else."""

    kind: object  # hashable
    held: Sequence[Any]
    rebuild: Callable[[list[Any]], Any]


def _parts(value: Any) -> _Parts | None:
    """How a value that may hold tensors is made up; None for one that holds nothing."""
    if isinstance(value, Rule):

        def with_function(held: list[Any]) -> Any:
            new = copy.copy(value)
            new.function = held[0]
            return new

        return _Parts(type(value), [value.function], with_function)
    if type(value) in (list, tuple) or hasattr(value, "_make"):
        return _Parts(type(value), value, getattr(type(value), "_make", type(value)))  # _make: of named tuples
    if isinstance(value, dict):

        def with_values(held: list[Any]) -> Any:
            new = copy.copy(value)
            new.update(zip(value, held, strict=True))
            return new

        return _Parts((type(value), *value), list(value.values()), with_values)
    if isinstance(value, functools.partial):
        held = [value.func, value.args, value.keywords]
        return _Parts(functools.partial, held, lambda held: functools.partial(held[0], *held[1], **held[2]))
    if isinstance(value, types.MethodType):
        held = [value.__self__]
        return _Parts(value.__func__, held, lambda held: types.MethodType(value.__func__, held[0]))
    if isinstance(value, types.FunctionType):
        return _function_parts(value)
    if not isinstance(value, type | types.ModuleType) and hasattr(value, "__dict__"):

        def with_attributes(held: list[Any]) -> Any:
            new = copy.copy(value)
            vars(new).update(held[0])
            return new

        # What a subclass of int or list holds, or an object with slots, is not in its attributes.
        slots = any(vars(base).get("__slots__") for base in type(value).__mro__)
        plain = type(value).__new__ is object.__new__ and not slots
        return _Parts(type(value) if plain else (type(value), id(value)), [vars(value)], with_attributes)
    return None


def _function_parts(function: types.FunctionType) -> _Parts:
    closure = function.__closure__ or ()
    full = [cell for cell in closure if cell != _EMPTY]

    def rebuild(held: list[Any]) -> types.FunctionType:
        new = dict(zip(map(id, full), map(types.CellType, held[3:]), strict=True))
        cells = tuple(new.get(id(cell), cell) for cell in closure)
        rebuilt = types.FunctionType(function.__code__, function.__globals__, function.__name__, held[0], cells)
        rebuilt.__kwdefaults__ = held[1]
        vars(rebuilt).update(held[2])
        return rebuilt

    held = [function.__defaults__, function.__kwdefaults__, vars(function), *(cell.cell_contents for cell in full)]
    return _Parts((function.__code__, id(function.__globals__)), held, rebuild)


def _moved(value: Any, device: torch.device | str, seen: dict[Any, Any]) -> Any:
    """`value` with the tensors it holds on `device`; the very same object if there is nothing to move."""
    if isinstance(value, Tensor):
        moved = value.to(device)
        memory = moved.untyped_storage()
        # A view becomes a tensor of its own: which tensors share memory is nothing that compiled code should depend on.
        shared = seen.setdefault(("memory", memory.data_ptr()), id(value)) != id(value)
        return moved.clone() if shared or memory.nbytes() != moved.nbytes else moved
    parts = None if id(value) in seen else _parts(value)
    if parts is None:
        return seen.get(id(value), value)
    if isinstance(value, types.FunctionType):
        _check_globals(value, torch.device(device))
    seen[id(value)] = value  # a function may refer to itself
    held = [_moved(part, device, seen) for part in parts.held]
    if any(new is not old for new, old in zip(held, parts.held, strict=True)):
        seen[id(value)] = parts.rebuild(held)
    return seen[id(value)]


def _check_globals(function: types.FunctionType, device: torch.device) -> None:
    for name in function.__code__.co_names:  # of attributes too
        tensor = function.__globals__.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() and tensor.device.type != device.type and _loads(function, name):
            raise ValueError(
                f"{function.__name__} reads the global tensor {name} on {tensor.device}, which stays there: give it to "
                f"the function, as in `lambda q, kv, {name}={name}: ...`"
            )


def _loads(function: types.FunctionType, name: str) -> bool:
    return any(op.opname == "LOAD_GLOBAL" and op.argval == name for op in dis.get_instructions(function))


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _structure(value: Any, of_tensor: Callable[[Tensor], Hashable], seen: set[int]) -> Hashable:
    if isinstance(value, Tensor):
        return "tensor", of_tensor(value)
    if id(value) in seen:
        return "again"
    parts = _parts(value)
    if parts is None:
        return type(value), value if _hashable(value) else id(value)
    seen.add(id(value))
    structure = parts.kind, tuple(_structure(part, of_tensor, seen) for part in parts.held)
    seen.remove(id(value))
    return structure
