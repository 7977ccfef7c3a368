"""message[i] = the slots of pair order[i] as bytes: its token's K weights, then K local expert ids, -1 if the expert is on another rank.

Costs K * (weight + 1, 2 or 4 bytes of id) bytes per (token, rank) pair. A padding pair, of order -1, has ids -1 and weights 0.
`slots.py` and `slots_with_counts.py` send it. `slots.py` has the backward.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moecomm.ops.base.library import block_of, define, jit, tl
from moecomm.ops.routing.counting_sort import MOST

UNPACK = "unpack_slots(Tensor message, int k, int local, ScalarType dtype) -> (Tensor, Tensor)"


def _id_dtype(local: int) -> torch.dtype:
    """The narrowest dtype that holds a local expert id."""
    return torch.int8 if local <= 2**7 else torch.int16 if local <= 2**15 else torch.int32


def _id_name(local: int) -> str:
    """The same dtype, as numpy names it."""
    return f"int{8 * _id_dtype(local).itemsize}"


def width_of(k: int, local: int, dtype: torch.dtype) -> int:
    """The bytes per pair."""
    return k * (dtype.itemsize + _id_dtype(local).itemsize)


def _bytes(weights: Tensor) -> Tensor:
    """The weights as bytes: [T, bytes of K weights].

    An empty tensor is contiguous with any strides, but `view` accepts only certain strides.
    """
    return (
        weights.view(torch.uint8)
        if weights.stride() == (weights.shape[1], 1)
        else weights.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    )


def message_fake(experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, local: int, padded: bool) -> Tensor:
    return weights.new_empty(order.shape[0], width_of(experts.shape[1], local, weights.dtype), dtype=torch.uint8)


def message_cpu(experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, local: int, padded: bool) -> Tensor:
    """The bytes to send, one row per pair."""
    message = message_fake(experts, weights, keys, order, local, padded)
    k, split = experts.shape[1], experts.shape[1] * weights.itemsize
    pair, out = order.numpy(), message.numpy()
    if experts.shape[0] == 0:
        pair = pair[:0]  # without tokens, every pair is padding
    token = pair // k
    first = keys.flatten().numpy()[pair] * local  # [S]: the first expert of the pair's destination rank
    ids = experts.numpy().astype(np.int32).take(token, axis=0) - first[:, None]  # [S, K]; take is several times faster than [token]
    ids |= -((ids < 0) | (ids >= local)).astype(np.int32)  # all bits set: -1
    out[: pair.size, :split] = _bytes(weights).numpy().take(token, axis=0)
    out[: pair.size, split:] = ids.astype(_id_name(local)).view(np.uint8)
    if padded:
        padding = order.numpy() < 0
        out[padding, :split] = 0
        out[padding, split:] = 255  # ids of -1
    return message


@jit(varies=("pairs",))
def _pack_kernel(
    experts, weights, keys, order, message, pairs, local, stride_t, stride_k, stride_w,
    SLOTS_A_TOKEN: tl.constexpr, WEIGHTS: tl.constexpr, ID: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy byte by byte: a row and its ids may start at any byte, without alignment.

    A row has WEIGHTS bytes of weights, then ID bytes per id.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = tl.arange(0, WIDTH)
    pair = tl.load(order + row, mask=row < pairs, other=-1).to(tl.int64)
    here = (pair >= 0)[:, None]
    token = pair // SLOTS_A_TOKEN
    first = tl.load(keys + pair, mask=pair >= 0, other=0).to(tl.int64) * local
    j = (byte - WEIGHTS) // ID
    is_id = (byte >= WEIGHTS) & (j < SLOTS_A_TOKEN)
    ids = tl.load(experts + token[:, None] * stride_t + j[None, :] * stride_k, mask=here & is_id[None, :], other=-1).to(tl.int64)
    ids = tl.where(here, ids - first[:, None], -1)
    ids = tl.where((ids >= 0) & (ids < local), ids, -1) >> (8 * ((byte - WEIGHTS) % ID))[None, :]
    factors = tl.load(weights + token[:, None] * stride_w + byte[None, :], mask=here & (byte < WEIGHTS)[None, :], other=0)
    inside = (row < pairs)[:, None] & ((byte < WEIGHTS) | is_id)[None, :]
    width = WEIGHTS + SLOTS_A_TOKEN * ID
    tl.store(
        message + row[:, None] * width + byte[None, :], tl.where(is_id[None, :], ids & 255, factors.to(tl.int64)).to(tl.uint8), mask=inside
    )


def message_triton(experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, local: int, padded: bool) -> Tensor:
    message = message_fake(experts, weights, keys, order, local, padded)
    pairs, width = message.shape
    if pairs:
        columns = block_of(width, MOST)
        rows = max(1, 2048 // columns)
        factors = _bytes(weights)
        _pack_kernel[(-(-pairs // rows),)](
            experts, factors, keys.contiguous(), order.contiguous(), message, pairs, local, *experts.stride(), factors.stride(0),
            SLOTS_A_TOKEN=experts.shape[1], WEIGHTS=factors.shape[1], ID=_id_dtype(local).itemsize, ROWS=rows, WIDTH=columns,
        )  # fmt: skip
    return message


def unpack_fake(message: Tensor, k: int, local: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return message.new_empty(message.shape[0], k, dtype=torch.int32), message.new_empty(message.shape[0], k, dtype=dtype)


def unpack_cpu(message: Tensor, k: int, local: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ids, there = unpack_fake(message, k, local, dtype)
    split = k * dtype.itemsize
    there.view(torch.uint8).numpy()[:] = message.numpy()[:, :split]
    ids.numpy()[:] = np.ascontiguousarray(message.numpy()[:, split:]).view(_id_name(local))
    return ids, there


@jit(varies=("pairs",))
def _unpack_kernel(
    message, ids, weights, pairs,
    SLOTS_A_TOKEN: tl.constexpr, WEIGHTS: tl.constexpr, ID: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    byte, j = tl.arange(0, WIDTH)[None, :], tl.arange(0, K)[None, :]
    width = WEIGHTS + SLOTS_A_TOKEN * ID
    mine = (row < pairs) & (byte < WEIGHTS)
    tl.store(weights + row * WEIGHTS + byte, tl.load(message + row * width + byte, mask=mine, other=0), mask=mine)
    inside = (row < pairs) & (j < SLOTS_A_TOKEN)
    value = tl.zeros([ROWS, K], tl.int32)
    for b in tl.static_range(ID):
        value += tl.load(message + row * width + WEIGHTS + j * ID + b, mask=inside, other=0).to(tl.int32) << (8 * b)
    if ID < 4:
        value = tl.where(value >> (8 * ID - 1) > 0, value - (1 << (8 * ID)), value)  # restore the sign
    tl.store(ids + row * SLOTS_A_TOKEN + j, value, mask=inside)


def unpack_triton(message: Tensor, k: int, local: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ids, there = unpack_fake(message, k, local, dtype)
    pairs = message.shape[0]
    if pairs:
        weights = k * dtype.itemsize
        columns = block_of(weights, MOST)
        rows = max(1, 2048 // columns)
        _unpack_kernel[(-(-pairs // rows),)](
            message.contiguous(), ids, there.view(torch.uint8), pairs, SLOTS_A_TOKEN=k, WEIGHTS=weights, ID=_id_dtype(local).itemsize,
            ROWS=rows, K=1 << (k - 1).bit_length(), WIDTH=columns,
        )  # fmt: skip
    return ids, there


unpack_slots = define(UNPACK, unpack_fake, unpack_cpu, unpack_triton)
