"""dispatch_wire: rows[n] = x[t], and combine_wire: y[t] = sum over t's rows n of weights[n] * rows[n], quantised while they travel.

Costs (token, rank) pairs x (D + the scales') bytes on the wire for each, in the formats of `wire.py`: ``wire`` is the forward's,
``backward_wire`` the gradient's, either may be None, which is x's own dtype. In a group of one rows are rounded as if they had travelled.
Each is the other's mirror, up to the weights, as in `tokens.py`: the gradient passes the rounding as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.ops.dequantize import dequantize, quantized_rows
from moecomm.ops.exchange import dispatch_exchange, return_exchange, wait
from moecomm.ops.gather import gather
from moecomm.ops.quantize import quantize
from moecomm.ops.slice import define_function
from moecomm.ops.tokens import combine
from moecomm.ops.weighted_sum import weighted_sum
from moecomm.ops.weighted_sum_backward import weighted_sum_backward
from moecomm.ops.wire_exchange import wire_exchange

# Without send_order and send_position it is a group of one: nothing is sent, and S = R = T.
INDICES = "Tensor? send_order, Tensor? send_position, Tensor row_order, Tensor row_position, Tensor? splits, str group"
PAIRS = "Tensor? send_order, Tensor? send_position, Tensor? splits, SymInt received, str group"
WIRES = "str? wire, str? backward_wire"


def _there(x: Tensor, pairs: tuple[Any, ...], wire: str | None) -> Tensor:
    """What arrives of each pair's token, T -> S -> R: [R, D], or with a wire its bytes."""
    order, position, splits, received, group = pairs
    if order is None:
        return x.clone() if wire is None else quantize(x, None, 1, wire)
    if wire is None:
        return wait(dispatch_exchange(x, order, position.shape[1], splits, received, group))
    return wait(wire_exchange(x, order, position.shape[1], wire, 0, splits, received, group))


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *indices, received, group, wire, backward_wire = rest
        ctx.save_for_backward(*indices)
        ctx.rest = received, group, backward_wire, wire
        arrived = _there(x, (*indices, received, group), wire)
        return arrived if wire is None else dequantize(arrived, None, 1, x.shape[1], x.dtype, wire)  # [R, D]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.ops.moecomm.pairs_home_wire(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 7


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor, *rest: Any) -> Tensor:
        *indices, received, group, wire, backward_wire = rest
        ctx.save_for_backward(*indices)
        ctx.rest = received, group, backward_wire, wire
        order, position, splits = indices
        if order is None:
            home = pairs.clone() if wire is None else quantize(pairs, None, 1, wire)
        elif wire is None:
            home = wait(return_exchange(pairs, splits, order.shape[0], group))
        else:
            home = wait(wire_exchange(pairs, None, 1, wire, 1, splits, order.shape[0], group))
        if wire is not None:
            home = dequantize(home, None, 1, pairs.shape[1], pairs.dtype, wire)  # [S, D]
        return home if order is None else weighted_sum(home, None, order, position)  # [T, D]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.ops.moecomm.pairs_there_wire(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 7


pairs_there = define_function(f"pairs_there_wire(Tensor x, {PAIRS}, {WIRES}) -> Tensor", _There)
pairs_home = define_function(f"pairs_home_wire(Tensor pairs, {PAIRS}, {WIRES}) -> Tensor", _Home)


def _pairs(indices: tuple[Any, ...], group: str) -> tuple[Any, ...]:
    """Of what the ops below take, what is of pairs."""
    send_order, send_position, _, row_position, splits = indices
    return send_order, send_position, splits, row_position.shape[0], group


def _sum_home(rows: Tensor, weights: Tensor | None, indices: tuple[Any, ...], group: str, wire: str | None, back: str | None) -> Tensor:
    """Each token's sum over its rows: N -> R -> S -> T."""
    send_order, _, row_order, row_position, _ = indices
    if send_order is not None and wire is None:  # the sums are made in the buffer that is sent
        return combine(rows, weights, *indices, group)
    return pairs_home(weighted_sum(rows, weights, row_order, row_position), *_pairs(indices, group), wire, back)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *indices, group, wire, backward_wire = rest
        ctx.save_for_backward(*indices)
        ctx.rest = group, backward_wire, wire
        _, _, order, position, _ = indices
        arrived = _there(x, _pairs(tuple(indices), group), wire)
        return (
            gather(arrived, order, position) if wire is None else dequantize(arrived, order, position.shape[1], x.shape[1], x.dtype, wire)
        )

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
        arrived = _there(x, _pairs(tuple(indices), group), wire)
        data, scales = quantized_rows(arrived, order, position.shape[1], x.shape[1], wire)
        ctx.mark_non_differentiable(data, scales)
        return data, scales, x.new_zeros(1, 1).expand(data.shape)  # [N, D], [N, blocks], [N, D]

    @staticmethod
    def backward(ctx: Any, _: Any, __: Any, grad: Tensor) -> Any:
        return _sum_home(grad, None, ctx.saved_tensors, *ctx.rest), *(None,) * 8


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        *indices, group, wire, backward_wire = rest
        ctx.save_for_backward(*indices, rows, weights)
        ctx.rest = group, backward_wire, wire
        return _sum_home(rows, weights, tuple(indices), group, wire, backward_wire)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *indices, rows, weights = ctx.saved_tensors
        group, *wires = ctx.rest
        arrived = pairs_there(grad, *_pairs(tuple(indices), group), *wires)  # [R, D]
        return *weighted_sum_backward(arrived, rows, weights, *indices[2:4]), *(None,) * 8


dispatch_wire = define_function(f"dispatch_wire(Tensor x, {INDICES}, {WIRES}) -> Tensor", _Dispatch)
dispatch_quantized = define_function(f"dispatch_quantized(Tensor x, {INDICES}, {WIRES}) -> (Tensor, Tensor, Tensor)", _DispatchQuantized)
combine_wire = define_function(f"combine_wire(Tensor rows, Tensor weights, {INDICES}, {WIRES}) -> Tensor", _Combine)
