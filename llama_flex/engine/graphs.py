"""Compiled steps: their parts are compiled once for all layers; whole steps are then recorded and replayed.

Compiling parts instead of whole steps keeps startup short. Recording which parts ran on which memory makes a step as
fast as one graph: on CUDA as a CUDA graph, on the CPU as a list of calls, without torch's guards before each.
"""

from __future__ import annotations

import operator
import threading
import time
import types
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar, cast

from ..kernels import code_cache  # before torch's compiler

# isort: split
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported, UserError
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError, OperatorIssue, SubgraphLoweringException
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..usercode.errors import CompileError, is_data_dependent, line_of_user
from ..usercode.modules import check_hooks, in_package

T = TypeVar("T")
# What runs for the first time may synchronise with the device, which a thread must not while another captures a graph.
_capturing = threading.RLock()
# Raised by Inductor for operations that it cannot generate code for, in a step or in a mask.
_BEYOND_IT = (OperatorIssue, SubgraphLoweringException, NotImplementedError)


class _Call(NamedTuple):
    """A call of compiled code in a recorded step."""

    function: Callable[..., Sequence[Tensor]]
    inputs: tuple[Tensor, ...]
    outputs: Sequence[Tensor]


class _Recording(threading.local):
    """A thread's recording of a step: its calls of compiled code, and the number of parts that it ran."""

    calls: list[_Call] | None = None
    parts = 0


class Graphs:
    """The compiled parts of steps, each compiled once per key, and the recording of whole steps for replay.

    count: the number of graphs that torch has compiled. seconds: the time spent on compiling and on first runs.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.parts: dict[Hashable, Callable[..., Any]] = {}
        self._recording = _Recording()

    def of(self, *key: Hashable) -> Callable[..., Any]:
        """Return a function that runs a part of a step, compiled for `key` and the `structure` of the modules it gets.
        key: shapes and all else the code depends on.

        It raises CompileError, before anything has run, if torch cannot compile at all, or not this part.
        """

        def run(name: Hashable, function: Callable[..., Any], *args: Any) -> Any:
            self._recording.parts += 1
            structures = tuple(structure(arg) for arg in args if isinstance(arg, nn.Module))
            part = self.parts.get(whole := (key, name, structures))
            if part is not None:
                return part(*args)
            started = time.perf_counter()
            try:
                part = self._compiled(function)
                result = part(*args)
            except (BackendCompilerFailed, InductorError, Unsupported, UserError, OSError) as error:
                raise CompileError(_why(error)) from error
            except NameError as error:
                if not is_data_dependent(str(error)):  # else torch's code names a value that it does not know
                    raise
                raise CompileError(_why(error)) from error
            finally:
                self.seconds += time.perf_counter() - started
            self.parts[whole] = part
            return result

        return run

    def record(self, step: Callable[[], T], device: torch.device) -> tuple[T, Callable[[], T]]:
        """Run an already compiled step while recording it; return its result and a replay function.

        All of its tensor operations must be compiled parts that ran before. A replay works on the same memory: a step
        must read its inputs from, and write its state to, tensors that persist. The tensors that it returns, outputs of
        its parts, are new each time.
        """
        recording, calls = self._recording, list[_Call]()
        recording.calls, recording.parts = calls, 0
        try:
            if device.type == "cuda":
                return _cuda_graph(step, device)
            result = step()
        finally:
            recording.calls = None
        if len(calls) != recording.parts:
            return result, step  # torch.compile is switched off, as by TORCHDYNAMO_DISABLE=1
        made: dict[int, tuple[int, int]] = {}  # id of a tensor: (call, output) that made it
        plan = []
        for n, call in enumerate(calls):
            plan.append((call.function, [made.get(id(x), x) for x in call.inputs]))
            made |= {id(x): (n, i) for i, x in enumerate(call.outputs)}

        leaves, tree = tree_flatten(result)
        returned = [made.get(id(x), x) for x in leaves]

        def replay() -> T:
            results: list[Sequence[Tensor]] = []

            def now(sources: Sequence[Any]) -> list[Any]:
                return [results[x[0]][x[1]] if isinstance(x, tuple) else x for x in sources]

            for function, inputs in plan:
                results.append(function(*now(inputs)))
            return cast(T, tree_unflatten(now(returned), tree))

        return result, replay

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a copy of a function. torch caches compiled code per code object, up to a limit, beyond which it runs
        uncompiled. A code object of its own keeps each part apart; fullgraph makes reaching the limit an error."""
        assert isinstance(function, types.FunctionType)
        own = types.FunctionType(
            function.__code__.replace(),
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        return torch.compile(own, backend=self._backend, fullgraph=True, dynamic=False)

    def _backend(self, graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        code, ran = inductor(graph, inputs), False
        self.count += 1

        def call(*inputs: Tensor) -> Sequence[Tensor]:
            nonlocal ran
            with nullcontext() if ran else _capturing:
                outputs = code(*inputs)
            ran = True
            if self._recording.calls is not None:
                self._recording.calls.append(_Call(code, inputs, outputs))
            return outputs

        return call


def structure(module: nn.Module) -> Hashable:
    """Return a key of what compiled code takes for granted of a module: its class, tensors but for their values, and
    numbers; and those of its children, except modules in a list, such as layers, which run as parts of their own.

    Raises ValueError for forward hooks: what they do in Python would be done when a part is compiled, and never again.
    """
    check_hooks(
        module,
        "compiled steps call no hooks",
        "compile=False (--compile off) calls them, and compiled steps take Capture and Edit",
    )
    kind = type(module)
    tensors = (*module._parameters.values(), *module._buffers.values())
    children = (child for child in module._modules.values() if child and not isinstance(child, nn.ModuleList))
    # The code of the package's own modules reads no numbers that differ between layers.
    values = () if in_package(kind.__module__) else vars(module).items()
    return (
        kind,
        *(None if x is None else (type(x), x.dtype, x.shape, x.stride()) for x in tensors),
        *((name, value) for name, value in values if isinstance(value, bool | int | float | str)),
        *map(structure, children),
    )


def compiles_for(device: torch.device) -> bool:
    """Return whether compiled steps are correct on a device: before torch 2.13, compiled reductions of booleans write
    out of bounds on a CPU."""
    return device.type != "cpu" or torch.__version__ >= "2.13"  # TorchVersion compares versions


def _why(error: Exception) -> str:
    """Explain in one line why a compiler failed, with the way out."""
    inner = getattr(error, "inner_exception", None) or error
    text = str(inner)
    lines = [line for line in map(str.strip, text.splitlines()) if line] or ["no message"]
    last = "or do not compile"
    first = next((line for line in lines if " error: " in line), lines[0])
    if "InvalidCxxCompiler" in text or type(inner).__name__ == "InvalidCxxCompiler":
        first, way = "there is no C++ compiler", "install g++, or set CXX to one"
    elif "not supported for CPU" in text:
        first, way = "it does not recognise this processor", "if ATEN_CPU_CAPABILITY is set, unset it"
    elif "Python.h" in text:
        first, way = "Python's headers are missing", "install them (python3-dev)"
    elif is_data_dependent(text):
        first += "" if isinstance(inner, NameError) else line_of_user(inner)  # a NameError is in torch's own code
        way = "a mask, score function or edit depends on the values of a tensor, as by `if`, `.item()`, `.tolist()` or "
        way += "`nonzero`: use torch.where, or a table made beforehand"
        last = (
            "or try without compiling"  # helps for shapes and edits; FlexAttention traces masks and scores there, too
        )
    elif isinstance(inner, Unsupported | UserError):
        first, way = (
            f"{first}{line_of_user(inner)}",
            "a mask, score function or edit uses an operation that it cannot trace",
        )
        last = "or try without compiling"
    elif isinstance(inner, OSError):
        first = f"{inner.strerror or first}, in {code_cache.folder()} or the folder for temporary files"
        way = "free some space and make it writable, or set TORCHINDUCTOR_CACHE_DIR to another folder"
    elif "Failed to import" in text or isinstance(inner, ImportError):
        way = f"a file in {code_cache.folder()} is damaged: delete that folder"
    elif isinstance(inner, _BEYOND_IT):
        first, way = (
            first.partition(". ")[0],
            "a mask, score function or edit uses an operation that it has no code for",
        )
    else:
        way = "a mask or score function may use an unsupported operation, "
        way += f"or a file in {code_cache.folder()} is damaged: delete that folder"
    return f"torch cannot compile: {first[:300]}; {way}; {last}: compile=False, --compile off"


def _cuda_graph(step: Callable[[], T], device: torch.device) -> tuple[T, Callable[[], T]]:
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, which submit requests, may allocate memory meanwhile.
    with _capturing, torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()

    def replay() -> T:
        with torch.cuda.device(device):
            graph.replay()
        return cast(T, tree_map_only(Tensor, torch.clone, result))

    return replay(), replay  # capturing runs nothing


def inductor(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph with Inductor, after rewriting the indexing in FlexAttention's masks and score functions.

    FlexAttention replaces the `[]` of a score function by one that has a backward, which reads out of bounds on CUDA
    (2.11: "illegal memory access"). Steps have no backward, so `[]` becomes the plain operator before FlexAttention
    sees it. Chained indexing, `table[i][0]`, becomes a single operation: torch 2.13's CPU kernel loses the dimensions
    of the intermediate result ("index out of bounds").
    """
    modules = [module for module in graph.modules() if isinstance(module, GraphModule)]
    calls = [
        node
        for module in modules
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)
    ]
    names = {str(function) for call in calls for function in (call.args[3], cast(Any, call.args[4])[-1])}
    for name, module in (pair for m in modules for pair in m.named_children()):
        if name in names and isinstance(module, GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=operator.getitem):
                _index_plainly(node)
            for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.index):
                _index_at_once(node)
            module.graph.eliminate_dead_code()
            module.recompile()
    return cast(Callable[..., Any], compile_fx(graph, list(inputs)))


def _index_plainly(node: Node) -> None:
    table, at = node.args
    if not isinstance(table, Node) or not isinstance(table.meta.get("example_value"), Tensor):
        return  # a tuple, such as unbind() or max() return
    indices = list(at) if isinstance(at, tuple) else [at]
    if all(isinstance(i, Node | int) for i in indices):
        scalar, kind = torch.ops.aten.scalar_tensor, cast(dict[str, Any], {"dtype": torch.int64})
        with node.graph.inserting_before(node):
            indices = [i if isinstance(i, Node) else node.graph.call_function(scalar, (i,), kind) for i in indices]
        node.target, node.args = torch.ops.aten.index, (table, indices)


def _index_at_once(node: Node) -> None:
    """Rewrite `table[i][j]` as `table[i, j]`, where i and j are single numbers. Nodes are visited in order, so the
    inner one is rewritten already."""
    between, indices = cast(tuple[Node, list[Node]], node.args)
    if between.target is torch.ops.aten.index:
        table, first = cast(tuple[Node, list[Node]], between.args)
        if all(_is_scalar(i) for i in (*first, *indices)):
            node.args = table, [*first, *indices]


def _is_scalar(node: object) -> bool:
    if not isinstance(node, Node):
        return False
    value = node.meta.get("example_value")
    return node.target is torch.ops.aten.scalar_tensor or (isinstance(value, Tensor) and not value.dim())
