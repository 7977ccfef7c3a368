"""dispatch_wire: rows[n] = x[t], and combine_wire: y[t] = sum over t's rows n of weights[n] * rows[n], quantized on the wire.

Each costs (token, rank) pairs x (D + the scales') bytes on the wire, in the formats of `wire_formats.py`. ``wire`` is the format of the
forward, ``backward_wire`` that of the gradient. None is x's own dtype. In a group of one, rows are rounded as if they had been sent.
They are mirrors up to the weights, as in `dispatch_combine.py`. The rounding passes the gradient on unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.ops.base.library import call
from moecomm.ops.exchange.dispatch_combine import combine
from moecomm.ops.exchange.slices import define_function
from moecomm.ops.exchange.there_and_home import arrived, home, there
from moecomm.ops.rows.dequantize import dequantize, quantized_rows
from moecomm.ops.rows.gather import gather
from moecomm.ops.rows.weighted_sum import weighted_sum
from moecomm.ops.rows.weighted_sum_backward import weighted_sum_backward

# send_order and send_position are None in a group of one: nothing is sent, and S = R = T.
INDICES = "Tensor? send_order, Tensor? send_position, Tensor row_order, Tensor row_position, Tensor? splits, str group"
WIRES = "str? wire, str? backward_wire"


def _pairs(indices: tuple[Any, ...], group: str) -> tuple[Any, ...]:
    """The arguments that describe the (token, rank) pairs, among those of the ops below."""
    send_order, send_position, _, row_position, splits = indices
    return send_order, send_position, splits, row_position.shape[0], group


def _sum_home(rows: Tensor, weights: Tensor | None, indices: tuple[Any, ...], group: str, wire: str | None, back: str | None) -> Tensor:
    """The sum of each token over its rows: N -> R -> S -> T."""
    send_order, _, row_order, row_position, _ = indices
    if send_order is not None and wire is None:  # the sums are computed in the send buffer
        return call(combine, rows, weights, *indices, group)
    return call(home, call(weighted_sum, rows, weights, row_order, row_position), *_pairs(indices, group), wire, back)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *indices, group, wire, backward_wire = rest
        ctx.save_for_backward(*indices)
        ctx.rest = group, backward_wire, wire
        _, _, order, position, _ = indices
        pairs = arrived(x, _pairs(tuple(indices), group), wire)
        if wire is None:
            return call(gather, pairs, order, position)
        return call(dequantize, pairs, order, position.shape[1], x.shape[1], x.dtype, wire)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _sum_home(grad, None, ctx.saved_tensors, *ctx.rest), *(None,) * 8


class _DispatchQuantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Any:
        *indices, group, wire, backward_wire = rest
        ctx.save_for_backward(*indices)
        ctx.rest = group, backward_wire, wire
        _, _, order, position, _ = indices
        pairs = arrived(x, _pairs(tuple(indices), group), wire)
        data, scales = quantized_rows(pairs, order, position.shape[1], x.shape[1], wire)
        ctx.mark_non_differentiable(data, scales)
        return data, scales, x.new_zeros(1, 1).expand(data.shape)  # [N, D], [N, blocks], [N, D]

    @staticmethod
    def backward(ctx: Any, _: Any, __: Any, grad: Tensor) -> Any:
        return _sum_home(grad, None, ctx.saved_tensors, *ctx.rest), *(None,) * 8


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor | None, *rest: Any) -> Tensor:
        *indices, group, wire, backward_wire = rest
        ctx.save_for_backward(*indices, *(() if weights is None else (rows, weights)))
        ctx.rest = group, backward_wire, wire
        return _sum_home(rows, weights, tuple(indices), group, wire, backward_wire)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint gives each tensor one time
        indices, weighted = saved[:5], saved[5:]
        if not weighted:
            return call(dispatch_wire, grad, *indices, *ctx.rest), *(None,) * 9
        group, *wires = ctx.rest
        pairs = call(there, grad, *_pairs(indices, group), *wires)  # [R, D]
        return *call(weighted_sum_backward, pairs, *weighted, *indices[2:4]), *(None,) * 8


dispatch_wire = define_function(f"dispatch_wire(Tensor x, {INDICES}, {WIRES}) -> Tensor", _Dispatch)
dispatch_quantized = define_function(f"dispatch_quantized(Tensor x, {INDICES}, {WIRES}) -> (Tensor, Tensor, Tensor)", _DispatchQuantized)
combine_wire = define_function(f"combine_wire(Tensor rows, Tensor? weights, {INDICES}, {WIRES}) -> Tensor", _Combine)
