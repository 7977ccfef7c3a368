"""merge_exchanges: a pass over a compiled graph that merges several exchanges of one plan into one message.

    torch.compile(model, options=options(merge_exchanges, overlap_exchanges))       # options is moecomm.compile.passes.options

Exchanges merge if they have the same splits, direction and group, and none needs the result of
another:

- the experts and weights of `plan`, with the rows of `dispatch`
- the gradients of the weights, with the gradients of the rows
- the tensors of a pytree

A layer's forward then sends 3 messages instead of 4, and its backward 2 instead of 3. Every result
is the same to the bit. If slots are few, they come with the counts and the forward sends 3 messages
anyway; with this pass they then travel twice.

Costs:

- A message leaves when the last of its parts is ready. So work on the expert ids cannot run while
  the rows travel, and the gradients of the weights wait for the gradients of the rows.
- Each end reads and writes the message once more (`ops/exchange/merged.py`).

Use it where the latency of a message matters: few tokens, small rows, many ranks. Leave it out
where rows are large and other work can run during their exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from moecomm.compile.overlap import is_wait, needs_of
from moecomm.ops.exchange.all_to_all import combine_exchange, dispatch_exchange, return_exchange
from moecomm.ops.exchange.all_to_all_wire import wire_exchange
from moecomm.ops.exchange.merged import gather_pairs, rows_exchange, slots_message, take_rows, words
from moecomm.ops.exchange.slots import slots_exchange
from moecomm.ops.rows.quantize import quantize
from moecomm.ops.rows.weighted_sum import weighted_sum

DIRECTIONS = {slots_exchange: 0, dispatch_exchange: 0, combine_exchange: 1, return_exchange: 1}


def merge_exchanges(graph: Graph) -> None:
    """Merge the exchanges of the graph that can share a message, in place."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    while starts := _mergeable(graph):
        _merge(graph, starts)
        stable_topological_sort(graph)
    graph.lint()


def _mergeable(graph: Graph) -> list[Node]:
    """Two or more exchanges that can share a message; an empty list if there are none."""
    nodes = list(graph.nodes)
    bits = {node: 1 << i for i, node in enumerate(nodes)}
    before: dict[Node, int] = {}
    alike: dict[Any, list[Node]] = {}
    for node, needed in needs_of(nodes).items():
        before[node] = bits[node]
        for other in needed:
            before[node] |= before[other]
        if _direction(node) is None or len(node.users) != 1 or not is_wait(next(iter(node.users))):
            continue
        if not isinstance(node.meta["val"].shape[1], int) or node.meta["val"].shape[1] == 0:
            continue
        alike.setdefault((_direction(node), *node.args[-3:]), []).append(node)
    for starts in alike.values():
        for first in starts:
            together = [first]
            for node in starts[starts.index(first) + 1 :]:
                if not any(before[node] & bits[other] for other in together):  # an earlier node cannot need a later one
                    together.append(node)
            if len(together) > 1:
                return together
    return []


def _direction(start: Node) -> int | None:
    """0 for an exchange of rows or slots to the experts, 1 for one back home; None for any other node."""
    return start.args[4] if start.target is wire_exchange else DIRECTIONS.get(start.target)  # type: ignore[return-value]


def _merge(graph: Graph, starts: list[Node]) -> None:
    """Replace these exchanges by one message and one wait, and split what arrives."""
    splits, size, group = starts[0].args[-3:]
    with graph.inserting_before(starts[-1]):
        rows = [_rows_of(graph, start) for start in starts]
        message = _call(graph, rows_exchange, rows, splits, size, _direction(starts[0]), group)
        arrived = _call(graph, torch.ops._c10d_functional.wait_tensor.default, message)
        offset = 0
        for start in starts:
            value = start.meta["val"]
            result = _call(graph, take_rows, arrived, offset, value.shape[1], value.dtype)
            offset += words(value.shape[1], value.dtype)
            (wait,) = start.users
            wait.replace_all_uses_with(result)
            graph.erase_node(wait)
            graph.erase_node(start)


def _rows_of(graph: Graph, start: Node) -> Node:
    """The rows that the exchange sends."""
    if start.target is slots_exchange:
        return _call(graph, slots_message, *start.args[:5], start.args[-3] is None)
    if start.target is dispatch_exchange:
        return _call(graph, gather_pairs, *start.args[:3])
    if start.target is combine_exchange:
        return _call(graph, weighted_sum, *start.args[:4])
    if start.target is wire_exchange:
        return _call(graph, quantize, *start.args[:4])
    return start.args[0]  # type: ignore[return-value]


def _call(graph: Graph, op: Any, *args: Any) -> Node:
    node = graph.call_function(op, args)
    with torch.no_grad():
        node.meta["val"] = op(*torch.fx.map_arg(args, lambda arg: arg.meta["val"]))
    return node
