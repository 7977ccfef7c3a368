"""Which inputs do the benchmarks use? Tokens, a routing of a given kind, and a step forward and backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers import Layer

UNIFORM, ZIPF, ALL_TO_ONE = "uniform", "zipf", "all to one"


def routed(
    tokens: int, dim: int, num_experts: int, k: int, dtype: torch.dtype, device: str = "cpu", routing: str = UNIFORM
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x [T, D], experts [T, K], float32 weights [T, K], and the gradient of y [T, D]; each rank's own.

    The experts of a token differ. ``uniform``: evenly at random. ``zipf``: expert e drawn as often as 1 / (e + 1) says. ``all to one``: the
    first K experts, for every token; with K of at most E / P they are all on rank 0.
    """
    seed = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    x = torch.randn(tokens, dim, generator=seed).to(device, dtype).requires_grad_()
    chance = torch.rand(tokens, num_experts, generator=seed)
    if routing == ZIPF:
        chance = chance.log() * torch.arange(1, num_experts + 1)  # log(u) / share: the K largest are K draws without replacement
    elif routing == ALL_TO_ONE:
        chance = chance - torch.arange(num_experts)
    experts = chance.topk(k).indices.to(device)
    weights = torch.rand(tokens, k, generator=seed).to(device).requires_grad_()
    return x, experts, weights, torch.randn(tokens, dim, generator=seed).to(device, dtype)


def same(rows: Tensor, ends: object, first: int) -> Tensor:
    """Experts that give their rows back as they came."""
    return rows


def step(layer: Layer, x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x, experts, weights, num_experts, same), (x, weights), grad)
