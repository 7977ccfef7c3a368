"""keep_less: what a compiled graph keeps for its backward pass is what is expensive to make: matmuls and what came from other ranks.

    torch.compile(model, options=options(partition=keep_less))       # options is moecomm.compile.passes.options

Torch's partitioner divides the traced graph into forward and backward, and decides what the backward
makes again. It keeps whatever a matmul of the backward reads, because making it again costs a kernel
of its own. It keeps the results of ops that it does not know. So of a layer's experts it keeps the
rows [N, D] and the activation [N, H], both of which are cheap to make. `keep_less` runs the same
partitioner with two changes:

1. A cheap result may be made again even if a matmul reads it.
2. The gather of rows is made again, wherever the backward needs it.

A layer whose experts multiply `row_weights` in then keeps the tokens that came from other ranks,
[R, D], and the result of the experts' first matmul. No exchange, no host synchronization and no
matmul is made again. The rest of the model keeps less as well, such as the activation of a dense layer.

It costs the time of those kernels: for SwiGLU experts a read and a write of [N, D], and of [N, 2 H].
"""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from moecomm.compile.overlap import is_matmul
from moecomm.ops.rows.dequantize import dequantize
from moecomm.ops.rows.gather import gather

CHEAP = {gather, dequantize}  # what makes [N, D] of [R, D]


def keep_less(joint: GraphModule, inputs: Any, **keywords: Any) -> tuple[GraphModule, GraphModule]:
    """A partition function: for `options`, or for ``torch._dynamo.backends.common.aot_autograd(partition_fn=keep_less)``.

    Args:
        joint: the graph of forward and backward, whose nodes it marks.
        inputs, keywords: as torch passes them.

    Returns:
        The forward and the backward graph.

    Raises nothing.

    >>> from moecomm.compile.keep_less import keep_less
    >>> from moecomm.compile.passes import options
    >>> f = torch.compile(torch.sin, options=options(partition=keep_less))
    """
    backward = _backward(joint)
    for node in joint.graph.nodes:
        if node.target in CHEAP and node not in backward and _is_read(node, backward):
            node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)  # a checkpoint's policy comes first
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        return min_cut_rematerialization_partition(joint, inputs, **keywords)


def _backward(joint: GraphModule) -> set[Node]:
    """The nodes that depend on a gradient of the graph's results."""
    nodes: set[Node] = set()
    for node in joint.graph.nodes:
        if (node.op == "placeholder" and "tangents" in str(node.target)) or not nodes.isdisjoint(node.all_input_nodes):
            nodes.add(node)
    return nodes


def _is_read(node: Node, backward: set[Node]) -> bool:
    """Whether the backward reads the result of ``node``, or what follows from it without a matmul and without another op of moecomm."""
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user in backward:
                return True
            if user not in seen and getattr(user.target, "namespace", "aten") == "aten" and not is_matmul(user.target):
                seen.add(user)
                todo.append(user)
    return False
