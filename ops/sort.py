"""order[i] = the i-th flat index in the stable order of keys, without those of key -1; position[order[i]] = i; offsets[b] = end of key b.

Costs two reads of the M keys and one write of order [size] and position [M], all int32, times bins / 64 on a GPU; size keys are not -1,
or fewer where it is padded: the rest of order is -1. `bounded_sort` gives each key ``most`` places of its own, from key * most on: a key's
entries beyond have no position, and places that are left have order -1.
Integers only: no backward; `order` and `position` are each other's inverse, as gather and weighted_sum are each other's mirror.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moecomm.ops.library import block_of, define, jit, tl

SORT = "counting_sort(Tensor keys, int bins, SymInt size, bool padded=False) -> (Tensor, Tensor, Tensor)"
BOUNDED = "bounded_sort(Tensor keys, int bins, SymInt most) -> (Tensor, Tensor)"
BLOCK = 256  # keys that a program of a kernel takes
MOST = 2**31 - BLOCK  # keys that int32 indices can number, those past the end in a kernel's last block among them


def sort_fake(keys: Tensor, bins: int, size: int, padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(keys, size), torch.empty(keys.shape, dtype=torch.int32, device=keys.device), _empty(keys, bins)


def sort_cpu(keys: Tensor, bins: int, size: int, padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    # A stable sort of 32,768 keys below 64: int16 0.10 ms, int32 0.13, int64 0.24, int8 1.4 (torch 2.13, one EPYC core).
    flat = keys.flatten().to(torch.int16 if bins < 2**15 else torch.int32)
    offsets = torch.bincount(flat.to(torch.int32) + 1, minlength=bins + 1)[1:].cumsum(0).to(torch.int32)
    here = int(offsets[-1]) if padded else size
    order = flat.sort(stable=True).indices[flat.numel() - here :].to(torch.int32)  # the dropped, of key -1, come first
    place = torch.arange(here, dtype=torch.int32, device=keys.device)
    position = torch.full_like(flat, -1, dtype=torch.int32).index_copy_(0, order.long(), place)
    return pad(order, (0, size - here), value=-1) if padded else order, position.view(keys.shape), offsets


def bounded_fake(keys: Tensor, bins: int, most: int) -> tuple[Tensor, Tensor]:
    return _empty(keys, bins * most), torch.empty(keys.shape, dtype=torch.int32, device=keys.device)


def bounded_cpu(keys: Tensor, bins: int, most: int) -> tuple[Tensor, Tensor]:
    packed, _, offsets = sort_cpu(keys, bins, keys.numel(), padded=True)
    entries = packed[: int(offsets[-1])].long()
    key = keys.flatten()[entries].long()
    place = torch.arange(entries.shape[0], device=keys.device) - pad(offsets, (1, -1))[key]  # among the entries of its key
    inside = place < most
    entries, place = entries[inside], (place + key * most)[inside]
    order = torch.full((bins * most,), -1, dtype=torch.int32, device=keys.device)
    position = torch.full(keys.shape, -1, dtype=torch.int32, device=keys.device)
    order[place] = entries.to(torch.int32)
    position.view(-1)[entries] = place.to(torch.int32)
    return order, position


@jit
def _histogram_kernel(keys, counts, size, blocks, bins, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.where(i < size, tl.load(keys + i, mask=i < size, other=0).to(tl.int32), -1)
    for start in range(0, bins, BINS):
        b = start + tl.arange(0, BINS)
        here = tl.sum((key[:, None] == b[None, :]).to(tl.int32), axis=0)  # [BINS]
        tl.store(counts + b * blocks + block, here, mask=b < bins)


@jit
def _place_kernel(
    keys, starts, order, position, size, kept, blocks, bins, most, BOUNDED: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.where(i < size, tl.load(keys + i, mask=i < size, other=0).to(tl.int32), -1)
    place = tl.full([BLOCK], -1, tl.int32)
    for start in range(0, bins, BINS):
        b = start + tl.arange(0, BINS)
        mine = (key[:, None] == b[None, :]).to(tl.int32)  # [BLOCK, BINS]
        first = tl.load(starts + b * blocks + block, mask=b < bins, other=0)
        before = tl.cumsum(mine, axis=0) - mine  # equal keys earlier in this block
        place += tl.sum(mine * (first[None, :] + before + 1), axis=1)
    if BOUNDED:
        place = tl.where(place < (key + 1) * most, place, -1)
    tl.store(position + i, place, mask=i < size)
    tl.store(order + place, i, mask=(place >= 0) & (place < kept))


def sort_triton(keys: Tensor, bins: int, size: int, padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    order, position = _empty(keys, size), torch.empty(keys.shape, dtype=torch.int32, device=keys.device)
    if padded:
        order.fill_(-1)
    if keys.numel() == 0:
        return order, position, _empty(keys, bins).zero_()
    counts = _histogram(keys, bins)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)  # over the keys, and over the blocks within a key: a stable order
    _place(keys, ends - counts.flatten(), order, position, bins, None)
    blocks = counts.shape[1]
    return order, position, ends[blocks - 1 :: blocks].clone()  # no view, even of one bin: an op's output starts where its memory does


def bounded_triton(keys: Tensor, bins: int, most: int) -> tuple[Tensor, Tensor]:
    order, position = _empty(keys, bins * most).fill_(-1), torch.empty(keys.shape, dtype=torch.int32, device=keys.device)
    if keys.numel():
        counts = _histogram(keys, bins)
        first = torch.arange(bins, dtype=torch.int32, device=keys.device).unsqueeze(1) * most  # [bins, 1]
        _place(keys, counts.cumsum(1, dtype=torch.int32) - counts + first, order, position, bins, most)
    return order, position


def _histogram(keys: Tensor, bins: int) -> Tensor:
    """[bins, blocks]: how many of each key are in each block of keys."""
    blocks = -(-keys.numel() // BLOCK)
    counts = torch.empty(bins, blocks, dtype=torch.int32, device=keys.device)
    _histogram_kernel[(blocks,)](keys.contiguous(), counts, keys.numel(), blocks, bins, BLOCK=BLOCK, BINS=block_of(bins, 64))
    return counts


def _place(keys: Tensor, starts: Tensor, order: Tensor, position: Tensor, bins: int, most: int | None) -> None:
    """Fill order and position, where the keys of a block stand from ``starts`` [bins, blocks] on."""
    blocks = -(-keys.numel() // BLOCK)
    _place_kernel[(blocks,)](
        keys.contiguous(), starts, order, position, keys.numel(), order.shape[0], blocks, bins, most or 0,
        BOUNDED=most is not None, BLOCK=BLOCK, BINS=block_of(bins, 64),
    )  # fmt: skip


def _empty(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device=like.device)


counting_sort = define(SORT, sort_fake, sort_cpu, sort_triton)
bounded_sort = define(BOUNDED, bounded_fake, bounded_cpu, bounded_triton)
