"""Data-parallel training on several ranks against one process's on the whole batch: by sync_params, eager and compiled, and in place."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

import moecomm.functional as mf
from tests.spawn import run_ranks

ROWS, D, H, STEPS = 12, 5, 8, 6
SPLITS = {1: [(12,)], 2: [(6, 6), (9, 3)], 4: [(3, 3, 3, 3), (5, 0, 6, 1)]}  # each rank's rows of a batch


def model_of(rank: int) -> nn.Module:
    """Two layers in float64; each rank starts with its own."""
    seed = torch.Generator().manual_seed(rank)
    model = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, 1)).double()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=seed, dtype=torch.float64) / 2)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def batch(step: int) -> tuple[Tensor, Tensor]:
    seed = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(ROWS, D, generator=seed, dtype=torch.float64) * torch.arange(1, ROWS + 1).unsqueeze(1)  # the ranks' rows differ in size
    return x, x.sin().sum(1, keepdim=True)


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    """A part of the whole batch's mean: the sum over the ranks is the loss."""
    return (y - target).square().sum() / ROWS


def train_alone(src: int) -> dict[str, Tensor]:
    model = model_of(src)
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        x, target = batch(step)
        optimizer.zero_grad()
        loss_of(model(x), target).backward()
        optimizer.step()
    return model.state_dict()


def train_here(split: tuple[int, ...], src: int, how: str) -> dict[str, Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = model_of(rank)
    optimizer = optimizer_of(model)
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    even = len(set(split)) == 1  # the ranks' means have a mean that is the whole's only where all have as many rows

    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        synced = mf.sync_params(params, None, src, "mean" if even else "sum")
        return loss_of(functional_call(model, synced, (x,)), target) * (ranks if even else 1)

    torch._dynamo.reset()
    function = torch.compile(loss, fullgraph=True) if how == "compiled" else loss
    if how == "in place":
        mf.sync_params_(model, None, src)
    for step in range(STEPS):
        x, target = (whole[rows] for whole in batch(step))
        optimizer.zero_grad()
        if how == "in place":
            (loss_of(model(x), target) * (ranks if even else 1)).backward()
            mf.sync_grads_(model, None, "mean" if even else "sum")
        else:
            function(dict(model.named_parameters()), x, target).backward()
        optimizer.step()
    if how == "in place":
        return model.state_dict()
    return {name: param.detach() for name, param in mf.sync_params(dict(model.named_parameters()), None, src).items()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("how", ["eager", "in place", pytest.param("compiled", marks=pytest.mark.slow)])
def test_training_on_several_ranks_is_training_on_the_whole_batch(ranks: int, how: str) -> None:
    src = ranks - 1
    want = train_alone(src)
    start = model_of(src).state_dict()
    assert all((want[name] - start[name]).abs().min() > 1e-3 for name in want)  # every parameter has moved
    for split in SPLITS[ranks]:
        first, *others = run_ranks(train_here, ranks, split, src, how, timeout=200)
        for name, param in want.items():
            torch.testing.assert_close(first[name], param, rtol=1e-9, atol=1e-11)
            assert all(torch.equal(other[name], first[name]) for other in others)


@pytest.mark.parametrize("how", ["eager", "in place", pytest.param("compiled", marks=pytest.mark.slow)])
def test_training_again_gives_the_same_bits(how: str) -> None:
    first, second = (run_ranks(train_here, 2, (9, 3), 0, how, timeout=200)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
