"""A call, or several, of each function in `mf.__all__`: what the tests that hold for every function go over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softmax

import moecomm.functional as mf
from moecomm.parallel.group import GroupLike

T, D, E, K = 5, 6, 4, 2


class Inputs(NamedTuple):
    """What the calls are made of: other values on each rank, of the same shapes."""

    x: Tensor  # [T, D], requires grad
    logits: Tensor  # [T, E], requires grad
    weights: Tensor  # [T, K], requires grad
    loss: Tensor  # [], requires grad
    params: dict[str, Tensor]  # "gate" [E, D] and "experts.w" [2, D, 3], with gradients
    experts: Tensor  # [T, K]
    bias: Tensor  # [E]


def inputs(rank: int) -> Inputs:
    seed = torch.Generator().manual_seed(rank)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seed).requires_grad_()

    params = {"gate": leaf(E, D), "experts.w": leaf(2, D, 3)}
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=seed)
    experts = torch.stack([torch.randperm(E, generator=seed)[:K] for _ in range(T)])
    return Inputs(leaf(T, D), leaf(T, E), leaf(T, K), leaf(), params, experts, torch.zeros(E))


def placement(group: GroupLike) -> list[list[int]]:
    """Two experts a rank; on two ranks, one of them is on both."""
    return [[0, 1]] if mf.plan.__globals__["resolve_group"](group).size == 1 else [[0, 1], [2, 0]]


Call = Callable[[Inputs, GroupLike], Any]
