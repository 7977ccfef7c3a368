"""All ways of parallelism in one world of 8 ranks: every split of it that `moe_mesh` takes trains as one process does."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import mse_loss, silu

import moecomm.functional as mf
from moecomm.mesh import MoEMesh, divisors, moe_mesh
from tests import layers, one_process
from tests.one_process import BALANCE, RATE, Run, Sizes
from tests.spawn import run_ranks

WORLD = 8
STEPS = 3
MICROBATCHES = 2
CLIP = 0.5  # below the norms of all steps
SIZES = Sizes(hidden=16, batch=16, length=8)  # each of them can be split over 8 ranks
# The groups that a parameter is spread over, and the dim along which; the others are the same on all ranks of a stage.
SPREAD = {
    "dense.into": [("tp", 0)],  # [H, D]
    "dense.out": [("tp", 1)],  # [D, H]
    "experts.into": [("ep", 0), ("etp", 1)],  # [E, H, D]
    "experts.out": [("ep", 0), ("etp", 2)],  # [E, D, H]
}


class Split(NamedTuple):
    pp: int
    dp: int
    tp: int
    edp: int
    ep: int
    etp: int


def splits(world: int) -> list[Split]:
    """Every way to split a world: pp * dp * tp = pp * edp * ep * etp = world."""
    sizes = [divisors(world)] * len(Split._fields)
    return [split for split in itertools.starmap(Split, itertools.product(*sizes)) if fits(split, world)]


def fits(split: Split, world: int) -> bool:
    return split.pp * split.dp * split.tp == world and split.edp * split.ep * split.etp == world // split.pp


class Stage(nn.Module):
    """This stage's layers of `one_process.loss`, on this rank's tokens: its dp part of the sequences, its tp slice of their length."""

    def __init__(self, sizes: Sizes, mesh: MoEMesh) -> None:
        super().__init__()
        self.sizes, self.mesh = sizes, mesh
        stages, place = mesh.dense["pp"].size(), mesh.dense["pp"].get_local_rank()
        own = sizes.layers // stages
        self.mine = range(place * own, (place + 1) * own)
        self.first, self.last = place == 0, place == stages - 1
        whole = {name: p for name, p in one_process.initial(sizes).items() if (self.last if name == "head" else int(name[0]) in self.mine)}
        self.names = list(whole)
        self.values = nn.ParameterList(self.shard(name, p) for name, p in whole.items())
        self.balances: list[Tensor] = []  # of each layer and microbatch
        # The ranks that have the same part of a parameter, each with its own tokens' part of the gradient.
        self.repeated = {"*.dense.*": mesh.dense["dp"], "*.experts.*": mesh.expert["edp"], "*": mesh.stage}
        # The groups whose ranks have different parts.
        pp = mesh.dense["pp"]
        self.parts = {"*.dense.*": [mesh.dense["tp"], pp], "*.experts.*": [mesh.expert["ep"], mesh.expert["etp"], pp], "*": pp}

    def named(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    def spread(self, name: str) -> list[tuple[DeviceMesh, int]]:
        """What `SPREAD` says of a parameter, in this mesh."""
        view = self.mesh.dense if "dense" in name else self.mesh.expert
        return [(view[group], dim) for group, dim in SPREAD.get(name[2:], [])]

    def shard(self, name: str, whole: Tensor) -> Tensor:
        return functools.reduce(lambda p, at: mf.slice_scatter(p, *at), self.spread(name), whole.clone())

    def whole(self, name: str, shard: Tensor) -> Tensor:
        return functools.reduce(lambda p, at: mf.slice_gather(p, *at), self.spread(name), shard.detach())

    def forward(self, x: Tensor) -> Tensor:
        for i in self.mine:
            own = {name.removeprefix(f"{i}."): p for name, p in self.named().items() if name.startswith(f"{i}.")}
            x = x + dense(x, own["dense.into"], own["dense.out"], self.mesh.dense["tp"])
            z, balance = moe(x.flatten(0, 1), own["gate"], own["experts.into"], own["experts.out"], self.sizes.top_k, self.mesh)
            x = x + mf.attach_loss(z, balance, BALANCE / self.mesh.stage.size()).view_as(x)
            self.balances.append(balance.detach())
        return x @ self.named()["head"].T if self.last else x


def dense(x: Tensor, into: Tensor, out: Tensor, tp: DeviceMesh) -> Tensor:
    """x [B, length / tp, D] through the whole layer, of which this rank has into [H / tp, D] and out [D, H / tp]."""
    every = mf.slice_gather(x, tp, dim=1, grad="reduce")  # [B, length, D]
    return mf.slice_reduce(silu(every @ into.T) @ out.T, tp, dim=1)


def moe(x: Tensor, gate: Tensor, into: Tensor, out: Tensor, k: int, mesh: MoEMesh) -> tuple[Tensor, Tensor]:
    """x [T, D] of this rank through all experts, of which it has into [L, H / etp, D] and out [L, D, H / etp]; and the balance loss.

    Each rank of an etp group sends on the tokens of all of them, and gets its part of what their experts give.
    """
    ep, etp = mesh.expert["ep"], mesh.expert["etp"]
    logits = x @ gate.T  # [T, E]
    weights, experts = mf.route(logits, k)
    every = mf.slice_gather(x, etp, grad="reduce")  # [T * etp, D]
    plan = mf.plan(mf.slice_gather(experts, etp), mf.slice_gather(weights, etp, grad="reduce"), gate.shape[0], ep, like=every)
    rows = layers.experts_by_row(mf.dispatch(every, plan), into, out, plan.offsets)
    balance = mf.load_balance_loss(logits.softmax(-1), experts, mesh.stage)
    return mf.slice_reduce(mf.combine(rows, plan), etp), balance


def train(sizes: Sizes, split: Split) -> Run:
    """`one_process.train` on this rank's part of the tokens, of the layers, of the dense parameters and of the experts."""
    before = set(dist.distributed_c10d._world.pg_map)
    mesh = moe_mesh("cpu", pp=split.pp, dp=split.dp, tp=split.tp, ep=split.ep, etp=split.etp)
    assert tuple(mesh.expert.shape) == (split.pp, split.edp, split.ep, split.etp)
    pp, dp, tp, ranks = mesh.dense["pp"], mesh.dense["dp"], mesh.dense["tp"], mesh.stage.size()
    module = Stage(sizes, mesh)
    parameters = module.named()
    example = torch.zeros(sizes.batch // MICROBATCHES // split.dp, sizes.length // split.tp, sizes.dim, dtype=torch.float64)
    example.requires_grad_()
    stage = PipelineStage(module, pp.get_local_rank(), split.pp, torch.device("cpu"), example, example, group=pp.get_group())
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=lambda out, y: mse_loss(out, y) / ranks)
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE)

    losses, norms = [], []
    for step in range(STEPS):
        x, y = (
            torch.cat([mf.slice_scatter(mf.slice_scatter(microbatch, dp), tp, dim=1) for microbatch in whole.chunk(MICROBATCHES)])
            for whole in one_process.batch(sizes, step)
        )
        errors: list[Tensor] = []  # of each microbatch, on the last stage's ranks, divided by them
        schedule.step(*([x] if module.first else []), target=y if module.last else None, losses=errors)
        mf.sync_grads_(parameters, module.repeated, reduce="sum")
        norms.append(mf.clip_grad_norm_(parameters, CLIP, module.parts).item())
        optimizer.step()
        optimizer.zero_grad()
        error = total(sum((e.detach() for e in errors), torch.zeros((), dtype=torch.float64)), mesh.stage)
        losses.append(total(error + BALANCE * torch.stack(module.balances).sum(), pp).item() / MICROBATCHES)
        module.balances.clear()
    whole = {name: module.whole(name, p) for name, p in parameters.items()}
    dist.barrier()
    for group in set(dist.distributed_c10d._world.pg_map) - before:  # the sockets of all cases together would be too many
        dist.destroy_process_group(group)
    return Run(losses, norms, whole)


def total(mine: Tensor, group: DeviceMesh) -> Tensor:
    """The sum over all ranks of a group."""
    return mf.slice_gather(mine[None], group).sum()


@functools.cache
def expected(sizes: Sizes) -> Run:
    return one_process.train(sizes, STEPS, CLIP, MICROBATCHES)


FAST = [Split(1, 2, 4, 2, 2, 2), Split(2, 2, 2, 1, 2, 2), Split(2, 2, 2, 2, 2, 1)]


def marks(number: int, split: Split) -> list[pytest.MarkDecorator]:
    """Some in the inner loop, some more in every run, all of them where all is asked for."""
    return [] if split in FAST else [pytest.mark.slow] if number % 5 == 0 else [pytest.mark.slow, pytest.mark.exhaustive]


def test_the_splits_are_all_there_are() -> None:
    found = splits(WORLD)
    assert len(set(found)) == len(found)
    # 2^n ranks are split over m dims in as many ways as n equal things over m boxes.
    ways = [math.comb(n + 1, 1) * math.comb(n + 2, 2) for n in range(4)]
    assert len(found) == sum(ways)
    assert set(FAST) <= set(found)


@pytest.mark.parametrize(
    "split",
    [pytest.param(split, id=str(split), marks=marks(number, split)) for number, split in enumerate(splits(WORLD))],
)
def test_training_split_over_8_ranks_is_that_of_one_process(split: Split) -> None:
    sizes = SIZES._replace(layers=max(2, split.pp))
    assert min(expected(sizes).norms) > CLIP
    runs = run_ranks(train, WORLD, sizes, split)
    assert {name for run in runs for name in run.parameters} == set(expected(sizes).parameters)
    for run in runs:
        torch.testing.assert_close(run.losses, expected(sizes).losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(run.norms, expected(sizes).norms, rtol=1e-9, atol=1e-12)
        same = {name: expected(sizes).parameters[name] for name in run.parameters}
        torch.testing.assert_close(run.parameters, same, rtol=1e-8, atol=1e-10)
