"""dispatch: rows[n] = x[t], and combine: y[t] = sum over t's rows n of weights[n] * rows[n], for tokens that live on other ranks.

Each costs (token, rank) pairs x D elements on the wire, once forward and once backward, and a read and a write of S, R and N rows.
They are mirrors up to the weights: dispatch's backward is combine without weights, combine's backward is dispatch of the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.ops.base.library import call
from moecomm.ops.exchange.all_to_all import combine_exchange, dispatch_exchange
from moecomm.ops.exchange.collectives import wait
from moecomm.ops.exchange.slices import define_function
from moecomm.ops.exchange.there_and_home import there
from moecomm.ops.rows.gather import gather
from moecomm.ops.rows.weighted_sum import weighted_sum
from moecomm.ops.rows.weighted_sum_backward import weighted_sum_backward

INDICES = "Tensor send_order, Tensor send_position, Tensor row_order, Tensor row_position, Tensor? splits, str group"
DISPATCH = f"dispatch(Tensor x, {INDICES}) -> Tensor"
COMBINE = f"combine(Tensor rows, Tensor? weights, {INDICES}) -> Tensor"


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *indices, ctx.group = rest
        ctx.save_for_backward(*indices)
        send_order, send_position, row_order, row_position, splits = indices
        received = call(dispatch_exchange, x, send_order, send_position.shape[1], splits, row_position.shape[0], ctx.group)
        return call(gather, wait(received), row_order, row_position)  # T -> S -> R -> N

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return call(combine, grad, None, *ctx.saved_tensors, ctx.group), *(None,) * 6


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor | None, *rest: Any) -> Tensor:
        *indices, ctx.group = rest
        ctx.save_for_backward(*indices, *(() if weights is None else (rows, weights)))
        send_order, send_position, row_order, row_position, splits = indices
        sums = call(combine_exchange, rows, weights, row_order, row_position, splits, send_order.shape[0], ctx.group)
        return call(weighted_sum, wait(sums), None, send_order, send_position)  # N -> R -> S -> T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint gives each tensor one time
        send_order, send_position, row_order, row_position, splits, *weighted = saved
        if not weighted:
            return call(dispatch, grad, *saved, ctx.group), *(None,) * 7
        pairs = call(there, grad, send_order, send_position, splits, row_position.shape[0], ctx.group, None, None)  # [R, D]
        return *call(weighted_sum_backward, pairs, *weighted, row_order, row_position), *(None,) * 6


dispatch = define_function(DISPATCH, _Dispatch)
combine = define_function(COMBINE, _Combine)
