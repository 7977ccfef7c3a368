"""order[i] = the i-th flat index in the stable order of keys, without keys of -1; position[order[i]] = i; offsets[b] = end of key b.

Costs two reads of the M keys and one write of order [size] and position [M], all int32. On a GPU also four accesses of the histograms of
blocks of keys, at most 16 * M int32 for up to 2^14 bins. There are three launches: each block's histogram, the sums over the blocks, the
places; with more than 256 bins a fourth.

- ``size`` is the number of keys other than -1. With ``padded`` there may be fewer such keys; the rest of order is -1.
- With ``align`` each key begins and ends at a multiple of it. The gaps in order are -1 as well, so ``padded`` must be set.
- `bounded_sort` gives each key ``most`` places of its own, from key * most on. A key's entries beyond these get no position; unused places
  have order -1.
- `first` cuts off the end of an order that was made before the number of keys was known.
No backward: integers only. `order` and `position` are inverses of each other, as gather and weighted_sum are mirrors of each other.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from moecomm.errors import wrong_value
from moecomm.ops.base.library import block_of, define, inlined, jit, tl
from moecomm.ops.routing.count_pairs import store_message

SORT = "counting_sort(Tensor keys, int bins, SymInt size, bool padded=False, int align=1) -> (Tensor, Tensor, Tensor)"
BOUNDED = "bounded_sort(Tensor keys, int bins, SymInt most) -> (Tensor, Tensor)"
FIRST = "first(Tensor order, SymInt size) -> Tensor"
MOST = 2**31 - 256  # the most keys that int32 indices can number
SORTED = 2048  # so many keys are sorted with those of -1 among them on a CPU: that is as fast as to leave them out, or faster
SUB = 64  # the keys that a program of a kernel compares with one another at a time
BINS = 1024  # the bins that a program of a kernel has in its registers at a time
FEW = 256  # as many bins one warp adds up beside its other work


def sort_fake(keys: Tensor, bins: int, size: int, padded: bool = False, align: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(keys, size), torch.empty(keys.shape, dtype=torch.int32, device=keys.device), _empty(keys, bins)


def sort_cpu(keys: Tensor, bins: int, size: int, padded: bool = False, align: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(size, align)
    flat = keys.numpy().ravel()
    named = np.flatnonzero(flat >= 0) if flat.size > SORTED and flat.min() < 0 else None
    narrow = flat if named is None else flat[named]
    # numpy's stable sort of 16-bit integers is a radix sort: 8,192 keys below 64 take 0.03 ms, torch 2.13 takes 0.12 ms (one EPYC core).
    narrow = narrow.astype(np.uint8 if bins < 2**8 else np.uint16 if bins < 2**16 else np.uint32)  # -1 becomes the largest
    slots = narrow.argsort(kind="stable")
    ends = narrow[slots].searchsorted(np.arange(bins, dtype=narrow.dtype), side="right")
    slots = slots[: ends[-1]] if named is None else named[slots]
    places = np.arange(slots.size, dtype=np.int32)
    if align > 1:
        counts = np.diff(ends, prepend=0)
        room = -(-counts // align) * align
        places += np.repeat((room.cumsum() - room) - (ends - counts), counts).astype(np.int32)
        ends = room.cumsum()
    order, position, offsets = sort_fake(keys, bins, size)
    placed, position_of = order.numpy(), position.numpy().reshape(-1)
    if slots.size < placed.size:
        placed.fill(-1)
    if slots.size < position_of.size:
        position_of.fill(-1)
    placed[places], position_of[slots] = slots, places
    offsets.numpy()[:] = ends
    return order, position, offsets


def bounded_fake(keys: Tensor, bins: int, most: int) -> tuple[Tensor, Tensor]:
    return _empty(keys, bins * most), torch.empty(keys.shape, dtype=torch.int32, device=keys.device)


def bounded_cpu(keys: Tensor, bins: int, most: int) -> tuple[Tensor, Tensor]:
    packed, _, offsets = sort_cpu(keys, bins, keys.numel(), padded=True)
    entries = packed[: int(offsets[-1])].long()
    key = keys.flatten()[entries].long()
    place = torch.arange(entries.shape[0], device=keys.device) - pad(offsets, (1, -1))[key]  # position among the entries of its key
    inside = place < most
    entries, place = entries[inside], (place + key * most)[inside]
    order = torch.full((bins * most,), -1, dtype=torch.int32, device=keys.device)
    position = torch.full(keys.shape, -1, dtype=torch.int32, device=keys.device)
    order[place] = entries.to(torch.int32)
    position.view(-1)[entries] = place.to(torch.int32)
    return order, position


@inlined
def _keys_of(keys, i, size, bins):
    """The keys i as int32, -1 for those outside [0, bins) or past the end."""
    wide = tl.load(keys + i, mask=i < size, other=0).to(tl.int64)
    return tl.where((i < size) & (wide >= 0) & (wide < bins), wide, -1).to(tl.int32)


@jit(varies=("size", "kept", "share"))
def _histogram_kernel(
    keys, named, counts, seen, order, size, kept, share, bins,
    PADDED: tl.constexpr, NAMED: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """counts[block, b], and -1 in the block's share of order. With NAMED also seen[block]: what `_scan_kernel` adds up of the ids."""
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    key = _keys_of(keys, i, size, bins)
    for start in range(0, bins, BINS):
        b = start + tl.arange(0, BINS)
        inside = (key >= start) & (key < start + BINS)
        here = tl.histogram(tl.where(inside, key - start, 0), BINS, mask=inside)
        tl.store(counts + block * bins + b, here, mask=b < bins)
    if NAMED:
        name = tl.load(named + i, mask=i < size, other=0).to(tl.int64)
        outside = (i < size) & (key < 0)
        tl.store(seen + block * 4, tl.sum((outside & (name != -1)).to(tl.int64), axis=0))
        tl.store(seen + block * 4 + 1, tl.sum(outside.to(tl.int64), axis=0))
        tl.store(seen + block * 4 + 2, tl.min(tl.where(i < size, name, 2**63 - 1), axis=0))
        tl.store(seen + block * 4 + 3, tl.max(tl.where(i < size, name, -1), axis=0))
    if PADDED:
        for start in range(0, share, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(order + block * share + at, tl.full([BLOCK], -1, tl.int32), mask=(at < share) & (block * share + at < kept))


@jit(varies=("blocks", "size", "tokens"))
def _scan_kernel(
    counts, totals, seen, dropped, message, blocks, bins, size, tokens, signature,
    NAMED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """counts[block, b] = the keys b in earlier blocks, and totals[b] = those in all blocks, for TILE bins a program.

    With NAMED the first program adds up seen: 1 for the number of lost keys, 2 for the message that `count_pairs.py` describes.
    """
    b = tl.program_id(0) * TILE + tl.arange(0, TILE)
    so_far = tl.zeros([TILE], tl.int32)
    for start in range(0, blocks, ROWS):
        r = start + tl.arange(0, ROWS)
        at, inside = counts + r.to(tl.int64)[:, None] * bins + b[None, :], (r < blocks)[:, None] & (b < bins)[None, :]
        here = tl.load(at, mask=inside, other=0)
        tl.store(at, so_far[None, :] + tl.cumsum(here, axis=0) - here, mask=inside)
        so_far += tl.sum(here, axis=0)
    tl.store(totals + b, so_far, mask=b < bins)
    if NAMED:  # noqa: SIM102 - one is known to the compiler, the other is not
        if tl.program_id(0) == 0:
            lost, outside = tl.zeros([ROWS], tl.int64), tl.zeros([ROWS], tl.int64)
            lowest, highest = tl.zeros([ROWS], tl.int64) + (2**63 - 1), tl.zeros([ROWS], tl.int64) - 1
            for start in range(0, blocks, ROWS):
                r = (start + tl.arange(0, ROWS)).to(tl.int64)
                if NAMED == 1:
                    lost += tl.load(seen + r * 4, mask=r < blocks, other=0)
                else:
                    outside += tl.load(seen + r * 4 + 1, mask=r < blocks, other=0)
                    lowest = tl.minimum(lowest, tl.load(seen + r * 4 + 2, mask=r < blocks, other=2**63 - 1))
                    highest = tl.maximum(highest, tl.load(seen + r * 4 + 3, mask=r < blocks, other=-1))
            if NAMED == 1:
                tl.store(dropped, tl.sum(lost, axis=0).to(tl.int32))
            else:
                least = tl.where(size == 0, -1, tl.min(lowest, axis=0))
                store_message(message, 0, size - tl.sum(outside, axis=0), least, tl.max(highest, axis=0), tokens, signature)


@jit
def _start_kernel(totals, starts, offsets, bins, align, BINS: tl.constexpr):
    """starts[b] and offsets[b]: where the keys b begin and end, in one program."""
    end = tl.full([], 0, tl.int32)
    for start in range(0, bins, BINS):
        b = start + tl.arange(0, BINS)
        room = (tl.load(totals + b, mask=b < bins, other=0) + align - 1) // align * align
        ends = end + tl.cumsum(room, axis=0)
        tl.store(starts + b, ends - room, mask=b < bins)
        tl.store(offsets + b, ends, mask=b < bins)
        end += tl.sum(room, axis=0)


@jit(varies=("size", "kept"))
def _place_kernel(
    keys, counts, totals, starts, order, position, offsets, size, kept, steps, bins, most, align,
    BOUNDED: tl.constexpr, FEW: tl.constexpr, SUB: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """A key's place: where its bin begins, and the equal keys in earlier blocks and earlier in its own, which are counted by comparing.

    Each program adds up the bins' sizes itself if they are FEW. Else starts[b] has where they begin.
    """
    block = tl.program_id(0).to(tl.int64)
    for step in range(steps):
        i = (block * steps + step) * SUB + tl.arange(0, SUB)
        key = _keys_of(keys, i, size, bins)
        place = tl.load(counts + block * bins + key, mask=key >= 0, other=0)
        if BOUNDED:
            place += key * most
        elif FEW:
            b = tl.arange(0, BINS)
            room = (tl.load(totals + b, mask=b < bins, other=0) + align - 1) // align * align
            ends = tl.cumsum(room, axis=0)
            place += tl.gather(ends - room, tl.maximum(key, 0), 0)
            if (block == 0) & (step == 0):
                tl.store(offsets + b, ends, mask=b < bins)
        else:
            place += tl.load(starts + key, mask=key >= 0, other=0)
        own = tl.arange(0, SUB)
        for other in range(step + 1):
            j = (block * steps + other) * SUB + own
            earlier = (own + other * SUB)[None, :] < (own + step * SUB)[:, None]
            place += tl.sum((earlier & (_keys_of(keys, j, size, bins)[None, :] == key[:, None])).to(tl.int32), axis=1)
        inside = key >= 0
        if BOUNDED:
            inside = inside & (place < (key + 1) * most)
        tl.store(position + i, tl.where(inside, place, -1), mask=i < size)
        tl.store(order + place, i.to(tl.int32), mask=inside & (place < kept))


def sort_triton(keys: Tensor, bins: int, size: int, padded: bool = False, align: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(size, align)
    order, position, offsets = sort_fake(keys, bins, size)
    launch(keys, order, position, offsets, bins, padded=padded, align=align)
    return order, position, offsets


def bounded_triton(keys: Tensor, bins: int, most: int) -> tuple[Tensor, Tensor]:
    order, position = bounded_fake(keys, bins, most)
    launch(keys, order, position, order, bins, padded=True, most=most)
    return order, position


def launch(
    keys: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    bins: int,
    *,
    padded: bool,
    most: int | None = None,
    align: int = 1,
    named: Tensor | None = None,
    dropped: Tensor | None = None,
    message: Tensor | None = None,
    signature: tuple[int, ...] = (0,),
) -> None:
    """Sort ``keys`` into order, position and offsets.

    With ``named``, the ids of the keys, count into ``dropped`` those whose keys are outside [0, bins), or write the ``message`` of
    `count_pairs.py` to this rank alone.
    """
    size, kept, keys = keys.numel(), order.shape[0], keys.contiguous()
    tile = max(64, block_of(bins, BINS))  # a warp of an AMD GPU has 64 threads, and tl.histogram at least a bin for each
    steps = max(1, block_of(bins, 2**14) >> 10)  # longer blocks have fewer histograms, and compare more keys with one another
    blocks = max(1, -(-size // (SUB * steps)))
    counts, totals = torch.empty((blocks, bins), dtype=torch.int32, device=keys.device), _empty(keys, bins)
    seen = totals if named is None else torch.empty((blocks, 4), dtype=torch.int64, device=keys.device)
    _histogram_kernel[(blocks,)](
        keys, keys if named is None else named.contiguous(), counts, seen, order, size, kept, -(-kept // blocks), bins,
        PADDED=padded, NAMED=named is not None, BLOCK=SUB * steps, BINS=tile, num_warps=2,
    )  # fmt: skip
    _scan_kernel[(-(-bins // 4),)](
        counts, totals, seen, totals if dropped is None else dropped, totals if message is None else message, blocks, bins, size,
        keys.shape[0], signature, NAMED=0 if named is None else 1 if message is None else 2, ROWS=1024, TILE=4,
    )  # fmt: skip
    few, starts = tile <= FEW or most is not None, totals
    if not few:
        starts = _empty(keys, bins)
        _start_kernel[(1,)](totals, starts, offsets, bins, align, BINS=BINS)
    _place_kernel[(blocks,)](
        keys, counts, totals, starts, order, position, offsets, size, kept, steps, bins, most or 0, align,
        BOUNDED=most is not None, FEW=few, SUB=SUB, BINS=min(tile, FEW), num_warps=1,
    )  # fmt: skip


def first_fake(order: Tensor, size: int) -> Tensor:
    return _empty(order, size)


def first_here(order: Tensor, size: int) -> Tensor:
    return order[:size].clone()


def check_rows(size: int, align: int) -> None:
    """Raise if int32 indices cannot number the rows. Only here a plan knows its rows with the padding of ``align``."""
    if size > MOST:
        wrong_value("align", align, f"less: with padding there are {size} rows, and int32 indices number at most {MOST}")


def _empty(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device=like.device)


counting_sort = define(SORT, sort_fake, sort_cpu, sort_triton)
bounded_sort = define(BOUNDED, bounded_fake, bounded_cpu, bounded_triton)
first = define(FIRST, first_fake, first_here, first_here)
