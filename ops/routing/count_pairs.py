"""keys[t, j] = rank of experts[t, j] if slot j is the first of token t for that rank, else -1; message[p] = (pairs, slots, ids, T, ...).

Costs one read of experts [T, K] and one write of keys [T, K]. The message has [P, 6 + signature] numbers, whatever E is. Expert e is on
rank e // (E / P). With ``placed`` [T, K] int32, as `place` returns it, each slot is on the rank given there: one more read. `rank_keys`
computes the keys only.
No backward: integers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moecomm.ops.base.library import define, inlined, jit, tl, tokens_a_block
from moecomm.ops.base.signature import NOT_FINITE, PAIRS, SIGNATURE, SLOTS

KEYS = "rank_keys(Tensor experts, int num_experts, int ranks, Tensor? placed=None) -> Tensor"
SCHEMA = (
    "count(Tensor experts, int num_experts, int ranks, SymInt[] signature, Tensor? placed=None, Tensor? weights=None) -> (Tensor, Tensor)"
)


def count_fake(
    experts: Tensor,
    num_experts: int,
    ranks: int,
    signature: Sequence[int],
    placed: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    keys = keys_fake(experts, num_experts, ranks, placed)
    message = torch.empty(ranks, SIGNATURE + len(signature), dtype=torch.int64, device=experts.device)  # [P, 6 + signature]
    return keys, message


def keys_fake(experts: Tensor, num_experts: int, ranks: int, placed: Tensor | None = None) -> Tensor:
    return torch.empty(experts.shape, dtype=torch.int32, device=experts.device)  # [T, K]


def count_cpu(
    experts: Tensor,
    num_experts: int,
    ranks: int,
    signature: Sequence[int],
    placed: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    keys, message = count_fake(experts, num_experts, ranks, signature, placed)
    rank, first, lowest, highest = _ranks(experts, num_experts, ranks, placed)
    keys.numpy()[:] = first.T
    header = message.numpy()
    header[:] = [0, 0, lowest, highest, experts.shape[0], 0 if weights is None else int(not_finite(weights)), *signature]
    header[:, PAIRS] = np.bincount(first.ravel() + 1, minlength=ranks + 1)[1:]
    header[:, SLOTS] = np.bincount(rank.ravel() + 1, minlength=ranks + 1)[1:]
    return keys, message


def not_finite(weights: Tensor) -> Tensor:
    return weights.isfinite().logical_not().sum()


def keys_cpu(experts: Tensor, num_experts: int, ranks: int, placed: Tensor | None = None) -> Tensor:
    keys = keys_fake(experts, num_experts, ranks, placed)
    keys.numpy()[:] = _ranks(experts, num_experts, ranks, placed)[1].T
    return keys


def _ranks(experts: Tensor, num_experts: int, ranks: int, placed: Tensor | None) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(rank of each slot [K, T], first [K, T], lowest id, highest id).

    ``first`` is the rank where the slot is the token's first for that rank, and -1 elsewhere.
    """
    ids = experts.numpy().T.astype(np.int64)  # [K, T]; as int64, ids of any dtype can be compared with num_experts
    lowest, highest = (int(ids.min()), int(ids.max())) if ids.size else (-1, -1)
    if placed is not None:
        rank = placed.numpy().T.astype(np.int64)
    else:
        rank = ids // (num_experts // ranks)
        if lowest < 0 or highest >= num_experts:  # a wrong id is reported, not routed
            rank[(ids < 0) | (ids >= num_experts)] = -1
    rank = np.ascontiguousarray(rank)
    first = rank.copy()
    for j in range(1, rank.shape[0]):
        first[j, (rank[:j] == rank[j]).any(0)] = -1
    return rank, first, lowest, highest


@jit(varies=("tokens",))
def _count_kernel(
    experts, placed, keys, counts, tokens, num_experts, local, ranks, stride_t, stride_k,
    PLACED: tl.constexpr, COUNTED: tl.constexpr, SLOTS_A_TOKEN: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, K)
    inside = (t < tokens)[:, None] & (j < SLOTS_A_TOKEN)[None, :]
    ids = tl.load(experts + t.to(tl.int64)[:, None] * stride_t + j[None, :] * stride_k, mask=inside, other=0).to(tl.int64)  # [BLOCK, K]
    ids = tl.where(inside, ids, -1)  # after the cast to int64, because unsigned ids have no -1
    slot = t.to(tl.int64)[:, None] * SLOTS_A_TOKEN + j[None, :]
    if PLACED:
        rank = tl.load(placed + slot, mask=inside, other=-1).to(tl.int64)
    else:
        rank = tl.where((ids >= 0) & (ids < num_experts), ids // local, -1)
    first = rank
    for i in range(SLOTS_A_TOKEN - 1):  # without the loop, a tensor [BLOCK, K, K]: for K = 128 it did not compile in six minutes
        if PLACED:
            other = tl.load(placed + t.to(tl.int64) * SLOTS_A_TOKEN + i, mask=t < tokens, other=-1).to(tl.int64)  # [BLOCK]
        else:
            earlier = tl.load(experts + t.to(tl.int64) * stride_t + i * stride_k, mask=t < tokens, other=0).to(tl.int64)
            other = tl.where((earlier >= 0) & (earlier < num_experts), earlier // local, -1)
        first = tl.where((rank == other[:, None]) & (j > i)[None, :], -1, first)
    tl.store(keys + slot, first.to(tl.int32), mask=inside)
    if COUNTED:
        row = counts + tl.program_id(0).to(tl.int64) * (2 * ranks + 2)
        tl.store(row, tl.min(tl.min(tl.where(inside, ids, num_experts), axis=1), axis=0))
        tl.store(row + 1, tl.max(tl.max(ids, axis=1), axis=0))
        for p in range(ranks):
            tl.store(row + 2 + 2 * p, tl.sum(tl.sum((first == p).to(tl.int64), axis=1), axis=0))
            tl.store(row + 3 + 2 * p, tl.sum(tl.sum((rank == p).to(tl.int64), axis=1), axis=0))


@inlined
def store_message(out, pairs, slots, lowest, highest, tokens, signature):
    """The words of a message, in the order of `signature.py`; 0 for weights that are not finite, which torch counts."""
    tl.store(out, pairs)
    tl.store(out + 1, slots)
    tl.store(out + 2, lowest)
    tl.store(out + 3, highest)
    tl.store(out + 4, tokens)
    tl.store(out + 5, 0)
    for i in tl.static_range(len(signature)):
        tl.store(out + 6 + i, signature[i])


@jit(varies=("blocks", "tokens"))
def _message_kernel(counts, message, blocks, tokens, num_experts, ranks, signature, BLOCK: tl.constexpr):
    """The message to one rank: the sums over the blocks of tokens, and the numbers that are the same for all ranks."""
    p = tl.program_id(0)
    pairs, slots = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    lowest, highest = tl.zeros([BLOCK], tl.int64) + num_experts, tl.zeros([BLOCK], tl.int64) - 1
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        row, inside = counts + block.to(tl.int64) * (2 * ranks + 2), block < blocks
        lowest = tl.minimum(lowest, tl.load(row, mask=inside, other=num_experts))
        highest = tl.maximum(highest, tl.load(row + 1, mask=inside, other=-1))
        pairs += tl.load(row + 2 + 2 * p, mask=inside, other=0)
        slots += tl.load(row + 3 + 2 * p, mask=inside, other=0)
    out, least = message + p * (6 + len(signature)), tl.where(blocks == 0, -1, tl.min(lowest, axis=0))
    store_message(out, tl.sum(pairs, axis=0), tl.sum(slots, axis=0), least, tl.max(highest, axis=0), tokens, signature)


def count_triton(
    experts: Tensor,
    num_experts: int,
    ranks: int,
    signature: Sequence[int],
    placed: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    keys, message = count_fake(experts, num_experts, ranks, signature, placed)
    blocks = -(-experts.shape[0] // tokens_a_block(experts.shape[1]))
    counts = torch.empty(blocks, 2 * ranks + 2, dtype=torch.int64, device=experts.device)
    _launch(experts, num_experts, ranks, placed, keys, counts)
    signed = tuple(signature)  # passed as kernel arguments: a copy from the host would wait for the device
    _message_kernel[(ranks,)](counts, message, blocks, experts.shape[0], num_experts, ranks, signed, BLOCK=256)
    if weights is not None:
        message[:, NOT_FINITE] = not_finite(weights)
    return keys, message


def keys_triton(experts: Tensor, num_experts: int, ranks: int, placed: Tensor | None = None) -> Tensor:
    keys = keys_fake(experts, num_experts, ranks, placed)
    _launch(experts, num_experts, ranks, placed, keys, None)
    return keys


def _launch(experts: Tensor, num_experts: int, ranks: int, placed: Tensor | None, keys: Tensor, counts: Tensor | None) -> None:
    tokens, k = experts.shape
    if tokens:
        block = tokens_a_block(k)
        _count_kernel[(-(-tokens // block),)](
            experts, keys if placed is None else placed.contiguous(), keys, keys if counts is None else counts, tokens, num_experts,
            num_experts // ranks, ranks, *experts.stride(), PLACED=placed is not None, COUNTED=counts is not None,
            SLOTS_A_TOKEN=k, K=1 << (k - 1).bit_length(), BLOCK=block,
        )  # fmt: skip


count = define(SCHEMA, count_fake, count_cpu, count_triton)
rank_keys = define(KEYS, keys_fake, keys_cpu, keys_triton)
