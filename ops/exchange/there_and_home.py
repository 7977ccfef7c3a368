"""there[r] = x[t], for each (token, rank) pair r that arrives, of token t; home[t] = sum over t's pairs of what comes back of them.

Costs (token, rank) pairs x D elements on the wire, and a private send buffer of the same size; with a ``wire`` the bytes of
`wire_formats.py`. In a group of one, without orders, nothing is sent; with a wire, the rows are rounded as if they had been sent.
They are each other's mirror and backward, any number of times. The backwards of `dispatch_combine.py`, `dispatch_combine_wire.py` and
`slots.py` consist of them. The rounding passes the gradient on unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.ops.base.library import call
from moecomm.ops.exchange.all_to_all import dispatch_exchange, return_exchange
from moecomm.ops.exchange.all_to_all_wire import wire_exchange
from moecomm.ops.exchange.collectives import wait
from moecomm.ops.exchange.slices import define_function
from moecomm.ops.rows.dequantize import dequantize
from moecomm.ops.rows.quantize import quantize
from moecomm.ops.rows.weighted_sum import weighted_sum

# send_order and send_position are None in a group of one: S = R = T.
PAIRS = "Tensor? send_order, Tensor? send_position, Tensor? splits, SymInt received, str group, str? wire, str? backward_wire"


def arrived(x: Tensor, pairs: tuple[Any, ...], wire: str | None) -> Tensor:
    """The token of each pair, as it arrives, T -> S -> R: [R, D], or its quantized bytes if there is a wire."""
    order, position, splits, received, group = pairs
    if order is None:
        return x.clone() if wire is None else call(quantize, x, None, 1, wire)
    if wire is None:
        return wait(call(dispatch_exchange, x, order, position.shape[1], splits, received, group))
    return wait(wire_exchange(x, order, position.shape[1], wire, 0, splits, received, group))


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *indices, received, group, wire, backward_wire = rest
        ctx.save_for_backward(*indices)
        ctx.rest = received, group, backward_wire, wire
        pairs = arrived(x, (*indices, received, group), wire)
        return pairs if wire is None else call(dequantize, pairs, None, 1, x.shape[1], x.dtype, wire)  # [R, D]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return call(home, grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 7


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor, *rest: Any) -> Tensor:
        *indices, received, group, wire, backward_wire = rest
        ctx.save_for_backward(*indices)
        ctx.rest = received, group, backward_wire, wire
        order, position, splits = indices
        if order is None:
            home = pairs.clone() if wire is None else call(quantize, pairs, None, 1, wire)
        elif wire is None:
            home = wait(call(return_exchange, pairs, splits, order.shape[0], group))
        else:
            home = wait(wire_exchange(pairs, None, 1, wire, 1, splits, order.shape[0], group))
        if wire is not None:
            home = call(dequantize, home, None, 1, pairs.shape[1], pairs.dtype, wire)  # [S, D]
        return home if order is None else call(weighted_sum, home, None, order, position)  # [T, D]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return call(there, grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 7


there = define_function(f"pairs_there(Tensor x, {PAIRS}) -> Tensor", _There)
home = define_function(f"pairs_home(Tensor pairs, {PAIRS}) -> Tensor", _Home)
