"""there[r] = x[t], for each (token, rank) pair r that arrives, of token t; home[t] = sum over t's pairs of what comes back of them.

Costs (token, rank) pairs x D elements on the wire, and a private send buffer of as many.
Each is the other's mirror, and so its backward, any number of times: what the backwards of `tokens.py` and `slots.py` are made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.ops.exchange import dispatch_exchange, return_exchange, wait
from moecomm.ops.slice import define_function
from moecomm.ops.weighted_sum import weighted_sum

INDICES = "Tensor send_order, Tensor send_position, Tensor? splits, SymInt received, str group"


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, position: Tensor, splits: Tensor | None, received: int, group: str) -> Tensor:
        ctx.save_for_backward(order, position, splits)
        ctx.rest = received, group
        return wait(dispatch_exchange(x, order, position.shape[1], splits, received, group))  # [R, D]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.ops.moecomm.pairs_home(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 5


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor, order: Tensor, position: Tensor, splits: Tensor | None, received: int, group: str) -> Tensor:
        ctx.save_for_backward(order, position, splits)
        ctx.rest = received, group
        home = wait(return_exchange(pairs, splits, order.shape[0], group))  # [S, D]
        return weighted_sum(home, None, order, position)  # [T, D]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.ops.moecomm.pairs_there(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 5


there = define_function(f"pairs_there(Tensor x, {INDICES}) -> Tensor", _There)
home = define_function(f"pairs_home(Tensor pairs, {INDICES}) -> Tensor", _Home)
