"""Record the operations of an uncompiled step on a CPU, and replay them without the Python code that called them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

T = TypeVar("T")
_CONSTANT = torch.ops.aten.arange, torch.ops.aten.scalar_tensor  # whose results a step only reads


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
    made: dict[int, str] = {}  # id of a tensor that a replay makes: the expression for it
    names: dict[str, Any] = {"unflatten": tree_unflatten}  # of all else; so no tensor is kept that a replay makes

    def name(prefix: str, value: Any) -> str:
        names[key := f"{prefix}{len(names)}"] = value
        return key

    def express(value: Any) -> str:
        if id(value) in made:
            return made[id(value)]
        if isinstance(value, list | tuple) and any(id(x) in made for x in value):  # of tensors; none is nested
            return f"[{', '.join(map(express, value))}]"
        return name("constant", value)

    # Written out as Python, since a loop over operations and arguments would take as long as the smaller operations.
    lines = ["def replay():"]
    for n, (function, args, options, returned) in enumerate(recorder.calls):
        known = set(map(id, tree_leaves((args, options))))
        if made.keys().isdisjoint(known) and _is_fixed(function, args, returned):
            continue
        given = [*map(express, args), *(f"{key}={express(value)}" for key, value in options.items())]
        lines.append(f"    result{n} = {name('operation', function)}({', '.join(given)})")
        several = isinstance(returned, list | tuple)
        for i, x in enumerate(returned) if several else ((None, returned),):
            if isinstance(x, Tensor) and id(x) not in known:
                made[id(x)] = f"result{n}[{i}]" if several else f"result{n}"
    leaves, tree = tree_flatten(result)
    lines.append(f"    return unflatten([{', '.join(map(express, leaves))}], {name('tree', tree)})")
    exec("\n".join(lines), names)
    return result, names.pop("replay")  # else it would refer to itself, and its tensors wait for the garbage collector


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
