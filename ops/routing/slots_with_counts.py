"""message[p] = the slots of all pairs for rank p, in the format of `slot_bytes.py`, if those for each rank fit in ROOM words; else zeros.

order and ends are those of `counting_sort` of the keys by rank. Costs ROOM words per rank. It travels with the counts: a plan with few
slots per rank then needs one exchange instead of two. Such plans have few tokens, or very many ranks.
No backward: integers and bytes.

The first word says whether all slots of this rank are in its messages. `plan_sizes` reads it with the counts. If it is set on every rank,
`slots.py` takes the slots from the received messages and sends nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moecomm.ops.base.library import define, jit, tl
from moecomm.ops.base.signature import PAIRS, ROOM, WIDTH
from moecomm.ops.routing.slot_bytes import message_cpu, message_triton, width_of

SCHEMA = "few_slots(Tensor experts, Tensor weights, Tensor keys, Tensor order, Tensor ends, int local) -> Tensor"
WORD = 8  # bytes
FIRST = (WIDTH + 1) * WORD  # the byte of a whole message at which the slots begin
RANKS, BLOCK = 256, 1024  # per program of the kernel: counts added up at a time, and bytes copied


def most_pairs(width: int) -> int:
    """How many pairs of ``width`` bytes fit in the message to one rank."""
    return (ROOM - 1) * WORD // width


def few_fake(experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, ends: Tensor, local: int) -> Tensor:
    return torch.empty(ends.shape[0], ROOM, dtype=torch.int64, device=experts.device)


def few_cpu(experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, ends: Tensor, local: int) -> Tensor:
    few = few_fake(experts, weights, keys, order, ends, local)
    words, width, to = few.numpy(), width_of(experts.shape[1], local, weights.dtype), ends.numpy().tolist()
    words.fill(0)
    starts = [0, *to[:-1]]
    if max(end - start for start, end in zip(starts, to, strict=True)) <= most_pairs(width):
        pairs = message_cpu(experts, weights, keys, order[: to[-1]], local, False).numpy().ravel()
        for room, start, end in zip(words.view(np.uint8)[:, WORD:], starts, to, strict=True):
            room[: (end - start) * width] = pairs[start * width : end * width]
        words[:, 0] = 1
    return few


def take_cpu(messages: Tensor, splits: Tensor, width: int) -> Tensor:
    """[R, width]: the received slots, from the rows of each rank."""
    rooms, counts = messages.numpy().view(np.uint8)[:, FIRST:], splits.numpy()[1].tolist()
    return torch.from_numpy(np.concatenate([room[: count * width] for room, count in zip(rooms, counts, strict=True)]).reshape(-1, width))


@jit
def _copy_kernel(
    rooms, rows, counts, fits, ranks, stride, stride_count, most, width,
    ENDS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the rows of rank p between ``rows`` and its room in the message.

    With ENDS: from rows to the room; counts are the ends of each rank's rows. Without ENDS: from the room to rows.
    """
    p = tl.program_id(0)
    first, here, largest = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for start in range(0, ranks, RANKS):
        q = start + tl.arange(0, RANKS)
        count = tl.load(counts + q.to(tl.int64) * stride_count, mask=q < ranks, other=0).to(tl.int64)
        if ENDS:
            count -= tl.load(counts + q.to(tl.int64) * stride_count - stride_count, mask=(q > 0) & (q < ranks), other=0).to(tl.int64)
        first += tl.sum(tl.where(q < p, count, 0), axis=0)
        here += tl.sum(tl.where(q == p, count, 0), axis=0)
        largest = tl.maximum(largest, tl.max(count, axis=0))
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < tl.minimum(here, most) * width
    room = rooms + p.to(tl.int64) * stride + byte
    if ENDS:
        tl.store(room, tl.load(rows + first * width + byte, mask=inside, other=0), mask=inside)
        tl.store(fits + p.to(tl.int64) * (stride // 8), (largest <= most).to(tl.int64), mask=tl.program_id(1) == 0)
    else:
        tl.store(rows + first * width + byte, tl.load(room, mask=inside, other=0), mask=inside)


def few_triton(experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, ends: Tensor, local: int) -> Tensor:
    few = few_fake(experts, weights, keys, order, ends, local).zero_()
    (tokens, k), ranks = experts.shape, ends.shape[0]
    most = most_pairs(width_of(k, local, weights.dtype))
    # The slots would not fit even if evenly spread over the ranks. Only the device knows the true counts, so do not try.
    if tokens * min(k, ranks) > ranks * most:
        return few
    pairs = message_triton(experts, weights, keys, order, local, True)  # [T * min(K, P), bytes]
    _launch(few.view(torch.uint8)[:, WORD:], pairs, ends, few, most, True)
    return few


def take_triton(messages: Tensor, received: int, width: int) -> Tensor:
    pairs = torch.empty(received, width, dtype=torch.uint8, device=messages.device)
    _launch(messages.view(torch.uint8)[:, FIRST:], pairs, messages[:, PAIRS], messages, most_pairs(width), False)
    return pairs


def _launch(rooms: Tensor, rows: Tensor, counts: Tensor, fits: Tensor, most: int, ends: bool) -> None:
    ranks, width = rooms.shape[0], rows.shape[1]
    _copy_kernel[(ranks, max(1, -(-most * width // BLOCK)))](
        rooms, rows, counts, fits, ranks, rooms.stride(0), counts.stride(0), most, width, ENDS=ends, RANKS=RANKS, BLOCK=BLOCK
    )


few_slots = define(SCHEMA, few_fake, few_cpu, few_triton)
