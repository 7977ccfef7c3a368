"""An installed moecomm trains a layer: `python -I .ci/installed.py`, in any folder. It is compared with a loop over the experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import moecomm
import moecomm.compile.checkpoint
import moecomm.functional as mf
import moecomm.planner

T, D, E, K = 64, 32, 8, 2


def layer(x: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
    """x [T, D], gate [D, E], experts [E, D, D] -> [T, D]."""
    weights, ids = mf.route(x @ gate, K)
    plan = mf.plan(ids, weights, E)
    return mf.combine(F.grouped_mm(mf.dispatch(x, plan), experts, offs=plan.offsets), plan)


def loop(x: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
    top, ids = (x @ gate).float().topk(K)  # [T, K]
    weights = torch.zeros(T, E).scatter(1, ids, top.softmax(1))  # [T, E]
    return sum(weights[:, e, None] * (x @ experts[e]) for e in range(E))


def trained(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    y = function(*leaves)
    return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]


torch.manual_seed(0)
leaves = [torch.randn(shape).bfloat16().requires_grad_() for shape in ((T, D), (D, E), (E, D, D))]
for got, want in zip(trained(layer, leaves), trained(loop, leaves), strict=True):
    far = ((got - want).abs().max() / want.abs().max()).item()
    assert far < 0.03, far  # in bfloat16
where = Path(moecomm.__file__)
assert "site-packages" in where.parts, where
print(f"moecomm {moecomm.__version__} of {where.parent} trains a layer")
