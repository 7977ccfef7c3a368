"""grad_rows[n] = weights[m, j] * grad[m] and grad_weights[m, j] = <grad[m], rows[n]>, for the pair (m, j) = order[n].

Costs one read of rows [N, D], one write of N * D; a GPU reads grad [M, D] once, the CPU reads a row of it N times. Dot products accumulate
in float32 (float64 for float64). Rows of padding, and slots without a row, have the gradient zero.
It is the backward of `weighted_sum`. Its own backward, for second derivatives, uses both ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecomm.ops.base.library import UNROLLED, block_of, call, compute_dtype, define, differentiable, jit, tl

STEP = 2**20  # the elements that the CPU takes at a time, so that they stay in the cache
SCHEMA = "weighted_sum_backward(Tensor grad, Tensor rows, Tensor weights, Tensor order, Tensor position) -> (Tensor, Tensor)"


def backward_fake(grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def backward_cpu(grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    from moecomm.ops.rows.weighted_sum import weighted_sum_cpu  # this file is its backward

    grad_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    if order.shape[0] == 0 or grad.numel() == 0:
        return rows.new_zeros(rows.shape), grad_weights
    pairs = order.long()  # [N]; -1 for padding
    source = torch.div(pairs, position.shape[1], rounding_mode="floor")
    factors = weights.flatten().index_select(0, pairs.clamp(min=0)).unsqueeze(1)  # [N, 1]
    grad_rows = weighted_sum_cpu(grad, factors, order, source.unsqueeze(1))  # a gather that multiplies while it reads
    if rows.dtype.itemsize >= 4:
        places = position.numpy().ravel()
        slots = np.flatnonzero(places >= 0)
        slot, token = torch.from_numpy(slots), torch.from_numpy(slots // position.shape[1])
        here = torch.from_numpy(places[slots].astype(np.int64))
        # The gradient of the weights of embedding_bags of one row each. It needs no gather, but rounds to the rows' dtype.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, rows, here, token.new_zeros(1), token, 0)
        grad_weights.view(-1).index_copy_(0, slot, dots.to(weights.dtype))
        return grad_rows, grad_weights
    dots = rows.new_empty(order.shape[0], dtype=torch.float32)
    step = min(rows.shape[0], max(1, STEP // rows.shape[1]))  # rows per step
    copies = rows.new_empty(step, rows.shape[1])
    for start in range(0, order.shape[0], step):
        part = slice(start, start + step)
        here = copies[: rows[part].shape[0]]
        torch.index_select(grad, 0, source[part].clamp_(min=0), out=here)
        dots[part] = row_dots(rows[part], here)
    present = order >= 0
    grad_weights.view(-1).index_copy_(0, pairs.masked_select(present), dots.masked_select(present).to(weights.dtype))
    return grad_rows, grad_weights


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """[n]: the dot products a[i] . b[i] of low-precision rows, in float32.

    It calls the backward of a group norm, with one group and n channels: the gradient of gamma is these dot products. No other
    call of ATen reads each row once, without conversion, and sums in float32 (torch 2.13). For bfloat16 rows of 1024 it takes
    0.9 of the time of a copy; `(a.float() * b).sum(1)` takes 5 times that of a copy.
    """
    n, d = a.shape
    dtype = torch.float32
    mean, scale, gamma = a.new_zeros(1, 1, dtype=dtype), a.new_ones(1, 1, dtype=dtype), a.new_ones(n, dtype=dtype)
    a, b = a.contiguous(), b.contiguous()  # the op assumes contiguous inputs
    return torch.ops.aten.native_group_norm_backward(a, b, mean, scale, gamma, 1, n, d, 1, [False, True, False])[1]


@jit(varies=("m", "n"))
def _backward_kernel(
    grad, rows, weights, order, position, grad_rows, grad_weights, m, n, d,
    stride_gm, stride_gd, stride_n, stride_d, stride_m, stride_k,
    K: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program has one token. Of the K rows it has as its share, it fills those that are padding."""
    token = tl.program_id(0).to(tl.int64)
    width = tl.where(token < m, d, 0)
    for first in range(0, K, GROUP):
        j = first + tl.arange(0, GROUP)
        slot = token * K + j
        real = (slot < m * K) & (j < K)
        place = tl.load(position + slot, mask=real, other=-1).to(tl.int64)
        here = place >= 0
        padding = tl.load(order + slot, mask=(slot < n) & (j < K), other=0) < 0
        weight = tl.load(weights + token * stride_m + j * stride_k, mask=here, other=0).to(ACC)
        dot = tl.zeros([GROUP], ACC)
        for start in range(0, d, BLOCK):
            col = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = col < d
            g = tl.load(grad + token * stride_gm + col * stride_gd, mask=col < width, other=0).to(ACC)[None, :]
            mask = here[:, None] & inside[None, :]
            row = tl.load(rows + place[:, None] * stride_n + col[None, :] * stride_d, mask=mask, other=0).to(ACC)
            tl.store(grad_rows + place[:, None] * d + col[None, :], (weight[:, None] * g).to(grad_rows.dtype.element_ty), mask=mask)
            zeros = tl.zeros([GROUP, BLOCK], grad_rows.dtype.element_ty)
            tl.store(grad_rows + slot[:, None] * d + col[None, :], zeros, mask=padding[:, None] & inside[None, :])
            dot += tl.sum(row * g, axis=1)
        tl.store(grad_weights + slot, tl.where(here, dot, 0).to(grad_weights.dtype.element_ty), mask=real)


def backward_triton(grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    (n, d), (m, k) = rows.shape, weights.shape
    grad_rows, grad_weights = rows.new_empty(n, d), weights.new_empty(m, k)
    programs = max(m, -(-n // k))
    if programs:
        group = 1 << (min(k, UNROLLED) - 1).bit_length()
        block = block_of(d, min(2048, 16384 // (group * rows.itemsize)))
        _backward_kernel[(programs,)](
            grad, rows, weights, order.contiguous(), position.contiguous(), grad_rows, grad_weights, m, n, d,
            *grad.stride(), *rows.stride(), *weights.stride(), K=k, GROUP=group, ACC=compute_dtype(rows.dtype), BLOCK=block,
            num_warps=4,  # bfloat16 on an H100, in copies: 1.12; with 8 warps 1.27, with 16 1.32
        )  # fmt: skip
    return grad_rows, grad_weights


weighted_sum_backward = define(SCHEMA, backward_fake, backward_cpu, backward_triton)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    from moecomm.ops.rows.weighted_sum import weighted_sum  # this file is its backward

    grad, rows, weights, order, position = ctx.saved_tensors
    to_grad = call(weighted_sum, grad_rows, weights, order, position) + call(weighted_sum, rows, grad_weights, order, position)
    return to_grad, *call(weighted_sum_backward, grad, grad_rows, grad_weights, order, position), None, None


differentiable(weighted_sum_backward, _save, _backward)
