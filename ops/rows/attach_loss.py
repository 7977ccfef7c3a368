"""attach_loss: y = x, in the same memory.

Costs nothing.
Its backward passes the gradient of x on unchanged, and gives the loss the gradient ``scale``.
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
    """The constant ``scale``. It takes the gradient as an argument so that a compiler places the loss's backward in the backward pass.

    With a plain constant, the compiler put the loss's backward into the forward graph. It put it into the backward graph too,
    exchanges included, where nothing used it (torch 2.13: an unused wait_tensor keeps what it waits for).
    """
    return grad.new_full((), scale, dtype=dtype, device=device)


loss_gradient = define(GRADIENT, gradient_fake, gradient, gradient)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.arguments = scale, loss.dtype, loss.device
        return x.detach()  # the memory of x, but no view of it to autograd: the caller may change it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shard = grad.to_local() if isinstance(grad, DTensor) else grad  # the loss is a plain tensor, whatever x is
        return grad, loss_gradient(shard.detach(), *ctx.arguments), None


# An op: the compiler traces into it, forward and backward. Dynamo warns if it meets an autograd.Function directly.
LIBRARY.define("attach_loss(Tensor(a) x, Tensor loss, float scale) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("attach_loss", lambda *args: _AttachLoss.apply(*args), "CompositeImplicitAutograd")
attach_loss = torch.ops.moecomm.attach_loss.default
