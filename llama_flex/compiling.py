"""Compiled steps: one graph for one set of shapes, or an error."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule, Node


def compiled(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a method for one set of shapes.

    torch keeps compiled code per code object, shared by all callers of a function and limited in number, beyond
    which it runs uncompiled. A code object of its own keeps each graph apart; fullgraph makes a second one an error.
    """
    assert isinstance(method, types.MethodType)
    function = method.__func__
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(types.MethodType(own, method.__self__), backend=inductor, fullgraph=True, dynamic=False)


def inductor(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Inductor, after a change to score functions.

    FlexAttention replaces the `[]` of a score function by one that has a backward, and torch cannot trace that within a
    nested compile region (2.13: "Functionalize rule for custom_function_call"). Steps have no backward, so `[]` becomes
    the plain operator before FlexAttention sees it.
    """
    modules = [module for module in graph.modules() if isinstance(module, GraphModule)]
    calls = [
        node
        for module in modules
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)
    ]
    names = {str(call.args[3]) for call in calls}  # of their score functions
    for name, module in (pair for m in modules for pair in m.named_children()):
        if name in names and isinstance(module, GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=operator.getitem):
                _index_plainly(node)
            module.recompile()
    return cast(Callable[..., Any], compile_fx(graph, list(inputs)))


def _index_plainly(node: Node) -> None:
    table, at = node.args
    if not isinstance(table, Node) or not isinstance(table.meta.get("example_value"), Tensor):
        return  # not a tensor but what unbind() or max() returned
    indices = list(at) if isinstance(at, tuple) else [at]
    if all(isinstance(i, Node | int) for i in indices):
        scalar, kind = torch.ops.aten.scalar_tensor, cast(dict[str, Any], {"dtype": torch.int64})
        with node.graph.inserting_before(node):
            indices = [i if isinstance(i, Node) else node.graph.call_function(scalar, (i,), kind) for i in indices]
        node.target, node.args = torch.ops.aten.index, (table, indices)
