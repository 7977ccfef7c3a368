"""rows[n] = x[order[n] // K], and zeros where order[n] is -1.

Costs one read of T * D elements and one write of N * D: a GPU reads a token once and stores it to its places, position[m]. Where positions
are not at hand (`gather_rows_triton`), it reads N * D.
Its backward is its mirror, `weighted_sum` without weights: grad_x[m] = sum over j of grad[position[m, j]].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecomm.ops.base.library import UNROLLED, block_of, call, define, differentiable, jit, tl
from moecomm.ops.rows.weighted_sum import weighted_sum

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element in bytes
SCHEMA = "gather(Tensor x, Tensor order, Tensor position) -> Tensor"


def gather_fake(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def gather_cpu(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    return gather_rows_cpu(x, order, position.shape[1])


def gather_rows_cpu(x: Tensor, order: Tensor, k: int) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros(order.shape[0], x.shape[1])
    slots = order.numpy()
    source = torch.from_numpy((slots if k == 1 else slots // k).astype(np.int64))  # index_select is a tenth faster with it than with int32
    if slots.min(initial=0) >= 0:
        return x.index_select(0, source)
    rows = x.index_select(0, source.clamp_(min=0))
    rows.view(torch.uint8).masked_fill_((order < 0).unsqueeze(1), 0)  # as bytes, because not every dtype can be filled
    return rows


@jit(varies=("n",))
def _gather_kernel(x, order, rows, n, d, k, stride_m, stride_d, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(order + row, mask=row < n, other=-1)
    source = (pair // k).to(tl.int64)
    inside = (row < n)[:, None] & (col < d)[None, :]
    values = tl.load(x + source[:, None] * stride_m + col.to(tl.int64)[None, :] * stride_d, mask=inside & (pair >= 0)[:, None], other=0)
    tl.store(rows + row.to(tl.int64)[:, None] * d + col[None, :], values, mask=inside)


@jit(varies=("m", "n"))
def _spread_kernel(
    x, order, position, rows, m, n, d, stride_m, stride_d, K: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Each program stores ROWS tokens to their places. Of the rows ROWS * K it has as its share, it fills those that are padding."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (col < d)[None, :]
    values = tl.load(x + token[:, None] * stride_m + col.to(tl.int64)[None, :] * stride_d, mask=(token < m)[:, None] & inside, other=0)
    zeros = tl.zeros([ROWS, BLOCK], rows.dtype.element_ty)
    for first in range(0, K, GROUP):
        for j in tl.static_range(GROUP):
            slot, real = token * K + first + j, first + j < K  # the last group may have fewer
            place = tl.load(position + slot, mask=token < tl.where(real, m, 0), other=-1).to(tl.int64)
            tl.store(rows + place[:, None] * d + col[None, :], values, mask=(place >= 0)[:, None] & inside)
            pair = tl.load(order + slot, mask=slot < tl.where(real, n, 0), other=0)
            tl.store(rows + slot[:, None] * d + col[None, :], zeros, mask=(pair < 0)[:, None] & inside)


def gather_triton(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    n, d, (m, k) = order.shape[0], x.shape[1], position.shape
    rows = x.new_empty(n, d)
    if n and d:
        source, out = _bits(x), _bits(rows)
        width = out.shape[1]
        block = block_of(width, 8192 // out.itemsize)  # bfloat16 on an H100, in copies: 0.614 to 0.623; blocks of 1024 0.63
        height = max(1, 1024 // block)
        _spread_kernel[(-(-max(m, -(-n // k)) // height), -(-width // block))](
            source, order.contiguous(), position.contiguous(), out, m, n, width, *source.stride(),
            K=k, GROUP=min(k, UNROLLED), ROWS=height, BLOCK=block,
        )  # fmt: skip
    return rows


def _bits(x: Tensor) -> Tensor:
    """x as integers of the same size: Triton lacks some dtypes, and cannot load others with a mask."""
    return (x if x.itemsize <= 8 else x.contiguous()).view(BITS[min(x.itemsize, 8)])


def gather_rows_triton(x: Tensor, order: Tensor, k: int) -> Tensor:
    n, d = order.shape[0], x.shape[1]
    rows = x.new_empty(n, d)
    if n and d:
        source, out = _bits(x), _bits(rows)
        width = out.shape[1]
        block = block_of(width, 1024)
        height = max(1, 2048 // block)
        grid = (-(-n // height), -(-width // block))
        _gather_kernel[grid](source, order.contiguous(), out, n, width, k, *source.stride(), ROWS=height, BLOCK=block)
    return rows


gather = define(SCHEMA, gather_fake, gather_cpu, gather_triton)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    order, position = ctx.saved_tensors
    return call(weighted_sum, grad, None, order, position), None, None


differentiable(gather, _save, _backward)
