"""places[t, j] = rank * L + local slot of one replica of experts[t, j]; ranks[t, j] = its rank; both -1 for an id outside [0, E).

Costs one read of experts [T, K] and two writes of [T, K] int32. The table, E + 1 + P * L int32, is copied to the device without waiting.
No backward: integers only.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from moecomm.errors import wrong_value
from moecomm.ops.base.library import define, jit, tl
from moecomm.ops.base.process_group import process_group

TABLE = "placement_table(Tensor placement, int num_experts, Device device) -> (Tensor, SymInt)"
PLACE = "place(Tensor experts, Tensor table, int num_experts, int ranks, str group) -> (Tensor, Tensor)"

# Token t of rank p has the number i = t * P + p in the group. It takes replica floor(frac(i / golden ratio) * replicas). Any run of
# numbers is spread evenly over the replicas, also with a stride, such as every other token or the tokens of one rank. i % replicas would
# be even only for runs without a stride.
GOLDEN = 2654435769  # 2^32 / golden ratio
MASK = 2**32 - 1


def table_fake(placement: Tensor, num_experts: int, device: torch.device) -> tuple[Tensor, torch.SymInt]:
    table = torch.empty(num_experts + 1 + placement.numel(), dtype=torch.int32, device=device)
    return table, torch.library.get_ctx().new_dynamic_size()


def table_cpu(placement: Tensor, num_experts: int, device: torch.device) -> tuple[Tensor, int]:
    """The table: the start of each expert's places [E + 1], then the places of expert 0, of expert 1, ..., each in rank order.

    It is an op for two reasons: the placement may change during training, so a graph must not contain it; and compiled code
    must check it too.
    """
    rows = placement.numpy().tolist()
    check_rows(rows, num_experts)
    flat = placement.flatten().long()
    starts = torch.bincount(flat, minlength=num_experts).cumsum(0)
    table = torch.cat((starts.new_zeros(1), starts, flat.sort(stable=True).indices)).to(torch.int32)
    # 31 bits, the lowest always 1. As a kernel argument, every placement's checksum then has the same type and none is a multiple of 16, so
    # Triton does not compile again.
    return upload(table, device), zlib.crc32(repr(rows).encode()) & 0x7FFFFFFF | 1


def upload(indices: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device through pinned memory; the host does not wait for earlier work of the device.

    The host releases the pinned memory at once. The allocator reuses it when the copy is done. A captured CUDA graph repeats the
    copy at every replay. This is safe: torch's allocator never reuses memory that was allocated during a stream's capture
    (``free`` in ATen/core/CachingHostAllocator.h of 2.11 and 2.13).
    """
    return indices if device.type == "cpu" else indices.pin_memory().to(device, non_blocking=True)


def check_rows(rows: list[list[int]], num_experts: int, argument: str = "placement") -> None:
    """Raise unless each rank has different experts with ids in range, and all experts are on some rank."""
    for rank, row in enumerate(rows):
        if min(row) < 0 or max(row) >= num_experts:
            wrong_value(argument, f"{row} on rank {rank}", f"of ids in [0, num_experts) = [0, {num_experts})")
        if len(set(row)) < len(row):
            wrong_value(argument, f"{row} on rank {rank}", "of different experts on a rank")
    missing = sorted(set(range(num_experts)).difference(*rows))
    if missing:
        wrong_value(argument, f"without experts {missing}", f"of all {num_experts} experts, each on some rank")


def place_fake(experts: Tensor, table: Tensor, num_experts: int, ranks: int, group: str) -> tuple[Tensor, Tensor]:
    places = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    return places, torch.empty_like(places)


def _size_and_rank(table: Tensor, num_experts: int, ranks: int, group: str) -> tuple[int, int]:
    """L and the rank. The rank is looked up at run time, so no graph contains it."""
    return (table.shape[0] - num_experts - 1) // ranks, process_group(group).rank() if ranks > 1 else 0


def place_cpu(experts: Tensor, table: Tensor, num_experts: int, ranks: int, group: str) -> tuple[Tensor, Tensor]:
    local, mine = _size_and_rank(table, num_experts, ranks, group)
    table = table.long()
    ids = experts.long().contiguous()
    inside = (ids >= 0) & (ids < num_experts)
    ids = ids.where(inside, 0)
    first = table[ids]  # [T, K]
    replicas = table[ids + 1] - first
    number = torch.arange(experts.shape[0], device=experts.device).unsqueeze(1) * ranks + mine  # [T, 1]
    choice = (number * GOLDEN & MASK) * replicas >> 32
    places = table[num_experts + 1 + first + choice].masked_fill_(~inside, -1)
    return places.to(torch.int32), places.div_(local, rounding_mode="floor").to(torch.int32)


@jit(varies=("size",))
def _place_kernel(
    experts, table, places, ranks_of, size, num_experts, local, ranks, mine, k, stride_t, stride_k, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t, j = i // k, i % k
    # int64 before the comparison: an unsigned id of 255 is not -1
    ids = tl.load(experts + t * stride_t + j * stride_k, mask=i < size, other=0).to(tl.int64)
    inside = (i < size) & (ids >= 0) & (ids < num_experts)
    first = tl.load(table + ids, mask=inside, other=0).to(tl.int64)
    replicas = tl.load(table + ids + 1, mask=inside, other=0).to(tl.int64) - first
    number = t * ranks + mine
    choice = (((number * 2654435769) & 4294967295) * replicas) >> 32
    place = tl.load(table + num_experts + 1 + first + choice, mask=inside, other=-1)
    tl.store(places + i, place, mask=i < size)
    tl.store(ranks_of + i, tl.where(inside, place // local, -1), mask=i < size)


def place_triton(experts: Tensor, table: Tensor, num_experts: int, ranks: int, group: str) -> tuple[Tensor, Tensor]:
    places = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    ranks_of = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    if experts.numel():
        local, mine = _size_and_rank(table, num_experts, ranks, group)
        block = 256
        _place_kernel[(-(-experts.numel() // block),)](
            experts, table.contiguous(), places, ranks_of, experts.numel(), num_experts, local, ranks, mine, experts.shape[1],
            *experts.stride(), BLOCK=block,
        )  # fmt: skip
    return places, ranks_of


placement_table = define(TABLE, table_fake, table_cpu, table_cpu)
place = define(PLACE, place_fake, place_cpu, place_triton)
