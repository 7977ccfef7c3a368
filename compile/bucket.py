"""merge_exchanges: a pass over a compiled graph that sends in one message what several exchanges of one plan send.

    torch.compile(model, options=options(merge_exchanges, overlap_exchanges))       # options is moecomm.compile.passes.options

Exchanges that have the same splits, direction and group, and of which none needs another's result, become one: the experts and weights of
`plan` go with the rows of `dispatch`, the gradients of the weights with those of the rows, and so do the tensors of a pytree. A layer's
forward then sends 3 messages instead of 4, its backward 2 instead of 3, and every result is the same to the bit. (Few slots come with the
counts, and there are 3 anyway: then they travel twice.)

What it costs: a message leaves when the last of what it carries is ready, so that nothing can be done with the experts' ids while rows are
under way, and the gradients of the weights wait for those of the rows; and each end reads and writes the message once more, which is
`ops/exchange/merged.py`. It is worth that where a message's latency counts: few tokens, small rows, many ranks. Where rows are large, and
something else can run during their exchange, leave it out.
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
    """Replace exchanges that can share a message by one."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    while starts := _mergeable(graph):
        _merge(graph, starts)
        stable_topological_sort(graph)
    graph.lint()


def _mergeable(graph: Graph) -> list[Node]:
    """Two exchanges or more that may share a message; none where there are no such."""
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
                if not any(before[node] & bits[other] for other in together):  # an earlier one cannot need a later one
                    together.append(node)
            if len(together) > 1:
                return together
    return []


def _direction(start: Node) -> int | None:
    """0 to the experts, 1 home; None of what is none of the exchanges of a plan's rows."""
    return start.args[4] if start.target is wire_exchange else DIRECTIONS.get(start.target)  # type: ignore[return-value]


def _merge(graph: Graph, starts: list[Node]) -> None:
    """Send what these start in one message, and take it apart after one wait."""
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
    """What the exchange sends."""
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
