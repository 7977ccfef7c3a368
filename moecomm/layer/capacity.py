"""limit_by_capacity: no expert gets more slots than it has room for."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from moecomm.errors import check_experts, check_slots, wrong_type, wrong_value
from moecomm.ops.exchange.collectives import all_gathered, start_all_gather
from moecomm.ops.exchange.slices import take_slice
from moecomm.ops.routing.counting_sort import MOST, counting_sort
from moecomm.parallel.dtensor import placed, routed_like, to_local
from moecomm.parallel.group import GroupLike, resolve_group


def limit_by_capacity(experts: Tensor, num_experts: int, capacity: int, group: GroupLike = None) -> Tensor:
    """``experts`` with -1 in each slot that is over its expert's capacity, so that no expert has more than ``capacity`` slots.

    Who comes first is served first: slots count in the order of the ranks of the group, on a rank in the order of the tokens, and in
    a token in that of its slots. As in GShard, arXiv 2006.16668, with the group's tokens as one group. `plan` then sends nothing for the
    slots that were dropped; their weights are not shared out among the token's others.

    Args:
        experts: [T, K], of a signed integer dtype: the expert of each slot. A slot of -1 stays so and does not count; ids that are out
            of range are left for `plan` to report. T may differ from rank to rank and may be 0.
        num_experts: E, the same on all ranks.
        capacity: how many slots an expert takes from all ranks together, 0 or more, the same on all ranks; often
            ``ceil(factor * K * (all ranks' T) / E)`` with a factor of 1 to 2.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.

    A DTensor goes in as its local shard: on each mesh dim Shard(0) over its tokens, or, where the group does not span it, Replicate.

    Returns [T, K], of ``experts``' dtype; ``experts`` itself is not changed. Of a DTensor, one that is placed alike.

    Costs one all-gather of E counts, and no host sync. No backward: the ids are integers.

    Raises TypeError or ValueError for an argument that is wrong on this rank, or a DTensor that is placed otherwise, before anything is
    sent. That ranks differ in E cannot be seen here, and the exchange fails or hangs.

    >>> limit_by_capacity(torch.tensor([[0, 1], [0, 2], [1, 0]]), num_experts=3, capacity=2)
    tensor([[ 0,  1],
            [ 0,  2],
            [ 1, -1]])
    """
    ranks = resolve_group(group)
    if (like := routed_like({"experts": experts}, ranks)) is not None:
        return placed(limit_by_capacity(to_local(experts), num_experts, capacity, group), like)
    check_experts(experts)
    if not experts.dtype.is_signed:
        wrong_type("experts", f"of dtype {experts.dtype}", "of a signed integer dtype, which can hold -1")
    check_slots(experts, MOST)
    for name, value, least in (("num_experts", num_experts, 1), ("capacity", capacity, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            wrong_type(name, type(value).__name__, "an int")
        if value < least:
            wrong_value(name, value, f"{least} or more")
    slots = count_slots(experts, num_experts)
    first = slots.starts  # [E]: the place of each expert's first slot, of all ranks', in this rank's order
    if ranks.size > 1:
        mine = slots.counts.unsqueeze(0)  # [1, E]
        counts = all_gathered(start_all_gather(mine, ranks.size, ranks.name), mine, ranks.size)  # [P, E]
        earlier = take_slice(counts.cumsum(0) - counts, 0, 1, ranks.size, ranks.name)  # [1, E] the slots of the ranks before this one
        first = first - earlier.squeeze(0)
    served = slots.position - pad(first, (0, 1))[slots.keys]  # [T, K]: how many slots the expert has before this one
    return experts.masked_fill((served >= capacity) & (slots.keys < num_experts), -1)


class Slots(NamedTuple):
    """The slots of this rank's tokens in the order of their experts; those that are no expert's, -1 or out of range, come last."""

    keys: Tensor  # [T, K] int64: a slot's expert, or E
    position: Tensor  # [T, K] int32: its place in that order
    starts: Tensor  # [E] int64: the first place of each expert
    counts: Tensor  # [E] int64: its slots


def count_slots(experts: Tensor, num_experts: int) -> Slots:
    """How many slots each expert has here, and which; exact, and without a host sync, unlike `torch.bincount`."""
    keys = experts.long()
    keys = keys.where((keys >= 0) & (keys < num_experts), num_experts)
    _, position, ends = counting_sort(keys, num_experts + 1, keys.numel())
    ends = ends[:num_experts].long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    return Slots(keys, position, ends - counts, counts)
