"""plan: the routing plan, made from the experts that each token chose."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from moecomm.errors import check_reverse_mode
from moecomm.inspect.log import log_plan
from moecomm.inspect.profile import profiled
from moecomm.layer.placement import Placement
from moecomm.layer.plan import Plan
from moecomm.layer.plan_call import Routing, make_routing
from moecomm.ops.exchange.slots import exchange_slots
from moecomm.ops.routing.count_pairs import count, rank_keys
from moecomm.ops.routing.counting_sort import bounded_sort, counting_sort
from moecomm.ops.routing.drop_overflow import fit
from moecomm.ops.routing.read_sizes import checked, plan_sizes
from moecomm.ops.routing.slots_with_counts import few_slots
from moecomm.parallel.agree import exchange_messages, tell_refusal, ticket
from moecomm.parallel.dtensor import make_layout, to_local
from moecomm.parallel.group import GroupLike, resolve_group

COUNTS = "the counts of plan"  # what an error of their exchange says


@profiled
def plan(
    experts: Tensor,
    weights: Tensor,
    num_experts: int,
    group: GroupLike = None,
    *,
    placement: Placement | None = None,
    like: Any = None,
    max_rows: int | None = None,
    check: bool = False,
    align: int = 1,
) -> Plan:
    """Who gets which token: the plan that `dispatch` and `combine` follow.

    Rank p of the group's P holds the experts p * L to (p + 1) * L - 1, where L = num_experts / P, or those that ``placement`` gives it. A
    token travels once to a rank, however many of its experts are there.

    Args:
        experts: [T, K], of an integer dtype: the expert of each slot, or -1 for a slot that is dropped. An expert may stand in several
            slots of a token. T may differ from rank to rank and may be 0.
        weights: [T, K], of a floating dtype: the weight of each slot in the sum that `combine` makes.
        num_experts: E, the experts on all ranks together, and at least K; without ``placement`` a multiple of P.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.
        placement: which experts are where, [P, L], as lists, tuples, or an integer tensor on the CPU, whose values a compiled graph does
            not depend on: row p has the ids of the experts of rank p, in their local order, the same on all ranks. Every expert is on
            some rank. One that is on several, a replica on each, serves about as many of any rank's tokens on each of them: token t of
            rank p takes replica ``floor(frac(0.618... * (t * P + p)) * replicas)`` in the order of the ranks, which needs no counting and
            is even, to a few tokens, for any run of tokens and for every n-th one. The replicas' weights are made and kept alike
            by `sync_replicas_` and `sync_replica_grads_`.
        like: what will be dispatched, [T, ...], or a pytree of such tensors: only their shapes, dtypes and requires_grad are looked at,
            so that ranks that disagree on them get an error here and not a broken exchange later. Of a DTensor, its placements are those
            of `combine`'s result; of several, those of the first.
        max_rows: C, the same on all ranks, switches static mode on: each rank sends C tokens to each, padding among them.
        check: look for more than costs nothing, to find a fault. For weights that are NaN or infinite; in static mode for all that is
            looked for otherwise, by the exchange of counts and the host sync that it does without. And `dispatch` and `combine` of this
            plan then compare, in eager code, what the ranks call and pass, by a small exchange and a host sync before their own: ranks
            that call another one of them or another plan's, one more of them, or differ in shapes, dtypes, wires or requires_grad all get
            the same error, and so they do where one rank refuses its arguments.
        align: each expert's rows begin at a multiple of it, as grouped matmuls of low precision need it: 16 for float8, 32 for mxfp8. N
            is L * (align - 1) more, and at most 2^31 - 256; nothing more is sent. Between the experts' rows and behind them lies padding:
            `dispatch` gives zeros there, `combine` reads nothing, and its gradient is zero.

    DTensors go in as their local shards, each of Shard(0) over its tokens or Replicate on each mesh dim; ``like`` may also be Shard over
    other dims. `moecomm.parallel.dtensor` has the table. Those that are plain tensors are local shards already.

    Returns a `Plan`. Its ``offsets`` [L] (int32) are the ends of the local experts' rows, as `torch.nn.functional.grouped_mm` takes them.

    Costs one small exchange, of 8 KiB to each rank, the one host sync of a layer, and one exchange of K weights and K narrow ids a (token,
    rank) pair; where these are few, and fit in the 8 KiB on every rank, they travel there, and there is one exchange alone. With
    ``placement`` also one pass over experts, and a copy of E + 1 + P * L int32 to the device, for which the host does not wait.

    Static mode. With ``max_rows`` all sizes follow from shapes: S = R = P * C and N = P * C * min(K, L). There is no host sync and no
    exchange of counts, and no size in a compiled graph depends on the routing: what a CUDA graph asks of a layer.

    - Rows from ``offsets[-1]`` on are padding. `dispatch` gives zeros there, `torch.nn.functional.grouped_mm` and `combine` read none of
      them, nor does a backward pass, and their gradient from `combine` is zero. What you compute row by row may hold anything there; what
      you add up over rows must leave them out.
    - Of the tokens for a rank the first C go there. C = T, the largest of all ranks, is room for all of them. Of the others the slots for
      that rank are dropped; and of a token that has more than L slots for a rank, as only repeated ids make it, those after the first L.
    - Ids outside [-1, E) are dropped as well: to raise an error would take a host sync. The plan's ``dropped``, [] int32 on the device,
      counts the slots of this rank's tokens that were dropped for any of these reasons; those of id -1 are not among them.
    - What the ranks must agree on, max_rows included, is not compared without ``check``, which would take a host sync too: where they
      differ, an exchange hangs, fails or brings garbage.

    Backward: from the plan's weights to ``weights``, in one exchange.

    Raises TypeError or ValueError for an argument that is wrong on this rank, and NotImplementedError where `dispatch` does, before a token
    is sent; `MoECommError`, alike on every rank, where the ranks differ in K, E, a dtype, ``like``, ``placement``, ``max_rows`` or
    ``check``, in whether weights or like require a gradient, or in the function that they call, as far as it begins with such a message too
    (`sync_params_`, `sync_replicas_`); where they have more than 2^31 - 256 slots together, which int32 indices cannot number; and with
    ``check`` where a weight is NaN or infinite. `ExpertIdError` (a ValueError as well), alike on every rank, where an id is outside [-1, E)
    on any of them. In static mode none of these is raised without ``check``, and it is T * K and P * C * K that are bounded. In eager code
    a rank that refuses its arguments sends the others that, in place of the message that they wait for, and they raise a `MoECommError`
    that names it; not where it can find no group or no tensor that is on one of the group's devices.

    The logger "moecomm" gets a line with the sizes at level DEBUG; code that torch.compile traced logs nothing.

    >>> experts = torch.tensor([[2, 0], [2, -1], [1, 2]])
    >>> a_plan = plan(experts, torch.ones(3, 2), num_experts=3)
    >>> a_plan.offsets  # expert 0 has row 0, expert 1 row 1, expert 2 rows 2 to 4
    tensor([1, 2, 5], dtype=torch.int32)
    >>> dispatch(torch.tensor([10.0, 11.0, 12.0]), a_plan)
    tensor([10., 12., 10., 11., 12.])
    >>> plan(experts, torch.ones(3, 2), num_experts=3, placement=[[2, 0, 1]]).offsets  # expert 2 has rows 0 to 2, expert 0 row 3
    tensor([3, 4, 5], dtype=torch.int32)

    Static mode with room for two tokens: the third has none, and with it two slots.

    >>> a_plan = plan(experts, torch.ones(3, 2), num_experts=3, max_rows=2)
    >>> a_plan.offsets, a_plan.dropped
    (tensor([1, 1, 3], dtype=torch.int32), tensor(2, dtype=torch.int32))
    >>> rows = dispatch(torch.tensor([10.0, 11.0, 12.0]), a_plan)
    >>> rows  # the last of the 2 * min(2, 3) rows is padding
    tensor([10., 10., 11.,  0.])
    >>> combine(rows, a_plan)
    tensor([20., 11.,  0.])
    """
    ranks = resolve_group(group)
    leaves = [] if like is None else tree_leaves(like)
    try:
        check_reverse_mode("plan", (weights,))
        layout = make_layout(experts, weights, leaves, ranks)
        if layout is not None:
            experts, weights, leaves = to_local(experts), to_local(weights), [to_local(leaf) for leaf in leaves]
        routing = make_routing(experts, weights, num_experts, placement, leaves, max_rows, check, align, ranks)
    except (NotImplementedError, TypeError, ValueError):
        if max_rows is None or check:  # the others wait for a message of this rank
            tell_refusal("plan" if max_rows is None else "plan with max_rows", (experts, weights, leaves), ranks)
        raise
    made = _dynamic_plan(routing) if max_rows is None else _static_plan(routing, max_rows)
    if check:
        made = made._replace(ticket=ticket(experts.device, ranks))
    log_plan(made, leaves)
    return made if layout is None else made._replace(layout=layout)


def _dynamic_plan(routing: Routing) -> Plan:
    """A plan of the sizes that the routing has: they are read from the device, once."""
    experts, weights, num_experts, places, placed, local, signed, check, _, group = routing
    keys, sent = count(experts, num_experts, group.size, signed, placed, weights if check else None)  # [T, K], [P, 6 + signature]
    if group.size == 1:
        _, _, n, _, _ = plan_sizes(sent, sent)
        return _sorted(routing, places, weights, None, None, None, n, False)
    messages = exchange_messages(sent, group, COUNTS, few_slots(places, weights, keys, local, group.size))
    s, r, n, splits, few = plan_sizes(sent, messages)
    order, position, _ = counting_sort(keys, group.size, s)  # [S], [T, K]
    there, ids = exchange_slots(weights, places, keys, order, position, local, messages, few, splits, r, group.name)  # [R, K] each
    return _sorted(routing, ids, there, order, position, splits, n, False)


def _static_plan(routing: Routing, max_rows: int) -> Plan:
    """A plan of constant sizes: nothing is read from the device, what has no place is dropped, and places that are left are padding."""
    experts, weights, num_experts, places, placed, local, signed, check, _, group = routing
    if check:
        keys, sent = count(experts, num_experts, group.size, signed, placed, weights)
        keys = checked(exchange_messages(sent, group, COUNTS), keys)
    else:
        keys = rank_keys(experts, num_experts, group.size, placed)  # [T, K]
    pairs = group.size * max_rows  # S = R
    order, position = bounded_sort(keys, group.size, max_rows)  # [S], [T, K]
    fits, dropped = fit(experts, places, position, local)  # [T, K]
    n = pairs * min(experts.shape[1], local)
    if group.size == 1:
        return _sorted(routing, fits, weights, None, None, None, n, True)._replace(dropped=dropped)
    there, ids = exchange_slots(weights, fits, keys, order, position, local, None, None, None, pairs, group.name)  # [R, K] each
    return _sorted(routing, ids, there, order, position, None, n, True)._replace(dropped=dropped)


def _sorted(
    routing: Routing,
    ids: Tensor,
    weights: Tensor,
    send_order: Tensor | None,
    send_position: Tensor | None,
    splits: Tensor | None,
    n: int,
    padded: bool,
) -> Plan:
    """The plan, of the local ids [R, K] that this rank received: n rows by local expert, or fewer and padding."""
    local, align = routing.local, routing.align
    if align > 1:  # each expert's end is rounded up to a multiple
        n, padded = n + local * (align - 1), True
    order, position, offsets = counting_sort(ids, local, n, padded, align)
    indices = offsets, weights, order, position, send_order, send_position, splits
    return Plan(*indices, routing.experts.shape[0], routing.num_experts, routing.group.name)
