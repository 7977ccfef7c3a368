"""Data-parallel training on several ranks against one process's on the whole batch: by sync_params, eager and compiled, and in place; over
one group or each parameter over its own, by moecomm alone or beside DDP."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import moecomm.functional as mf
from tests import one_process
from tests.one_process import RATE, Sizes
from tests.spawn import run_ranks
from tests.traffic import Traffic
from tests.training.test_checkpoint import Model

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
    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if how == "compiled" else loss
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


@pytest.mark.parametrize(
    ("ranks", "how"),
    [
        *((ranks, how) for ranks in (1, 2) for how in ("eager", "in place")),
        *(pytest.param(4, how, marks=pytest.mark.slow) for how in ("eager", "in place")),
        *(pytest.param(ranks, "compiled", marks=[pytest.mark.slow, pytest.mark.exhaustive]) for ranks in (1, 2, 4)),
    ],
)
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


@pytest.mark.parametrize("how", ["eager", "in place", pytest.param("compiled", marks=[pytest.mark.slow, pytest.mark.exhaustive])])
def test_training_again_gives_the_same_bits(how: str) -> None:
    first, second = (run_ranks(train_here, 2, (9, 3), 0, how, timeout=200)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


NAMES = ["embed", "0.gate", "0.experts.into", "0.experts.out", "1.gate", "own", "frozen"]


def grads_of(rank: int) -> dict[str, Tensor]:
    seed = torch.Generator().manual_seed(rank)
    return {name: torch.randn(5, 3, generator=seed, dtype=torch.float64) for name in NAMES}


def each_in_its_group_here() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    rank, edp, ep = dist.get_rank(), mesh.get_local_rank("edp"), mesh.get_local_rank("ep")
    all_ranks, over_edp = [0, 1, 2, 3], [ep, 2 + ep]
    for reduce in ("sum", "mean"):
        params = {name: torch.zeros_like(grad).requires_grad_() for name, grad in grads_of(rank).items()}
        params["frozen"].requires_grad_(False)
        for name, grad in grads_of(rank).items():
            params[name].grad = grad
        # The first match counts: of 0.experts.out its own, though the two patterns behind it match as well.
        groups: dict[Any, Any] = {
            params["0.experts.out"]: mesh["ep"], "own": "", "*.experts.*": (mesh, 0), "?.gate": mesh["edp"], "*": None,
        }  # fmt: skip
        with Traffic() as traffic:
            mf.sync_grads_(params, groups, reduce)
        assert traffic.collectives == ["all_to_all_single"] * 3 + ["all_gather_into_tensor"] * 3  # all groups are in flight together
        assert traffic.reads == []
        over = {"embed": all_ranks, "0.experts.out": [2 * edp, 2 * edp + 1], "own": [rank], "frozen": [rank]}
        for name, param in params.items():
            ranks = over.get(name, over_edp)
            want = torch.stack([grads_of(other)[name] for other in ranks]).sum(0) / (len(ranks) if reduce == "mean" else 1)
            torch.testing.assert_close(param.grad, want, rtol=1e-14, atol=1e-14)
    model = nn.ModuleDict({"gate": nn.Linear(2, 1), "experts": nn.Linear(2, 1)})
    for param in model.parameters():
        param.grad = torch.full_like(param, float(rank))
    mf.sync_grads_(model, {"experts.*": mesh["edp"], "gate.*": None}, "sum")
    assert [param.grad.flatten()[0].item() for param in model.parameters()] == [6, 6, 2 + 2 * ep, 2 + 2 * ep]


def test_each_parameters_gradient_is_added_up_over_the_group_of_its_first_match() -> None:
    run_ranks(each_in_its_group_here, 4)


def wrong_mappings_here() -> None:
    params = {name: torch.zeros(2, requires_grad=True) for name in ("0.gate", "0.experts.into")}
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({"*.experts.*": None}, ValueError, "group was a mapping of '*.experts.*'; it must be one with a key that matches '0.gate'"),
        ({"*": None, "*.experts.*": None}, ValueError, "group['*.experts.*'] was no parameter's first match; it must be that of at least "
            "one of '0.gate', '0.experts.into'"),
        ({"*": None, torch.ones(3): None}, ValueError, "group[a tensor of shape [3]] was no parameter's first match"),
        ({0: None, "*": None}, TypeError, "a key of group was int; it must be a pattern of names, or a parameter"),
        ({"*": [None]}, TypeError, "group was list"),
    ]  # fmt: skip
    for groups, error, message in wrong:
        with pytest.raises(error, match=re.escape(message)), Traffic() as traffic:
            mf.sync_grads_(params, groups)
        assert traffic.collectives == []


def test_a_mapping_that_does_not_fit_is_an_error_that_names_the_key_or_the_parameter() -> None:
    run_ranks(wrong_mappings_here, 2)


def train_beside_ddp(sizes: Sizes, steps: int, compiled: bool) -> list[float]:
    """DDP averages the dense parameters' gradients while the backward pass runs; the experts', which it must leave alone, are moecomm's."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("edp", "ep", "etp"))
    rank, ranks = mesh.get_rank(), mesh.size()
    model = Model(sizes, mesh, seed=0)
    if compiled:  # all of it as one graph, and DDP around it: torch.compile(DDP(model)) would cut it at DDP's buckets
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    experts = {name: param for name, param in model.named_parameters() if "experts" in name}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(experts))
    together = DistributedDataParallel(model)
    kinds = [[param for name, param in model.named_parameters() if (name in experts) == expert] for expert in (False, True)]
    optimizer = torch.optim.AdamW([{"params": kind} for kind in kinds], lr=RATE)
    losses = []
    for step in range(steps):
        x, y = (each.chunk(ranks)[rank] for each in one_process.batch(sizes, step))
        loss = together(x, y)
        loss.backward()
        mf.sync_grads_(together, {"*.experts.*": mesh["edp"], "*": ""}, reduce="sum")
        for param in experts.values():
            param.grad /= ranks  # the mean over all ranks' tokens, as DDP has it
        mf.clip_grad_norm_(together, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mf.slice_gather(loss.detach()[None], None).mean().item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_ddp_with_experts_left_out_trains_as_one_process_does(compiled: bool) -> None:
    sizes = Sizes()
    expected = one_process.train(sizes, 5, 0.5).losses
    for losses in run_ranks(train_beside_ddp, 4, sizes, 5, compiled, timeout=200):
        torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
