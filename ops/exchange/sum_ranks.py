"""sum_ranks: total = x of rank 0 + x of rank 1 + ..., on every rank. sum_gradient: y = x; its backward is the total of the gradients.

Both sums are in rank order, in float32 for lower precisions, and rounded once. A sum costs an all-to-all, `rank_sum` and an all-gather,
which send each rank's bytes 2 * (P - 1) / P times.
They are each other's backward: sum_ranks' backward passes the gradient on unchanged, as sum_gradient does with x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.ops.exchange.collectives import all_gathered, start_all_gather
from moecomm.ops.exchange.slices import changeable, define_function, reduced, start_reduce


def total(x: Tensor, ranks: int, group: str) -> Tensor:
    """The sum over the ranks of tensors of the same shape."""
    flat = x.reshape(-1)
    chunk = reduced(start_reduce(flat, ranks, group), ranks)
    whole = all_gathered(start_all_gather(chunk, ranks, group), chunk, ranks)
    return whole.narrow(0, 0, flat.shape[0]).view(x.shape)


class _SumRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: str) -> Tensor:
        ctx.back = ranks, group
        return changeable(total(x, ranks, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.moecomm.sum_gradients(grad, *ctx.back), None, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: str) -> Tensor:
        ctx.back = ranks, group
        return changeable(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.moecomm.sum_ranks(grad, *ctx.back), None, None


sum_ranks = define_function("sum_ranks(Tensor x, int ranks, str group) -> Tensor", _SumRanks)
sum_gradient = define_function("sum_gradients(Tensor(a) x, int ranks, str group) -> Tensor(a)", _SumGradient)
