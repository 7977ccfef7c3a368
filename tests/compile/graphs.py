"""A backend that keeps the graphs it is given, forward and backward, and runs them as they are."""

from __future__ import annotations

from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd


def keeping(graphs: list[torch.fx.Graph]) -> Any:
    """The backend; what to save between the two graphs is chosen as by Inductor."""

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)


def exchanges(graph: torch.fx.Graph) -> list[str]:
    """The ops of ``graph`` that start an exchange, and those that read from the device."""
    ops = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    names = {"_c10d_functional": ("",), "moecomm": ("_exchange", "_sizes")}  # by how they end
    return [op._opname for op in ops if op._opname.endswith(names.get(op.namespace, ())) and op._opname != "wait_tensor"]
