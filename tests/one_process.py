"""The training that every way of parallelism must repeat: a model of dense and MoE layers on one process, in float64, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, silu

BALANCE = 0.01  # the weight of the balance loss
RATE = 0.01


class Sizes(NamedTuple):
    layers: int = 2
    dim: int = 8
    hidden: int = 12  # of the dense layer and of each expert
    experts: int = 8
    top_k: int = 2
    batch: int = 8  # sequences
    length: int = 4  # tokens of a sequence


class Run(NamedTuple):
    losses: list[float]  # of each step, the mean over all tokens, with the balance loss of all layers
    norms: list[float]  # of all gradients, before they are clipped
    parameters: dict[str, Tensor]  # after the last step


def initial(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """The parameters before the first step, float64, the same wherever it is called."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    d, h, e = sizes.dim, sizes.hidden, sizes.experts
    parameters = {}
    for i in range(sizes.layers):
        parameters |= {f"{i}.dense.into": normal(h, d), f"{i}.dense.out": normal(d, h), f"{i}.gate": normal(e, d)}
        parameters |= {f"{i}.experts.into": normal(e, h, d), f"{i}.experts.out": normal(e, d, h)}
    return parameters | {"head": normal(d, d)}


def batch(sizes: Sizes, step: int) -> tuple[Tensor, Tensor]:
    """What comes in and what must come out at a step: [batch, length, D] each, float64, the same wherever it is called."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = sizes.batch, sizes.length, sizes.dim
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.randn(shape, generator=generator, dtype=torch.float64)


def dense(x: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """[..., D] -> [..., D]."""
    return silu(x @ into.T) @ out.T


def moe(x: Tensor, gate: Tensor, into: Tensor, out: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [T, D] through all experts, of which a mask keeps K: y [T, D], and the balance loss."""
    probabilities = (x @ gate.T).softmax(-1)  # [T, E]
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(k).indices, 1.0)  # [T, E], 1 or 0
    weights = probabilities * chosen / (probabilities * chosen).sum(-1, keepdim=True)
    every = torch.einsum("teh,edh->ted", silu(torch.einsum("td,ehd->teh", x, into)), out)  # [T, E, D]
    balance = gate.shape[0] * (chosen.mean(0) / k * probabilities.mean(0)).sum()
    return torch.einsum("te,ted->td", weights, every), balance


def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor, sizes: Sizes) -> Tensor:
    """The loss of the whole batch."""
    balances = []
    for i in range(sizes.layers):
        own = {name.removeprefix(f"{i}."): p for name, p in parameters.items() if name.startswith(f"{i}.")}
        x = x + dense(x, own["dense.into"], own["dense.out"])
        z, balance = moe(x.flatten(0, 1), own["gate"], own["experts.into"], own["experts.out"], sizes.top_k)
        x = x + z.view_as(x)
        balances.append(balance)
    return mse_loss(x @ parameters["head"].T, y) + BALANCE * torch.stack(balances).sum()


def train(sizes: Sizes, steps: int, clip: float = float("inf"), microbatches: int = 1) -> Run:
    """So many steps of AdamW, with all gradients clipped to the norm ``clip``; the loss is the mean over as many microbatches."""
    parameters = {name: p.clone().requires_grad_() for name, p in initial(sizes).items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE)
    losses, norms = [], []
    for step in range(steps):
        pieces = zip(*(whole.chunk(microbatches) for whole in batch(sizes, step)), strict=True)
        value = torch.stack([loss(parameters, x, y, sizes) for x, y in pieces]).mean()
        value.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return Run(losses, norms, {name: p.detach() for name, p in parameters.items()})
