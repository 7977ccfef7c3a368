"""fits[t, j] = places[t, j] if slot j's (token, rank) pair has a position, else -1; dropped = slots with an expert that do not fit.

A pair has ``local`` rows. If it has more slots, which takes a repeated expert, the slots after the first ``local`` do not fit either.
Costs two reads of [T, K] ids, one read of positions and one write of [T, K] int32. No backward: integers only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.ops.base.library import define, jit, tl, tokens_a_block

SCHEMA = "fit(Tensor experts, Tensor places, Tensor position, int local) -> (Tensor, Tensor)"


def fit_fake(experts: Tensor, places: Tensor, position: Tensor, local: int) -> tuple[Tensor, Tensor]:
    fits = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)  # [T, K]
    return fits, torch.empty((), dtype=torch.int32, device=experts.device)


def fit_cpu(experts: Tensor, places: Tensor, position: Tensor, local: int) -> tuple[Tensor, Tensor]:
    rank = torch.div(places.long(), local, rounding_mode="floor")  # [T, K]; an id out of range has no pair with a position
    together = rank.unsqueeze(2) == rank.unsqueeze(1)  # [T, K, K]
    sent = (together & (position >= 0).unsqueeze(1)).any(2)
    if experts.shape[1] > local:
        sent &= together.tril().sum(2) <= local
    fits = torch.where(sent, places.long(), -1).to(torch.int32, memory_format=torch.contiguous_format)
    named = experts.long() != -1  # as int64, because uint8's 255 equals -1
    return fits, (named.sum() - sent.sum()).to(torch.int32)


@jit(varies=("tokens",))
def _fit_kernel(
    experts, places, position, fits, dropped, tokens, local, SLOTS_A_TOKEN: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, K)
    inside = (t < tokens)[:, None] & (j < SLOTS_A_TOKEN)[None, :]
    slot = t.to(tl.int64)[:, None] * SLOTS_A_TOKEN + j[None, :]  # [BLOCK, K]
    place = tl.load(places + slot, mask=inside, other=0).to(tl.int64)
    rank = tl.where(inside & (place >= 0), place // local, -1)
    sent, so_far = tl.zeros([BLOCK, K], tl.int32), tl.zeros([BLOCK, K], tl.int32)
    for i in range(SLOTS_A_TOKEN):  # without the loop, a tensor [BLOCK, K, K], which takes minutes to compile from K = 128 on
        other = tl.load(places + t.to(tl.int64) * SLOTS_A_TOKEN + i, mask=t < tokens, other=0).to(tl.int64)  # [BLOCK]
        opens = tl.load(position + t.to(tl.int64) * SLOTS_A_TOKEN + i, mask=t < tokens, other=-1) >= 0
        together = rank == tl.where(other >= 0, other // local, -1)[:, None]
        sent += (together & opens[:, None]).to(tl.int32)
        so_far += (together & (j >= i)[None, :]).to(tl.int32)
    fit = (sent > 0) & (so_far <= local)
    tl.store(fits + slot, tl.where(fit, place, -1).to(tl.int32), mask=inside)
    ids = tl.load(experts + slot, mask=inside, other=0).to(tl.int64)  # int64, because unsigned ids have no -1
    lost = (inside & (ids != -1) & (fit == 0)).to(tl.int32)
    tl.atomic_add(dropped, tl.sum(tl.sum(lost, axis=1), axis=0))  # integers: the order of the atomics does not change the sum


def fit_triton(experts: Tensor, places: Tensor, position: Tensor, local: int) -> tuple[Tensor, Tensor]:
    tokens, k = experts.shape
    fits = torch.empty((tokens, k), dtype=torch.int32, device=experts.device)
    dropped = torch.empty((), dtype=torch.int32, device=experts.device).zero_()
    if tokens:
        block = tokens_a_block(k)
        _fit_kernel[(-(-tokens // block),)](
            experts.contiguous(), places.contiguous(), position.contiguous(), fits, dropped, tokens, local,
            SLOTS_A_TOKEN=k, K=1 << (k - 1).bit_length(), BLOCK=block,
        )  # fmt: skip
    return fits, dropped


fit = define(SCHEMA, fit_fake, fit_cpu, fit_triton)
