"""limit_by_capacity: drop the slots that are over their expert's capacity."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from moecomm.errors import check_experts, check_int, check_slots, wrong_type, wrong_value
from moecomm.ops.base.library import call
from moecomm.ops.exchange.collectives import all_gathered, start_all_gather
from moecomm.ops.exchange.slices import take_slice
from moecomm.ops.routing.counting_sort import MOST, counting_sort
from moecomm.parallel.dtensor import placed, routed_like, to_local
from moecomm.parallel.group import GroupLike, resolve_group

FACTOR = "Of a capacity factor make slots: math.ceil(capacity * ranks * experts.numel() / num_experts)"


def limit_by_capacity(experts: Tensor, num_experts: int, capacity: int, group: GroupLike = None) -> Tensor:
    """Mark with -1 each slot that is over its expert's capacity, counted over all ranks of the group.

    Each expert keeps its first ``capacity`` slots. Slots count in a fixed order: by rank in the group, then by token,
    then by slot within the token. This is the rule of GShard (arXiv 2006.16668), with all tokens of the group as one
    GShard group. `plan` sends nothing for a dropped slot. The weights of the token's other slots stay unchanged.

    Args:
        experts: [T, K], signed integer dtype: the expert of each slot. A slot of -1 stays -1 and does not count. Ids
            out of range stay unchanged; `plan` reports them. T may differ between ranks and may be 0.
        num_experts: E, the same on all ranks.
        capacity: the most slots that an expert takes from all ranks together; 0 or more, the same on all ranks. Often
            ``ceil(factor * K * (all ranks' T) / E)`` with a factor of 1 to 2.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.

    Returns:
        [T, K], with the dtype of ``experts``. The input is not modified. A DTensor gives a DTensor with the same
        placements.

    Raises:
        TypeError, ValueError: an argument is wrong on this rank, or a DTensor has an unsupported placement. Raised
            before anything is sent.

    Example:
        >>> limit_by_capacity(torch.tensor([[0, 1], [0, 2], [1, 0]]), num_experts=3, capacity=2)
        tensor([[ 0,  1],
                [ 0,  2],
                [ 1, -1]])

    DTensors: the local shard goes in. On each mesh dim the placement is Shard(0) over the tokens. It may also be
    Replicate on a dim that the group does not span.

    Backward: none, because the ids are integers.

    Cost: one all-gather of E counts; no host synchronization.

    Limit: ranks that differ in E are not detected here. The exchange then fails or hangs.
    """
    ranks = resolve_group(group)
    if (like := routed_like({"experts": experts}, ranks)) is not None:
        return placed(limit_by_capacity(to_local(experts), num_experts, capacity, group), like)
    check_experts(experts)
    if not experts.dtype.is_signed:
        wrong_type("experts", f"of dtype {experts.dtype}", "of a signed integer dtype, which can hold -1")
    check_slots(experts, MOST)
    for name, value, least in (("num_experts", num_experts, 1), ("capacity", capacity, 0)):
        check_int(name, value, FACTOR if name == "capacity" else "")
        if value < least:
            wrong_value(name, value, f"{least} or more")
    slots = count_slots(experts, num_experts)
    first = slots.starts  # [E]: the position of each expert's first slot over all ranks, relative to this rank's order
    if ranks.size > 1:
        mine = slots.counts.unsqueeze(0)  # [1, E]
        counts = all_gathered(start_all_gather(mine, ranks.size, ranks.name), mine, ranks.size)  # [P, E]
        earlier = take_slice(counts.cumsum(0) - counts, 0, 1, ranks.size, ranks.name)  # [1, E]: slots on the ranks before this one
        first = first - earlier.squeeze(0)
    served = slots.position - pad(first, (0, 1))[slots.keys]  # [T, K]: the expert's slots before this one
    return experts.masked_fill((served >= capacity) & (slots.keys < num_experts), -1)


class Slots(NamedTuple):
    """This rank's slots, sorted by expert. Slots of -1 or of an id out of range come last."""

    keys: Tensor  # [T, K] int64: the slot's expert, or E if it has none
    position: Tensor  # [T, K] int32: the slot's position in the sorted order
    starts: Tensor  # [E] int64: each expert's first position
    counts: Tensor  # [E] int64: each expert's number of slots


def slot_keys(experts: Tensor, num_experts: int) -> Tensor:
    """[T, K] int64: the expert of each slot, ``num_experts`` where it has none."""
    keys = experts.long()
    return keys.where((keys >= 0) & (keys < num_experts), num_experts)


def count_slots(experts: Tensor, num_experts: int) -> Slots:
    """Count and sort the slots of each expert on this rank.

    The counts are exact. There is no host synchronization, unlike in `torch.bincount`.
    """
    keys = slot_keys(experts, num_experts)
    _, position, ends = call(counting_sort, keys, num_experts + 1, keys.numel())
    ends = ends[:num_experts].long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    return Slots(keys, position, ends - counts, counts)
