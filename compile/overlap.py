"""overlap_exchanges: a pass over a compiled graph that runs independent work while exchanges are under way.

    torch.compile(model, options=options(overlap_exchanges))       # options is moecomm.compile.passes.options

It gives the nodes of the graph a new order, forward and backward. It changes no node, except for
the sums in step 5:

1. The starts of exchanges and of torch's collectives get one order. It follows from how they depend
   on each other; ties are broken by the matmuls before each, then by its place in the graph. So
   ranks that trace one program have the same order. All-to-alls that do not depend on each other go
   side by side, also those of two micro-batches. Other collectives keep their place among all.
2. What the next start needs comes first, and nothing else. Every start is as early as its input and
   this order allow.
3. If this needs the result of an exchange that is still under way, other work comes before the
   wait, if there is any: a shared expert, a gate's losses, the gradients of weights. The exchanges
   under way and to come share this work in proportion to their bytes, so that as much of all of
   them is hidden as possible. A layer's shared expert, for example, runs half during dispatch and
   half during combine.
4. Waits come last.
5. `part_sums` takes a sum out of a matmul, where Inductor has joined the two and the matmul would
   wait for an exchange.

The cost is memory. A result that is computed early lives longer, and so does the input of work that
is postponed. Both are bounded:

- Work that could run is postponed by at most two large exchanges.
- No work runs before the exchange that it hides has started.
- Each exchange under way holds its send buffer and what it receives, as without this pass.

Inductor reorders its kernels to save memory, and knows no exchanges but its own. So `hold` ties
each start, matmul and op to what must come before it, with Inductor's ``control_deps``. The
generated code then keeps the order, and the starts of independent exchanges have one order on all
ranks. Pointwise operations are not tied, and fuse as without this pass.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node

EXCHANGES = {  # moecomm's ops that start one
    "messages_exchange", "slots_exchange", "dispatch_exchange", "combine_exchange", "return_exchange", "rows_exchange", "wire_exchange",
}  # fmt: skip
MATMULS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm"}
WORLDS = ("_c10d_functional", "_c10d_functional_autograd")
LENGTH = 4096  # assumed for a dim of unknown size, the same on all ranks
PER_ELEMENT = 100  # multiply-adds of a matmul in the time of one element moved: 20 on a CPU to 600 on an H100; few nodes depend on it
PATIENCE = 2  # by how many large exchanges work is postponed at most


def overlap_exchanges(graph: Graph) -> None:
    """Reorder the graph in place so that exchanges run beside work that does not depend on them; Inductor keeps this order.

    A graph without an exchange or collective stays unchanged.
    """
    if any(map(is_start, graph.nodes)):
        part_sums(graph)
        reorder(graph)
        hold(graph)


def part_sums(graph: Graph) -> None:
    """Split each addmm whose added term waits for an exchange that its factors do not need, into a matmul and a sum.

    Inductor joins the two into such an addmm. After the split, the matmul need not wait for the
    exchange.
    """
    arrived: dict[Node, set[Node]] = {}  # per node, the waits that it depends on
    for node in list(graph.nodes):
        arrived[node] = set().union(*(arrived[needed] for needed in node.all_input_nodes), {node} if is_wait(node) else ())
        if node.target is not torch.ops.aten.addmm.default or any(scale != 1 for scale in node.kwargs.values()):
            continue
        term, left, right = node.args
        if not isinstance(term, Node) or arrived[term] <= arrived[left] | arrived[right]:
            continue
        with graph.inserting_before(node):
            product = graph.call_function(torch.ops.aten.mm.default, (left, right))
            total = graph.call_function(torch.ops.aten.add.Tensor, (term, product))
        product.meta, total.meta = node.meta.copy(), node.meta.copy()
        arrived[total] = arrived[node]
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def reorder(graph: Graph) -> None:
    """Reorder the graph in place, without ties. This is enough for compilers that run a graph in its order."""
    for node in _Schedule(graph).nodes():
        if node.op not in ("placeholder", "output"):
            graph.output_node().prepend(node)
    graph.lint()


def hold(graph: Graph) -> None:
    """Tie starts, waits and work to the nodes that stand before them, unless their inputs do this already."""
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
    from torch.utils._ordered_set import OrderedSet

    before: dict[Node, int] = {}  # per node, the nodes that must come before it, as bits
    bits = {node: 1 << i for i, node in enumerate(graph.nodes)}
    ties: dict[Node, Any] = {}
    start = work = None
    for node in list(graph.nodes):
        before[node] = bits[node]
        for needed in node.all_input_nodes:
            before[node] |= before[needed]
        waits, starts = is_wait(node), is_start(node)
        if waits or ((starts or _is_work(node)) and _can_be_tied(node)):
            for earlier in (start, work) if waits else (start,):
                result = None if earlier is None else _tensor_of(earlier)
                if result is not None and not before[node] & bits[result]:
                    ties.setdefault(node, OrderedSet()).add(result)
                    before[node] |= before[result]
        start = node if starts else start
        work = node if not starts and _is_work(node) else work
    preserve_node_ordering(graph, ties)
    graph.lint()


def is_start(node: Node) -> bool:
    """Whether the node starts an exchange or one of torch's collectives; a wait gives its result."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target.overloadpacket.__name__
    return (node.target.namespace == "moecomm" and name in EXCHANGES) or (
        node.target.namespace in WORLDS and not name.startswith("wait_tensor")
    )


def is_wait(node: Node) -> bool:
    return node.target is torch.ops._c10d_functional.wait_tensor.default


def _is_exchange(start: Node) -> bool:
    return start.target.namespace == "moecomm" or "all_to_all" in start.target.__name__  # type: ignore[union-attr]


def _is_work(node: Node) -> bool:
    """Whether the node is a kernel of its own, which does not fuse with a node before it."""
    if not isinstance(node.target, torch._ops.OpOverload) or is_start(node) or is_wait(node):
        return False
    return node.target.namespace not in ("aten", "prims") or node.target.overloadpacket.__name__ in MATMULS


def is_matmul(op: object) -> bool:
    """Whether ``op`` is one of torch's matmuls."""
    return isinstance(op, torch._ops.OpOverload) and op.namespace == "aten" and op.overloadpacket.__name__ in MATMULS


def _can_be_tied(node: Node) -> bool:
    """Whether all results of the node are tensors: Inductor cannot tie a node that returns sizes."""
    return all(isinstance(value, torch.Tensor) for value in _values(node.meta.get("val")))


def _tensor_of(node: Node) -> Node | None:
    """A tensor that shows that the node has run: its result, or one of its results."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return node
    return next((user for user in node.users if isinstance(user.meta.get("val"), torch.Tensor)), None)


def _values(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _size(dim: Any) -> int:
    """A dim of a shape. A symbolic dim, in which ranks may differ, counts as `LENGTH`."""
    return dim if isinstance(dim, int) else LENGTH


def _elements(value: Any) -> int:
    return sum(prod(map(_size, tensor.shape)) for tensor in _values(value) if isinstance(tensor, torch.Tensor))


def _bytes(start: Node) -> int:
    return sum(_elements(tensor) * tensor.dtype.itemsize for tensor in _values(start.meta["val"]) if isinstance(tensor, torch.Tensor))


def _cost(node: Node) -> int:
    """The node's approximate time, in elements moved; 0 for a view or a size."""
    if not isinstance(node.target, torch._ops.OpOverload) or is_wait(node) or any(r.alias_info for r in node.target._schema.returns):
        return 0
    made = _elements(node.meta.get("val"))
    if is_matmul(node.target):
        left = node.args[1 if "add" in node.target.__name__ else 0]
        return made * _size(left.meta["val"].shape[-1]) // PER_ELEMENT  # type: ignore[union-attr]
    return made + sum(_elements(needed.meta.get("val")) for needed in node.all_input_nodes)


class _Schedule:
    """The schedule of one graph: `nodes` returns its nodes in their new order."""

    def __init__(self, graph: Graph) -> None:
        self.all = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.all)}
        self.needs = needs_of(self.all)
        self.ancestors: dict[Node, int] = {}  # as bits, including the node itself
        for node in self.all:
            self.ancestors[node] = 1 << self.index[node]
            for needed in self.needs[node]:
                self.ancestors[node] |= self.ancestors[needed]
        self.starts = self._order_of_starts()
        self.turn = {start: i for i, start in enumerate(self.starts)}
        self.cost = {node: _cost(node) for node in self.all}
        self.bytes = [_bytes(start) for start in self.starts]
        self.waited = [False] * len(self.starts)
        self.deadline: dict[Node, int] = {}  # the turn of the start that a node must come before, once it is known
        self.order: dict[Node, None] = {}
        self.followers: dict[Node, list[Node]] = {node: [] for node in self.all}  # placed as early as possible: parts, and checks
        for node in self.all:
            if node.target is operator.getitem or (node.op == "call_function" and not node.users and self.cost[node] == 0):
                for needed in self.needs[node]:
                    self.followers[needed].append(node)

    def nodes(self) -> list[Node]:
        for node in self.all:
            if node.op in ("placeholder", "get_attr"):
                self._put(node)
        for start in self.starts:
            self._put_all(self._missing(start))
        self._put_all([node for node in self.all if node not in self.order])
        return list(self.order)

    def _order_of_starts(self) -> list[Node]:
        """All starts, ordered by depth, then by the turn of their latest parent, then by the number of matmuls that they need.

        The depth of a start is the number of exchanges that must come before it, one after the
        other.
        """
        starts = [node for node in self.all if is_start(node)]
        matmuls = sum(1 << i for i, node in enumerate(self.all) if _is_work(node) and node.target.overloadpacket.__name__ in MATMULS)
        depth: dict[Node, int] = {}
        parents: dict[Node, list[Node]] = {}
        for start in starts:
            parents[start] = [other for other in depth if self.ancestors[start] >> self.index[other] & 1]
            depth[start] = max((depth[other] for other in parents[start]), default=0) + 1
            if not _is_exchange(start):
                depth[start] = max(depth.values())
        order: dict[Node, int] = {}
        for level in sorted(set(depth.values())):

            def key(start: Node) -> tuple[int, int, int]:
                latest = max((order.get(other, -1) for other in parents[start]), default=-1)  # noqa: B023 - used at once
                return latest, (self.ancestors[start] & matmuls).bit_count(), self.index[start]

            # A collective that is not an exchange keeps its place behind earlier starts.
            exchanges = sorted((start for start in starts if depth[start] == level and _is_exchange(start)), key=key)
            others = [start for start in starts if depth[start] == level and not _is_exchange(start)]
            for start in exchanges + others:
                order[start] = len(order)
        return list(order)

    def _missing(self, node: Node) -> list[Node]:
        """The node and all nodes that it needs, without those that are in order already."""
        missing, todo = {node}, [node]
        while todo:
            new = {needed for needed in self.needs[todo.pop()] if needed not in self.order} - missing
            missing |= new
            todo += new
        return sorted(missing, key=self.index.__getitem__)

    def _put(self, node: Node) -> None:
        self.order[node] = None
        for follower in self.followers[node]:
            if follower not in self.order and all(needed in self.order for needed in self.needs[follower]):
                self._put(follower)

    def _put_all(self, missing: list[Node]) -> None:
        """Put these nodes in order: first those that wait for no exchange, then the earliest wait and the nodes that it makes possible.

        The second step repeats until all nodes are in order.
        """
        while True:
            for node in missing:
                if node not in self.order and self._started(node) is None and all(needed in self.order for needed in self.needs[node]):
                    self._put(node)
            waits = [node for node in missing if node not in self.order and self._started(node) in self.order]
            if not waits:
                return
            first = min(waits, key=lambda wait: self.turn[self._started(wait)])  # type: ignore[index]
            self._fill(self.turn[self._started(first)])  # type: ignore[index]
            self._put(first)

    def _started(self, node: Node) -> Node | None:
        """The start whose result this node waits for; None if the node is not a wait."""
        if not is_wait(node):
            return None
        start = node.args[0]
        while isinstance(start, Node) and start.target is operator.getitem:
            start = start.args[0]
        return start if start in self.turn else None  # type: ignore[return-value]

    def _fill(self, turn: int) -> None:
        """Put in order the work that hides the exchange whose wait comes next: its share of the work that could run now."""
        if self.waited[turn]:
            return
        possible: dict[Node, None] = {}
        for node in self.all:
            if node in self.order or node.op == "output" or is_wait(node) or is_start(node):
                continue
            if all(needed in self.order or needed in possible for needed in self.needs[node]):
                possible[node] = None
        groups: dict[int, list[Node]] = {}
        for node in possible:
            if self.cost[node]:
                groups.setdefault(self._deadline(node, turn), []).append(node)
        for deadline, nodes in groups.items():
            to_come = sum(size for i, size in enumerate(self.bytes) if turn <= i < deadline and not self.waited[i])
            budget = sum(self.cost[node] for node in nodes) * self.bytes[turn] / max(1, to_come)
            for node in nodes:
                if node in self.order:
                    continue
                pieces = self._missing(node)
                price = sum(self.cost[piece] for piece in pieces)
                if 2 * budget < price:
                    break
                budget -= price
                for piece in pieces:
                    if piece not in self.order:
                        self._put(piece)
        self.waited[turn] = True

    def _deadline(self, node: Node, turn: int) -> int:
        """The turn of the start before which the node must run: the first start that needs it, or the limit by `PATIENCE`."""
        if node not in self.deadline:
            large = [i for i, size in enumerate(self.bytes) if i >= turn and size >= max(self.bytes) / 8 and not self.waited[i]]
            patience = large[PATIENCE] if len(large) > PATIENCE else len(self.starts)
            users = (i for i, start in enumerate(self.starts) if i > turn and self.ancestors[start] >> self.index[node] & 1)
            self.deadline[node] = max(turn + 1, min(patience, next(users, len(self.starts))))
        return max(turn + 1, self.deadline[node])


def needs_of(nodes: list[Node]) -> dict[Node, list[Node]]:
    """The nodes that each node must come after: its inputs, earlier writes to memory it reads, and earlier reads of memory it writes.

    Ops that draw random numbers also keep their order.
    """
    needs: dict[Node, list[Node]] = {}
    memory: dict[Node, Node] = {}  # per node, the node that owns the memory of its result
    readers: dict[Node, list[Node]] = {}
    written: dict[Node, Node] = {}
    random: Node | None = None
    for node in nodes:
        memory[node] = node
        extra: dict[Node, None] = {}
        writes: set[Node] = set()
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            for argument, value in [
                *zip(schema.arguments, node.args, strict=False),
                *((a, node.kwargs.get(a.name)) for a in schema.arguments),
            ]:
                if argument.alias_info is not None and isinstance(value, Node):
                    memory[node] = memory[value]
                    if argument.alias_info.is_write:
                        writes.add(memory[value])
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                extra |= {} if random is None else {random: None}
                random = node
        elif node.target is operator.getitem or is_wait(node):
            memory[node] = memory[node.args[0]]  # type: ignore[index]
        for needed in node.all_input_nodes:
            owner = memory[needed]
            if owner in written:
                extra[written[owner]] = None
            if owner in writes:
                extra |= dict.fromkeys(readers.get(owner, []))
        for owner in {memory[needed]: None for needed in node.all_input_nodes}:
            if owner in writes:
                written[owner], readers[owner] = node, []
            else:
                readers.setdefault(owner, []).append(node)
        extra.pop(node, None)
        needs[node] = list(dict.fromkeys([*node.all_input_nodes, *extra]))
    return needs
