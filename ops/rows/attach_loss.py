"""attach_loss: y = x, a view of it.

Costs nothing. Its backward hands the gradient of x on, and gives the loss the gradient ``scale``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moecomm.ops.base.library import LIBRARY, define

GRADIENT = "loss_gradient(Tensor grad, float scale, ScalarType dtype, Device device) -> Tensor"


def gradient_fake(grad: Tensor, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return grad.new_empty((), dtype=dtype, device=device)


def gradient(grad: Tensor, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant; the gradient is an argument so that a compiler takes the loss's backward for a part of the backward pass.

    Where it was a constant to the compiler, too, the loss's backward went into the forward graph, and once more, exchanges and all, into
    the backward graph, where nobody used it (torch 2.13: an unused wait_tensor keeps what it waits for).
    """
    return grad.new_full((), scale, dtype=dtype, device=device)


loss_gradient = define(GRADIENT, gradient_fake, gradient, gradient)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.arguments = scale, loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shard = grad.to_local() if isinstance(grad, DTensor) else grad  # the loss is no DTensor, whatever x is
        return grad, loss_gradient(shard.detach(), *ctx.arguments), None


# An op, which the compiler traces into, forward and backward: Dynamo warns where it meets an autograd.Function itself.
LIBRARY.define("attach_loss(Tensor(a) x, Tensor loss, float scale) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("attach_loss", lambda *args: _AttachLoss.apply(*args), "CompositeImplicitAutograd")
attach_loss = torch.ops.moecomm.attach_loss.default
