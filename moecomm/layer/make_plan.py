"""plan: make the routing plan from the experts that each token chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from moecomm.errors import SUMMED, check_reverse_mode
from moecomm.inspect.log import log_plan
from moecomm.inspect.profile import profiled
from moecomm.layer.placement import Placement
from moecomm.layer.plan import Plan
from moecomm.layer.plan_call import Routing, make_routing
from moecomm.layer.token_calls import leaves_of
from moecomm.ops.base.library import call, trusting
from moecomm.ops.base.signature import SIGNED, traced
from moecomm.ops.exchange.slots import exchange_slots
from moecomm.ops.routing.count_pairs import count, rank_keys
from moecomm.ops.routing.counting_sort import bounded_sort, counting_sort, first
from moecomm.ops.routing.drop_overflow import fit
from moecomm.ops.routing.read_sizes import checked, plan_sizes
from moecomm.ops.routing.slots_with_counts import few_slots
from moecomm.ops.routing.sort_alone import sort_alone, sort_counted
from moecomm.parallel.agree import exchange_messages, tell_refusal, ticket
from moecomm.parallel.dtensor import make_layout, to_local
from moecomm.parallel.group import GroupLike, resolve_group

COUNTS = "the counts of plan"  # named in the error of their exchange


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
    """Plan which rank gets which token; `dispatch` and `combine` follow the plan.

    Rank p of the group's P ranks holds the experts p * L to (p + 1) * L - 1, where L = num_experts / P, or those that
    ``placement`` gives it. A token travels once to a rank, however many of its experts are there.

    Args:
        experts: [T, K], integer dtype: the expert of each slot; -1 drops the slot. An expert may be in several slots of a
            token. T may differ between ranks and may be 0.
        weights: [T, K], floating dtype: the weight of each slot in the sum that `combine` makes.
        num_experts: E, the experts on all ranks together. Without ``placement`` a multiple of P.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group. "" is this
            process alone: nothing is sent, also where the default group spans many ranks, as under DDP.
        placement: [P, L], the same on all ranks: row p lists the experts of rank p in their local order. Lists, tuples, or
            an integer tensor on the CPU. Every expert is on some rank. An expert on several ranks has a replica on each;
            `sync_replicas_` and `sync_replica_grads_` keep the replicas' weights equal.
        like: what will be dispatched, [T, ...], or a pytree of such tensors. Only shapes, dtypes, requires_grad and DTensor
            placements are used. Ranks that disagree on them get an error here, not a broken exchange later. `combine` gives
            its result in the dtype of ``like``, unless autocast is on.
        max_rows: C, the same on all ranks: switches static mode on. Each rank sends C tokens to each rank, padding included.
        check: find more faults, at the cost of extra exchanges and host synchronizations. It finds weights that are NaN
            or infinite. In static mode it adds all checks that other plans have. In eager code `dispatch` and `combine`
            of this plan compare what the ranks call and pass.
        align: the rows of each expert begin at a multiple of ``align``. Grouped matmuls of low precision need it: 16 for
            float8, 32 for mxfp8. N grows by L * (align - 1), to at most 2^31 - 256; nothing more is sent. `dispatch` fills
            the padding between and after the experts with zeros; `combine` ignores it and gives it a zero gradient.

    Returns:
        A `Plan`. Its ``offsets`` [L] (int32) are the ends of the local experts' rows, as
        `torch.nn.functional.grouped_mm` takes them.

    Raises:
        TypeError, ValueError: an argument is wrong on this rank. Raised before a token is sent.
        NotImplementedError: in the cases in which `dispatch` raises it. Raised before a token is sent.
        MoECommError: raised on every rank alike, where
            - the ranks differ in K, E, a dtype, ``like``, ``placement``, ``max_rows`` or ``check``;
            - they differ in whether weights or ``like`` require a gradient;
            - another rank calls `sync_params_` or `sync_replicas_` instead;
            - the ranks have more than 2^31 - 256 slots together, the limit of int32 indices;
            - with ``check``, a weight is NaN or infinite.
        MoECommError: another rank refuses its arguments, in eager code; the message names that rank.
        ExpertIdError: also a ValueError. Raised on every rank alike, where an id is outside [-1, E) on any rank.

    Warns:
        UserWarning: all ids of all ranks are 0 or 1, and K = E > 2. They may be a map [T, E], not ids.

    Example:
        >>> experts = torch.tensor([[2, 0], [2, -1], [1, 2]])
        >>> a_plan = plan(experts, torch.ones(3, 2), num_experts=3)
        >>> a_plan.offsets  # expert 0 has row 0, expert 1 row 1, expert 2 rows 2 to 4
        tensor([1, 2, 5], dtype=torch.int32)
        >>> dispatch(torch.tensor([10.0, 11.0, 12.0]), a_plan)
        tensor([10., 12., 10., 11., 12.])
        >>> plan(experts, torch.ones(3, 2), num_experts=3, placement=[[2, 0, 1]]).offsets  # expert 2 has rows 0 to 2, expert 0 row 3
        tensor([3, 4, 5], dtype=torch.int32)

        Static mode with room for two tokens: the third token has no room, so its two slots are dropped.

        >>> a_plan = plan(experts, torch.ones(3, 2), num_experts=3, max_rows=2)
        >>> a_plan.offsets, a_plan.dropped
        (tensor([1, 1, 3], dtype=torch.int32), tensor(2, dtype=torch.int32))
        >>> rows = dispatch(torch.tensor([10.0, 11.0, 12.0]), a_plan)
        >>> rows  # the last of the 2 * min(2, 3) rows is padding
        tensor([10., 10., 11.,  0.])
        >>> combine(rows, a_plan)
        tensor([20., 11.,  0.])

    Static mode (``max_rows=C``):

    - All sizes follow from shapes: S = R = P * C and N = P * C * min(K, L). Without ``check`` there is no
      host synchronization and no exchange of counts. No size in a compiled graph depends on the routing.
    - Rows at or after ``offsets[-1]`` are padding. `dispatch` fills them with zeros. `torch.nn.functional.grouped_mm`,
      `combine` and their backward passes ignore them. A sum of your own over rows must leave them out.
    - Each rank sends to each rank the first C of its tokens for that rank. C = T, the largest T of all ranks, has room
      for all tokens; it may be 0. Slots without room are dropped, and so are ids outside [-1, E).
    - ``dropped``, [] int32 on the device, counts the dropped slots of this rank's tokens. Slots of id -1 do not count.
    - Without ``check`` neither MoECommError nor ExpertIdError is raised. If the ranks disagree, an exchange hangs, fails
      or delivers wrong data.

    Anomaly mode: `grouped_mm` leaves rows at or after ``offsets[-1]`` uninitialized, and `torch.autograd.detect_anomaly` stops at
    a NaN in them. So in eager code under that mode the last expert also gets all padding: ``offsets[-1]`` is N. The padding
    is zeros, so no result and no gradient changes. Make the plan under the mode too, not only the backward.

    Backward: from the plan's weights to ``weights``, in one exchange.

    Cost without static mode: one small exchange of 8 KiB to each rank, one host synchronization, the only one of a layer, and
    at most one exchange of the slots.

    Background: docs/plan.md has the choice of a replica, DTensors, ``check``, static mode and the costs in detail.
    """
    ranks = resolve_group(group)
    leaves = [] if like is None else leaves_of(like)[0]
    try:
        check_reverse_mode("plan", (weights,))
        layout = make_layout(experts, weights, leaves, ranks)
        if layout is not None:
            experts, weights, leaves = to_local(experts), to_local(weights), [to_local(leaf) for leaf in leaves]
        routing = make_routing(experts, weights, num_experts, placement, leaves, max_rows, check, align, ranks)
    except (NotImplementedError, TypeError, ValueError):
        if max_rows is None or check:  # the other ranks wait for a message from this rank
            tell_refusal("plan" if max_rows is None else "plan with max_rows", (experts, weights, leaves), ranks)
        raise
    here = experts, weights
    made = trusting(here, _dynamic_plan, routing) if max_rows is None else trusting(here, _static_plan, routing, max_rows)
    if leaves and leaves[0].dtype in SUMMED:
        made = made._replace(dtype=SUMMED.index(leaves[0].dtype))
    if check:
        made = made._replace(ticket=ticket(experts.device, ranks))
    log_plan(made, leaves)
    return made if layout is None else made._replace(layout=layout)


def _dynamic_plan(routing: Routing) -> Plan:
    """A plan whose sizes follow the routing: the host reads them from the device once."""
    experts, weights, num_experts, places, placed, local, signed, check, align, group = routing
    if group.size == 1:
        signed = signed[: SIGNED.index("num_experts") + 1]  # of what ranks must agree on, what is said of the ids
        order, position, offsets, sent = call(sort_counted, experts, places, local, signed, align, weights if check else None)
        _, _, n, _, _ = call(plan_sizes, sent, sent)
        n += local * (align - 1)
        if align > 1:
            _cover_padding(offsets, n)
        indices = offsets, weights, _first(order, n), position, None, None, None
        return Plan(*indices, experts.shape[0], num_experts, group.name)
    keys, sent = call(count, experts, num_experts, group.size, signed, placed, weights if check else None)  # [T, K], [P, 6 + signature]
    most = experts.shape[0] * min(experts.shape[1], group.size)
    order, position, ends = call(counting_sort, keys, group.size, most, True)  # [most], [T, K], [P]
    messages = exchange_messages(sent, group, COUNTS, call(few_slots, places, weights, keys, order, ends, local))
    s, r, n, splits, few = call(plan_sizes, sent, messages)
    order = _first(order, s)  # [S]
    there, ids = call(exchange_slots, weights, places, keys, order, position, local, messages, few, splits, r, group.name)  # [R, K] each
    return _sorted(routing, ids, there, order, position, splits, n, False)


def _first(order: Tensor, size: int) -> Tensor:
    """The first entries of an order, all that are in use."""
    return order if guard_or_false(order.shape[0] == size) else call(first, order, size)


def _static_plan(routing: Routing, max_rows: int) -> Plan:
    """A plan of constant sizes: the host reads nothing from the device, except with ``check``.

    Slots without room are dropped. Unused places are padding.
    """
    experts, weights, num_experts, places, placed, local, signed, check, align, group = routing
    pairs = group.size * max_rows  # S = R
    n = pairs * min(experts.shape[1], local)
    if group.size == 1 and not check:
        n += local * (align - 1)
        order, position, offsets, dropped = call(sort_alone, experts, places, local, max_rows, n, align)
        _cover_padding(offsets, n)
        indices = offsets, weights, order, position, None, None, None
        return Plan(*indices, experts.shape[0], num_experts, group.name, dropped=dropped)
    if check:
        keys, sent = call(count, experts, num_experts, group.size, signed, placed, weights)
        keys = call(checked, exchange_messages(sent, group, COUNTS), keys)
    else:
        keys = call(rank_keys, experts, num_experts, group.size, placed)  # [T, K]
    order, position = call(bounded_sort, keys, group.size, max_rows)  # [S], [T, K]
    fits, dropped = call(fit, experts, places, position, local)  # [T, K]
    if group.size == 1:
        return _sorted(routing, fits, weights, None, None, None, n, True)._replace(dropped=dropped)
    there, ids = call(exchange_slots, weights, fits, keys, order, position, local, None, None, None, pairs, group.name)  # [R, K] each
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
    """The plan for the received local ids [R, K]: n rows sorted by local expert; if padded, some of them are padding."""
    local, align = routing.local, routing.align
    if align > 1:  # each expert's end is rounded up to a multiple of align
        n, padded = n + local * (align - 1), True
    order, position, offsets = call(counting_sort, ids, local, n, padded, align)
    if padded:
        _cover_padding(offsets, n)
    indices = offsets, weights, order, position, send_order, send_position, splits
    return Plan(*indices, routing.experts.shape[0], routing.num_experts, routing.group.name)


def _cover_padding(offsets: Tensor, n: int) -> None:
    """In torch's anomaly mode, count the padding to the last expert: grouped_mm leaves rows outside offsets uninitialized."""
    if not traced() and torch.is_anomaly_enabled():
        offsets[-1:].fill_(n)
