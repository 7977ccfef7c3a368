"""y = x, and backward grad_x = grad of rank 0 + grad of rank 1 + ..., in the order of the ranks, in float32 for lower precisions.

Costs nothing forward; backward an all-gather of x's elements and one sum. For what ranks that split the hidden dim have in common.
Its mirror would be a sum forward with the gradient as it is; nothing here needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moecomm.ops.library import LIBRARY
from moecomm.ops.rank_sum import rank_sum
from moecomm.ops.slice import all_gathered, start_all_gather

SCHEMA = "sum_gradient(Tensor x, int ranks, str group) -> Tensor"


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: str) -> Tensor:
        ctx.ranks, ctx.group = ranks, group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = grad.contiguous().view(1, -1)  # [1, n]
        whole = all_gathered(start_all_gather(parts, ctx.ranks, ctx.group), parts, ctx.ranks)  # [P, n]
        return rank_sum(whole, 1, False).view(grad.shape), None, None


def _sum_gradient(*args: Any) -> Tensor:
    return _SumGradient.apply(*args)


LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("sum_gradient", _sum_gradient, "CompositeImplicitAutograd")
sum_gradient = torch.ops.moecomm.sum_gradient.default
