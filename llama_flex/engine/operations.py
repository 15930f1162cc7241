"""Record the operations of an uncompiled step on a CPU, and replay them without the Python code that called them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

T = TypeVar("T")
_CONSTANT = torch.ops.aten.arange, torch.ops.aten.scalar_tensor  # whose results a step only reads


class _Operation(NamedTuple):
    """An operation: its arguments, and which of them are results of earlier ones.

    args, kwargs: None for those. sources: for each its place, and in a list its place there, the operation that made
    it, and which of several results it is.
    """

    function: OpOverload
    args: list[Any]
    kwargs: dict[str, Any]
    sources: list[tuple[int | str, int | None, int, int | None]]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[OpOverload, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def record(step: Callable[[], T]) -> tuple[T, Callable[[], T]]:
    """Run a step while recording its operations; return its result and a replay function.

    A replay works on the same memory: the step must read its inputs from, and write its state to, tensors that persist.
    What it returns is new each time. Its Python code must not depend on values of tensors.
    """
    with _Recorder() as recorder:
        result = step()
    made: dict[int, tuple[int, int | None]] = {}  # id of a tensor: the operation that made it, and which result it is
    operations: list[_Operation] = []
    for function, args, options, returned in recorder.calls:
        sources, kwargs = [], dict(options)
        given = [list(x) if isinstance(x, list | tuple) else x for x in args]
        for place, x in (*enumerate(given), *kwargs.items()):
            for inner, tensor in enumerate(x) if isinstance(x, list) else ((None, x),):
                if id(tensor) in made:
                    sources.append((place, inner, *made[id(tensor)]))
        if not sources and _is_fixed(function, args, returned):
            continue
        for place, inner, *_ in sources:  # keep no tensor that a replay makes
            _put(None, given if isinstance(place, int) else kwargs, place, inner)
        known = set(map(id, tree_leaves((args, options))))
        for i, x in enumerate(returned) if isinstance(returned, list | tuple) else ((None, returned),):
            if isinstance(x, Tensor) and id(x) not in known:
                made[id(x)] = len(operations), i
        operations.append(_Operation(function, given, kwargs, sources))

    leaves, tree = tree_flatten(result)
    outputs = [(n, made[id(x)]) for n, x in enumerate(leaves) if id(x) in made]

    def replay() -> T:
        results: list[Any] = []
        for function, fixed, named, sources in operations:
            args = [list(x) if isinstance(x, list) else x for x in fixed]
            kwargs = dict(named)
            for place, inner, operation, which in sources:
                x = results[operation] if which is None else results[operation][which]
                _put(x, args if isinstance(place, int) else kwargs, place, inner)
            results.append(function(*args, **kwargs))
        now = list(leaves)
        for n, (operation, which) in outputs:
            now[n] = results[operation] if which is None else results[operation][which]
        return cast(T, tree_unflatten(now, tree))

    return result, replay


def _put(x: Any, arguments: Any, place: int | str, inner: int | None) -> None:
    """Set an argument, or what stands at `inner` in one that is a list."""
    if inner is None:
        arguments[place] = x
    else:
        arguments[place][inner] = x


def _is_fixed(function: OpOverload, args: tuple[Any, ...], returned: Any) -> bool:
    """Return whether an operation on tensors that persist gives the same each time: a view, or a constant.

    Not views of a parameter, whose memory `parameter.data = ...` replaces. An operation that may return a view may
    return a copy, too: `to` does, which is an operation of its own in `torch.inference_mode()`.
    """
    if function.overloadpacket in _CONSTANT:
        return True
    aliases = [x.alias_info for x in function._schema.returns]
    if not aliases or any(alias is None or alias.is_write for alias in aliases):
        return False
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    memory = {x.untyped_storage().data_ptr() for x in tensors if not isinstance(x, nn.Parameter)}
    views = [x for x in tree_leaves(returned) if isinstance(x, Tensor)]
    return len(tensors) > 0 and all(x.untyped_storage().data_ptr() in memory for x in views)
