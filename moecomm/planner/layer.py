"""The layer that `calibrate` runs, and how it counts its work."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moecomm.layer.combine import combine
from moecomm.layer.dispatch import dispatch
from moecomm.layer.make_plan import plan
from moecomm.layer.route import route
from moecomm.planner.cost import DENSE_PASSES, HIDDEN_PASSES, ROW_PASSES
from moecomm.planner.model import Model


class Layer:
    """A layer as `tutorials/demo/model.py` has it, with the model's widths and ``experts`` on each of the group's ranks."""

    def __init__(self, model: Model, experts: int, device: str, dtype: torch.dtype, group: str = "", ranks: int = 1) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device).mul_(shape[-1] ** -0.5).requires_grad_()

        d, width = model.dim, model.heads * model.head
        self.model, self.k, self.group = model, min(model.k, experts), group
        self.norms = random(2, d)
        self.qkv, self.project, self.gate = random(3 * width, d), random(d, width), random(ranks * experts, d)
        self.into, self.out = random(experts, 2 * model.hidden, d), random(experts, d, model.hidden)

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, length, D] -> [B, length, D]."""
        normed = F.rms_norm(x, x.shape[-1:], self.norms[0])
        heads = F.linear(normed, self.qkv).unflatten(-1, (-1, 3, self.model.head))  # [B, length, heads, 3, head]
        q, k, v = heads.permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        x = x + F.linear(y.transpose(1, 2).flatten(2), self.project)
        tokens = F.rms_norm(x, x.shape[-1:], self.norms[1]).flatten(0, 1)  # [T, D]
        weights, experts = route(F.linear(tokens, self.gate).float(), self.k)
        routing = plan(experts, weights, self.gate.shape[0], self.group, like=tokens)
        rows = dispatch(tokens, routing)  # [N, D]
        gate, up = F.grouped_mm(rows, self.into.transpose(1, 2), offs=routing.offsets).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, self.out.transpose(1, 2), offs=routing.offsets)
        return x + combine(rows, routing).view_as(x)

    def flops(self, tokens: int, length: int) -> tuple[float, float, float]:
        """FLOPs forward and backward: of dense matmuls, of grouped ones, of attention."""
        d, width = self.model.dim, self.model.heads * self.model.head
        dense = 6 * tokens * d * (4 * width + self.gate.shape[0])
        return dense, 18 * tokens * self.k * d * self.model.hidden, 6 * tokens * length * width

    def moved(self, tokens: int, itemsize: int) -> float:
        """Bytes read and written beside the matmuls, as `cost.py` counts them."""
        d, rows = self.model.dim, self.k * tokens
        return itemsize * (tokens * DENSE_PASSES * d + rows * (ROW_PASSES * d + HIDDEN_PASSES * self.model.hidden))


def _rotated(x: Tensor) -> Tensor:
    """A rotation by an angle of one: the work of one by position."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * 0.54 - b * 0.84, a * 0.84 + b * 0.54), -1)


def trained(run: Callable[[], Tensor]) -> Callable[[], None]:
    """``run``, and its backward."""

    def once() -> None:
        y = run()
        y.backward(torch.ones_like(y))

    return once
