"""The truth that the tests compare with: one process, every expert over every token, masks in place of routing, float64.

Nothing here knows of ranks or imports moecomm. The tokens of a group are those of its ranks, one behind the other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def mix(experts: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """[T, E]: how much of each expert a token takes: the weights of its slots for that expert, added up; -1 is no expert."""
    chosen = experts.unsqueeze(2) == torch.arange(num_experts)  # [T, K, E]
    return (weights.double().unsqueeze(2) * chosen).sum(1)


def feed_forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """silu(x @ up) @ down for every expert and every token: [T, D], [E, D, H], [E, H, D] -> [E, T, D]."""
    return silu(x.double() @ up.double()) @ down.double()


def layer(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[T, D]: each token's sum of what its experts make of it, weighted."""
    return torch.einsum("te,etd->td", mix(experts, weights, up.shape[0]), feed_forward(x, up, down))


def layer_and_gradients(
    x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, grad: Tensor
) -> dict[str, Tensor]:  # fmt: skip
    """What `layer` gives, and the gradients of its floating arguments where the result's is ``grad``."""
    arguments = {"x": x, "weights": weights, "up": up, "down": down}
    leaves = {name: value.detach().double().requires_grad_() for name, value in arguments.items()}
    y = layer(leaves["x"], experts, leaves["weights"], leaves["up"], leaves["down"])
    gradients = torch.autograd.grad(y, list(leaves.values()), grad.double())
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def rows(experts: Tensor, first: int, last: int) -> list[tuple[int, int]]:
    """The rows of experts first to last - 1 in order: by expert, then token, then slot; each as its token and slot."""
    slots = [(e, t, j) for t, ids in enumerate(experts.tolist()) for j, e in enumerate(ids) if first <= e < last]
    return [(t, j) for _, t, j in sorted(slots)]


def pairs(experts: Tensor, first: int, last: int) -> int:
    """How many tokens have any slot for experts first to last - 1."""
    return sum(any(first <= e < last for e in ids) for ids in experts.tolist())
