"""Graphs of compiled code: a backend that keeps them, forward and backward, and how they are read."""

from __future__ import annotations

import operator
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd


def keeping(
    graphs: list[torch.fx.Graph],
    change: Callable[[torch.fx.Graph], None] | None = None,
    partition: Any = min_cut_rematerialization_partition,
) -> Any:
    """A backend that runs the graphs as they are, or after the ``change``; what to save between the two is chosen as by Inductor."""

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        if change is not None:
            change(module.graph)
            module.recompile()
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)


def exchanges(graph: torch.fx.Graph) -> list[str]:
    """The ops of ``graph`` that start an exchange, and those that read from the device."""
    ops = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    names = {"_c10d_functional": ("",), "moecomm": ("_exchange", "_sizes")}  # by how they end
    return [op._opname for op in ops if op._opname.endswith(names.get(op.namespace, ())) and op._opname != "wait_tensor"]


def unbacked(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, of any number of tokens to a compiler."""
    for tensor in tensors:
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
    return tensors


def text_of(graph: torch.fx.Graph) -> str:
    """The graph as Python would write it, without the nodes that only reckon with sizes and assert them."""
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder" or (node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload)):
            continue
        if node.op == "output":
            lines += textwrap.wrap("return " + ", ".join(map(str, node.args[0])), 120, subsequent_indent="    ")
            continue
        name = node.target.name()
        if name.startswith(("aten::_assert", "aten::sym_")):
            continue
        parts = {user.args[1]: user.name for user in node.users if user.target is operator.getitem}
        results = [parts.get(i, "_") for i in range(len(node.target._schema.returns))] if parts else [node.name]
        arguments = [repr(argument) if isinstance(argument, str) else str(argument) for argument in node.args]
        if node.args and isinstance(node.args[-1], str):
            arguments[-1] = "GROUP"  # the last argument of an op that exchanges, whose name is the process's own affair
        lines.append(f"{', '.join(results)} = {name}({', '.join(arguments)})")
    return "\n".join(lines)
