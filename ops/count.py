"""keys[t, j] = rank of experts[t, j] where slot j is t's first for that rank, else -1; message[p] = (pairs, slots, ids, T, signature).

Costs one read of experts [T, K] and one write of keys [T, K]; the message has [P, 5 + signature] numbers, whatever E is. Expert e is on
rank e // (E / P), or each slot on the rank that ``placed`` says, [T, K] int32 as `place` gives them: one more read.
Integers only: no backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moecomm.ops.library import define, jit, tl

PAIRS, SLOTS, LOWEST, HIGHEST, TOKENS, SIGNATURE = 0, 1, 2, 3, 4, 5  # the columns of a message; the signature takes the rest
SCHEMA = "count(Tensor experts, int num_experts, int ranks, SymInt[] signature, Tensor? placed=None) -> (Tensor, Tensor)"


def count_fake(
    experts: Tensor, num_experts: int, ranks: int, signature: Sequence[int], placed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    keys = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)  # [T, K]
    message = torch.empty(ranks, SIGNATURE + len(signature), dtype=torch.int64, device=experts.device)  # [P, 5 + signature]
    return keys, message


def count_cpu(
    experts: Tensor, num_experts: int, ranks: int, signature: Sequence[int], placed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    lowest, highest = (int(bound) for bound in experts.aminmax()) if experts.numel() else (-1, -1)
    if placed is None:
        rank = _contiguous(experts, num_experts, num_experts // ranks, lowest, highest)
    else:
        rank = placed.clone(memory_format=torch.contiguous_format)  # an op may not give back its input, as it would where K = 1
    slots = torch.bincount(rank.flatten() + 1, minlength=ranks + 1)[1:]
    keys, pairs = rank, slots
    if experts.shape[1] > 1:
        same = rank.unsqueeze(2) == rank.unsqueeze(1)  # [T, K, K]
        keys = torch.where(same.tril_(-1).any(2), -1, rank)
        pairs = torch.bincount(keys.flatten() + 1, minlength=ranks + 1)[1:]
    message = torch.tensor([[0, 0, lowest, highest, experts.shape[0], *signature]], device=experts.device).repeat(ranks, 1)
    message[:, PAIRS] = pairs
    message[:, SLOTS] = slots
    return keys, message


def _contiguous(experts: Tensor, num_experts: int, local: int, lowest: int, highest: int) -> Tensor:
    """The rank of each slot where rank p holds experts p * local to (p + 1) * local - 1, -1 where the id is out of range."""
    rank = experts.to(torch.int32)  # [T, K]
    if lowest < 0:
        rank = torch.where(experts < 0, -local, rank)
    if highest >= num_experts:  # a wrong id is reported, not followed; compared only where experts' dtype can hold num_experts
        rank = torch.where(experts >= num_experts, -local, rank)
    return torch.div(rank, local, rounding_mode="floor")


@jit
def _header_kernel(message, width, header):
    row = message + tl.program_id(0) * width
    for i in tl.static_range(len(header)):
        tl.store(row + i, header[i])


@jit
def _count_kernel(
    experts, placed, keys, message, tokens, num_experts, local, ranks, width, stride_t, stride_k,
    PLACED: tl.constexpr, SLOTS_A_TOKEN: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, K)
    inside = (t < tokens)[:, None] & (j < SLOTS_A_TOKEN)[None, :]
    ids = tl.load(experts + t.to(tl.int64)[:, None] * stride_t + j[None, :] * stride_k, mask=inside, other=0).to(tl.int64)  # [BLOCK, K]
    ids = tl.where(inside, ids, -1)  # once it is an int64: there is no -1 among unsigned ids
    lowest = tl.min(tl.min(tl.where(inside, ids, num_experts), axis=1), axis=0)
    highest = tl.max(tl.max(ids, axis=1), axis=0)
    tl.atomic_min(message + 2, lowest)
    tl.atomic_max(message + 3, highest)
    slot = t.to(tl.int64)[:, None] * SLOTS_A_TOKEN + j[None, :]
    if PLACED:
        rank = tl.load(placed + slot, mask=inside, other=-1).to(tl.int64)
    else:
        rank = tl.where((ids >= 0) & (ids < num_experts), ids // local, -1)
    earlier = j[None, :, None] > j[None, None, :]  # [1, K, K]
    repeated = tl.max(((rank[:, :, None] == rank[:, None, :]) & earlier).to(tl.int32), axis=2) > 0
    first = tl.where(repeated, -1, rank)
    tl.store(keys + slot, first.to(tl.int32), mask=inside)
    for p in range(ranks):  # integer sums: the order of the atomics does not show
        tl.atomic_add(message + p * width, tl.sum(tl.sum((first == p).to(tl.int64), axis=1), axis=0))
        tl.atomic_add(message + p * width + 1, tl.sum(tl.sum((rank == p).to(tl.int64), axis=1), axis=0))


def count_triton(
    experts: Tensor, num_experts: int, ranks: int, signature: Sequence[int], placed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    tokens, k = experts.shape
    keys = torch.empty((tokens, k), dtype=torch.int32, device=experts.device)
    empty = experts.numel() == 0
    header = (0, 0, -1 if empty else num_experts, -1, tokens, *signature)
    message = torch.empty(ranks, len(header), dtype=torch.int64, device=experts.device)
    _header_kernel[(ranks,)](message, len(header), header)  # a kernel: a copy of the numbers from the host would wait for the device
    if not empty:
        block = 32
        _count_kernel[(-(-tokens // block),)](
            experts, keys if placed is None else placed.contiguous(), keys, message, tokens, num_experts, num_experts // ranks, ranks,
            message.shape[1], *experts.stride(), PLACED=placed is not None,
            SLOTS_A_TOKEN=k, K=1 << (k - 1).bit_length(), BLOCK=block,
        )  # fmt: skip
        message[1:, LOWEST : HIGHEST + 1] = message[0, LOWEST : HIGHEST + 1]
    return keys, message


count = define(SCHEMA, count_fake, count_cpu, count_triton)
