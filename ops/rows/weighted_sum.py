"""y[m] = sum over j of weights[m, j] * rows[position[m, j]], in the order of j, where position[m, j] is not -1.

Costs one read of N * D elements and one write of M * D. Accumulates in float32 (float64 for float64); weights keep their own precision,
on CPUs to 2^-16 where the rows have less than float32.
Its backward is the op `weighted_sum_backward`. Without weights it is the mirror of `gather`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecomm.ops.base.library import UNROLLED, block_of, call, compute_dtype, define, differentiable, jit, tl
from moecomm.ops.rows.weighted_sum_backward import STEP, weighted_sum_backward

SCHEMA = "weighted_sum(Tensor rows, Tensor? weights, Tensor order, Tensor position) -> Tensor"


def weighted_sum_fake(rows: Tensor, weights: Tensor | None, order: Tensor, position: Tensor) -> Tensor:
    return rows.new_empty(position.shape[0], rows.shape[1])


def weighted_sum_cpu(rows: Tensor, weights: Tensor | None, order: Tensor, position: Tensor) -> Tensor:
    m, k = position.shape
    if rows.numel() == 0 or m == 0:
        return rows.new_zeros(m, rows.shape[1])
    # In low precision a weight's rounding error follows as one more entry of the bag, with the same row, which is in the cache by then.
    parts = 2 if weights is not None and weights.dtype != rows.dtype and rows.dtype.itemsize < 4 else 1
    bags, starts, exact = _bags(position, weights)
    if parts == 2:
        starts = starts * 2
    factors = None if exact is None else exact.to(rows.dtype)  # embedding_bag accepts only the rows' dtype
    if exact is not None and factors is not None and parts == 2:
        bags, factors = torch.stack((bags, bags), 1).flatten(), torch.stack((factors, (exact - factors).to(rows.dtype)), 1).flatten()
    y = torch.embedding_bag(rows, bags, starts, mode=0, per_sample_weights=factors, include_last_offset=True)[0]  # mode 0 is the sum
    if weights is not None and exact is not None and parts == 2 and not in_two_parts_cpu(exact, rows.dtype):
        sum_again_cpu(y, rows, weights, position)
    return y


def _bags(position: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rows, starts, weights): the rows of token 0, then of token 1, ..., where those of each token start, and their weights."""
    (m, k), places = position.shape, position.numpy().ravel()
    exact = None if weights is None else weights.flatten()
    starts = np.arange(0, m * k + 1, k, dtype=np.int32)
    if places.min() >= 0:
        return position.flatten(), torch.from_numpy(starts), exact
    slots = np.flatnonzero(places >= 0)
    starts = slots.searchsorted(starts).astype(np.int32)  # embedding_bag converts indices and starts of two dtypes
    if exact is not None:
        exact = exact.index_select(0, torch.from_numpy(slots))
    return torch.from_numpy(places[slots]), torch.from_numpy(starts), exact


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest size of a weight of which two numbers of the dtype hold 16 bits.

    In float16 these are 2^-9 and 65504, in bfloat16 2^-118 and its largest number.
    """
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps * 2**15, info.max


def in_two_parts_cpu(weights: Tensor, dtype: torch.dtype) -> bool:
    """Whether two numbers of the dtype hold each weight."""
    least, most = limits(dtype)
    sizes = weights.abs()
    low, high = (bound.item() for bound in sizes.aminmax()) if sizes.numel() else (most, most)
    if low < least:
        low = sizes.masked_fill_(sizes == 0, most).amin().item()
    return low >= least and high <= most


def sum_again_cpu(y: Tensor, rows: Tensor, weights: Tensor, position: Tensor) -> None:
    """Write the sums of those tokens again that have a weight which two numbers of the rows' dtype do not hold."""
    least, most = limits(rows.dtype)
    sizes = weights.abs()
    held = ((sizes >= least) & (sizes <= most)) | (sizes == 0)  # a NaN is not held
    tokens = (~held & (position >= 0)).any(1).nonzero().squeeze(1)
    for some in tokens.split(max(1, STEP // rows.shape[1])):
        total = rows.new_zeros(some.shape[0], rows.shape[1], dtype=torch.promote_types(weights.dtype, torch.float32))
        for index, weight in zip(position[some].unbind(1), weights[some].unbind(1), strict=True):
            terms = rows.index_select(0, index.clamp(min=0)) * weight.to(total.dtype).unsqueeze(1)
            total += terms.masked_fill_((index < 0).unsqueeze(1), 0)
        y[some] = total.to(y.dtype)


@jit(varies=("m",))
def _weighted_sum_kernel(
    rows, weights, position, y, m, d, stride_n, stride_d, stride_m, stride_k,
    K: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], ACC)
    for first in range(0, K, GROUP):
        for j in tl.static_range(GROUP):
            slot = first + j
            source = tl.load(position + row * K + slot, mask=row < tl.where(slot < K, m, 0), other=-1).to(tl.int64)
            here = (source >= 0)[:, None] & (col < d)[None, :]
            values = tl.load(rows + source[:, None] * stride_n + col.to(tl.int64)[None, :] * stride_d, mask=here, other=0).to(ACC)
            if WEIGHTED:
                weight = tl.load(weights + row * stride_m + slot * stride_k, mask=source >= 0, other=0).to(ACC)
                values = values * weight[:, None]
            total += values
    inside = (row < m)[:, None] & (col < d)[None, :]
    tl.store(y + row[:, None] * d + col[None, :], total.to(y.dtype.element_ty), mask=inside)


def weighted_sum_triton(rows: Tensor, weights: Tensor | None, order: Tensor, position: Tensor) -> Tensor:
    (m, k), d = position.shape, rows.shape[1]
    y = rows.new_empty(m, d)
    if m and d:
        block = block_of(d, 4096 // rows.itemsize)  # bfloat16 on an H100, in copies: 0.583; blocks of 512 0.593
        height = max(1, 1024 // block)
        strides = (0, 0) if weights is None else weights.stride()
        _weighted_sum_kernel[(-(-m // height), -(-d // block))](
            rows, rows if weights is None else weights, position.contiguous(), y, m, d, *rows.stride(), *strides,
            K=k, GROUP=min(k, UNROLLED), WEIGHTED=weights is not None, ACC=compute_dtype(rows.dtype), ROWS=height, BLOCK=block,
        )  # fmt: skip
    return y


weighted_sum = define(SCHEMA, weighted_sum_fake, weighted_sum_cpu, weighted_sum_triton)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, order, position = inputs
    ctx.shape = rows.shape
    # Only the gradient of the weights needs rows. Without weights the backward is a gather.
    ctx.save_for_backward(*((order, position) if weights is None else (order, position, rows, weights)))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    order, position, *weighted = ctx.saved_tensors
    if weighted:
        grad_rows, grad_weights = call(weighted_sum_backward, grad, weighted[0], weighted[1], order, position)
        return grad_rows, grad_weights, None, None
    from moecomm.ops.rows.gather import gather  # the mirror imports this file

    return call(gather, grad, order, position), None, None, None


differentiable(weighted_sum, _save, _backward)
