"""attach_loss: y = x, a view of it.

Costs nothing. Its backward hands the gradient of x on, and gives the loss the gradient ``scale``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.ops.library import LIBRARY


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, {"dtype": loss.dtype, "device": loss.device}
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, torch.full((), ctx.scale, **ctx.like), None


# An op, which the compiler traces into, forward and backward: Dynamo warns where it meets an autograd.Function itself.
LIBRARY.define("attach_loss(Tensor(a) x, Tensor loss, float scale) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("attach_loss", lambda *args: _AttachLoss.apply(*args), "CompositeImplicitAutograd")
attach_loss = torch.ops.moecomm.attach_loss.default
