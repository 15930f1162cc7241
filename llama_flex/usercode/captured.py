"""Functions that capture tensors: move the tensors to a device, and tell which functions can share compiled code.

Captured tensors are found in closures, defaults, partials, methods, attributes of objects, lists, tuples, dicts and
other capturing functions. A global variable is not captured.
"""

from __future__ import annotations

import copy
import dis
import functools
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .modules import in_package

_EMPTY = types.CellType()  # a closure's cell for a variable that has no value yet


class CapturingFunction:
    """A function together with the tensors that it captures."""

    function: Callable[..., Any]

    def to(self, device: torch.device | str) -> Self:
        """Return this function with its tensors on `device`; itself if they are there already.

        Raises ValueError for a function that reads a global tensor on another kind of device.
        """
        moved: Self = _moved(self, device, {})
        return moved

    def structure(self) -> Hashable:
        """Return a key of all that compiled code depends on: code, constants, shapes and dtypes of tensors.

        Functions with the same structure differ only in the values of their tensors, and share compiled steps.
        """
        return _structure(self, lambda t: (t.shape, t.stride(), t.dtype, t.device), set())

    def identity(self) -> Hashable:
        """Return a key that is equal for functions that compute the same: same structure and same tensors."""
        return _structure(self, id, set())

    def is_own(self) -> bool:
        """Return whether it is made of this package's functions only, which read no values of tensors on the host."""
        return _is_own(self, set())

    def captured(self) -> list[Tensor]:
        """Return the captured tensors."""
        found: list[Tensor] = []
        _structure(self, found.append, set())
        return found

    def requires_grad(self) -> bool:
        """Return whether any captured tensor requires gradients."""
        return any(x.requires_grad for x in self.captured())


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name."""
    return str(getattr(function, "__name__", type(function).__name__))


class _Parts(NamedTuple):
    """A value taken apart: its kind, the values that it holds, and a function that rebuilds it with others."""

    kind: object  # hashable
    held: Sequence[Any]
    rebuild: Callable[[list[Any]], Any]


def _parts(value: Any) -> _Parts | None:
    """Take apart a value that may hold tensors; return None for one that holds nothing."""
    if isinstance(value, CapturingFunction):

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
    """Return `value` with its tensors on `device`, the very same object if there is nothing to move."""
    if isinstance(value, Tensor):
        moved = value.to(device)
        memory = moved.untyped_storage()
        # A view becomes a tensor of its own: compiled code should not depend on which tensors share memory.
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
    for name in function.__code__.co_names:  # names of attributes too
        tensor = function.__globals__.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() and tensor.device.type != device.type and _loads(function, name):
            raise ValueError(
                f"{function.__name__} reads the global tensor {name} on {tensor.device}, which is not moved: pass it "
                f"to the function, as in `lambda q, kv, {name}={name}: ...`"
            )


def _loads(function: types.FunctionType, name: str) -> bool:
    return any(op.opname == "LOAD_GLOBAL" and op.argval == name for op in dis.get_instructions(function))


def _is_own(value: Any, seen: set[int]) -> bool:
    if id(value) in seen or isinstance(value, Tensor):
        return True
    seen.add(id(value))
    parts = _parts(value)
    if parts is None:
        return not callable(value)
    of_python = type(value) in (list, tuple, dict, functools.partial, types.MethodType)
    module = value.__module__ if isinstance(value, types.FunctionType) else type(value).__module__
    return (of_python or in_package(module)) and all(_is_own(part, seen) for part in parts.held)


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
