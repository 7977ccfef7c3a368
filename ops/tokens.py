"""dispatch: rows[n] = x[t], and combine: y[t] = sum over t's rows n of weights[n] * rows[n], for tokens that live on other ranks.

Costs (token, rank) pairs x D elements on the wire for each, once forward and once backward, and a read and a write of S, R and N rows.
Each is the other's mirror, up to the weights: dispatch's backward is the unweighted combine, combine's the dispatch of the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moecomm.ops.exchange import combine_exchange, dispatch_exchange, wait
from moecomm.ops.gather import gather
from moecomm.ops.library import LIBRARY
from moecomm.ops.weighted_sum import weighted_sum
from moecomm.ops.weighted_sum_backward import weighted_sum_backward

INDICES = "Tensor send_order, Tensor send_position, Tensor row_order, Tensor row_position, Tensor? splits, str group"
DISPATCH = f"dispatch(Tensor x, {INDICES}) -> Tensor"
COMBINE = f"combine(Tensor rows, Tensor weights, {INDICES}) -> Tensor"


def _there(x: Tensor, indices: tuple[Any, ...], group: str) -> Tensor:
    """Each received pair's row of x: T -> S -> R."""
    send_order, send_position, _, row_position, splits = indices
    return wait(dispatch_exchange(x, send_order, send_position.shape[1], splits, row_position.shape[0], group))


def _back(rows: Tensor, weights: Tensor | None, indices: tuple[Any, ...], group: str) -> Tensor:
    """Each token's sum over its rows: N -> R -> S -> T."""
    send_order, send_position, row_order, row_position, splits = indices
    sums = wait(combine_exchange(rows, weights, row_order, row_position, splits, send_order.shape[0], group))  # [S, D]
    return weighted_sum(sums, None, send_order, send_position)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *indices, ctx.group = rest
        ctx.save_for_backward(*indices)
        return gather(_there(x, tuple(indices), ctx.group), indices[2], indices[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _back(grad, None, ctx.saved_tensors, ctx.group), *(None,) * 6


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        *indices, ctx.group = rest
        ctx.save_for_backward(rows, weights, *indices)
        return _back(rows, weights, tuple(indices), ctx.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weights, *indices = ctx.saved_tensors
        there = _there(grad, tuple(indices), ctx.group)  # [R, D]
        return *weighted_sum_backward(there, rows, weights, indices[2], indices[3]), *(None,) * 6


def _dispatch(*args: Any) -> Tensor:
    return _Dispatch.apply(*args)


def _combine(*args: Any) -> Tensor:
    return _Combine.apply(*args)


for _schema, _function in ((DISPATCH, _dispatch), (COMBINE, _combine)):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_schema[: _schema.index("(")], _function, "CompositeImplicitAutograd")
dispatch = torch.ops.moecomm.dispatch.default
combine = torch.ops.moecomm.combine.default
