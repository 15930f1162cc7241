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
_CONSTANT = torch.ops.aten.arange, torch.ops.aten.scalar_tensor  # operations on no tensor that give the same each time


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
    What it returns is new each time. Its Python code must not depend on values of tensors, and its operations must say
    what they write to, and whether they are random (`torch.Tag.nondeterministic_seeded`); tensors must not overlap in
    memory unless one is a view of the other. What repeats within a step is computed once.
    """
    with _Recorder() as recorder:
        result = step()
    leaves, tree = tree_flatten(result)
    changing = {_memory(x) for call in recorder.calls for x in _written_by(*call[:3])}
    changing |= {_memory(x) for x in leaves if isinstance(x, Tensor)}  # whoever gets it may write to it
    unchanging: set[int] = set()  # ids of tensors that are the same in every replay
    computed: dict[str, str] = {}  # the text of a pure call: the variable that holds its result
    made: dict[int, str] = {}  # id of a tensor that a replay makes: the expression for it
    names: dict[str, Any] = {"unflatten": tree_unflatten}  # of all else; so no tensor is kept that a replay makes
    named: dict[int, str] = {}

    def name(prefix: str, value: Any) -> str:
        if id(value) not in named:
            named[id(value)] = key = f"{prefix}{len(names)}"
            names[key] = value
        return named[id(value)]

    def express_one(value: Any) -> str:
        if id(value) in made:
            return made[id(value)]
        return repr(value) if value is None or type(value) in (bool, int) else name("value", value)

    def express(value: Any) -> str:
        if type(value) in (list, tuple):  # of tensors or numbers; none is nested
            return f"[{', '.join(map(express_one, value))}]"
        return express_one(value)

    # Written out as Python, since a loop over operations and arguments would take as long as the smaller operations.
    lines = ["def replay():"]
    for n, (function, args, options, returned) in enumerate(recorder.calls):
        inputs = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
        ids = set(map(id, inputs))
        pure = _is_pure(function, inputs, returned, changing)
        if pure and unchanging.issuperset(ids) and (ids or function.overloadpacket in _CONSTANT):
            unchanging.add(id(returned))
            continue
        if made.keys().isdisjoint(ids) and _is_view(function, inputs, returned):
            continue
        given = [*map(express, args), *(f"{key}={express(value)}" for key, value in options.items())]
        call = f"{name('operation', function)}({', '.join(given)})"
        if pure and call in computed:
            made[id(returned)] = computed[call]
            continue
        lines.append(f"    result{n} = {call}")
        if pure:
            computed[call] = f"result{n}"
        several = isinstance(returned, list | tuple)
        for i, x in enumerate(returned) if several else ((None, returned),):
            if isinstance(x, Tensor) and id(x) not in ids:
                made[id(x)] = f"result{n}[{i}]" if several else f"result{n}"
    lines.append(f"    return unflatten([{', '.join(map(express, leaves))}], {name('tree', tree)})")
    exec("\n".join(lines), names)
    return result, names.pop("replay")  # else it would refer to itself, and its tensors wait for the garbage collector


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else id(x)


def _written_by(function: OpOverload, args: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes to."""
    given = dict(zip((x.name for x in function._schema.arguments), args, strict=False)) | options
    written = [given.get(x.name) for x in function._schema.arguments if x.alias_info and x.alias_info.is_write]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor)]


def _is_pure(function: OpOverload, inputs: list[Tensor], returned: Any, changing: set[int]) -> bool:
    """Return whether an operation with a single result gives the same whenever it is called in a step. changing: the
    memory that the step, or whoever gets its result, may write to."""
    if not isinstance(returned, Tensor) or torch.Tag.nondeterministic_seeded in function.tags:
        return False
    return changing.isdisjoint(map(_memory, (*inputs, returned)))


def _is_view(function: OpOverload, inputs: list[Tensor], returned: Any) -> bool:
    """Return whether an operation on tensors that persist only views their memory.

    Views of a parameter do not count: `parameter.data = ...` replaces its memory. An operation that may return a view
    may return a copy, too: `to` does, which is an operation of its own in `torch.inference_mode()`.
    """
    aliases = [x.alias_info for x in function._schema.returns]
    if not aliases or any(alias is None or alias.is_write for alias in aliases):
        return False
    memory = {_memory(x) for x in inputs if not isinstance(x, nn.Parameter)}
    views = [x for x in tree_leaves(returned) if isinstance(x, Tensor)]
    return len(inputs) > 0 and all(_memory(x) in memory for x in views)
