"""A model's stages on any split of the ranks, under any schedule of a pipeline: one training for all ways of parallelism together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn.functional import mse_loss, silu

import moecomm.functional as mf
from moecomm.mesh import MoEMesh, moe_mesh
from tests import layers, one_process
from tests.one_process import BALANCE, RATE, Run, Sizes

# The groups that a parameter is spread over, and the dim along which; the others are the same on all ranks of a stage.
SPREAD = {
    "dense.into": [("tp", 0)],  # [H, D]
    "dense.out": [("tp", 1)],  # [D, H]
    "experts.into": [("ep", 0), ("etp", 1)],  # [E, H, D]
    "experts.out": [("ep", 0), ("etp", 2)],  # [E, D, H]
}
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Split(NamedTuple):
    """How many ranks each dim of the two views of a world has: pp * dp * tp = pp * edp * ep * etp."""

    pp: int
    dp: int
    tp: int
    edp: int
    ep: int
    etp: int


class Training(NamedTuple):
    sizes: Sizes
    steps: int
    clip: float
    microbatches: int


class Stage(nn.Module):
    """Some layers of `one_process.loss`, on this rank's tokens: its dp part of the sequences, its tp slice of their length.

    Their balance losses are attached to what goes on to the next stage.
    """

    def __init__(self, sizes: Sizes, mine: range, mesh: MoEMesh, layer: Layer) -> None:
        super().__init__()
        self.mine, self.mesh, self.layer = mine, mesh, layer
        self.first, self.last = mine[0] == 0, mine[-1] == sizes.layers - 1
        whole = {name: p for name, p in one_process.initial(sizes).items() if (self.last if name == "head" else int(name[0]) in mine)}
        self.shapes = {name: p.shape for name, p in whole.items()}
        self.values = nn.ParameterList(self.shard(name, p) for name, p in whole.items())
        self.balances: list[Tensor] = []  # of each layer and microbatch

    def named(self) -> dict[str, Tensor]:
        return dict(zip(self.shapes, self.values, strict=True))

    def spread(self, name: str) -> list[tuple[DeviceMesh, int]]:
        """What `SPREAD` says of a parameter, in this mesh."""
        view = self.mesh.dense if "dense" in name else self.mesh.expert
        return [(view[group], dim) for group, dim in SPREAD.get(name[2:], [])]

    def shard(self, name: str, whole: Tensor) -> Tensor:
        return functools.reduce(lambda p, at: mf.slice_scatter(p, *at), self.spread(name), whole.clone())

    def whole(self, name: str, shard: Tensor) -> Tensor:
        for group, dim in self.spread(name):
            shard = mf.slice_gather(shard, group, dim, size=self.shapes[name][dim])
        return shard

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = x.detach().requires_grad_()  # as what comes from a stage does, so that one graph is every layer's
        named = self.named()
        for i in self.mine:
            own = (named[f"{i}.{name}"] for name in ("dense.into", "dense.out", "gate", "experts.into", "experts.out"))
            x, balance = self.layer(x, *own)
            self.balances.append(balance.detach())
        return x @ named["head"].T if self.last else x


def layer_on(mesh: MoEMesh, k: int) -> Layer:
    """A layer on x [B, length / tp, D], with the dense parameters and the experts that this rank has of it."""

    def layer(x: Tensor, into: Tensor, out: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        x = x + dense(x, into, out, mesh.dense["tp"])
        z, balance = moe(x.flatten(0, 1), gate, up, down, k, mesh)
        return x + mf.attach_loss(z, balance, BALANCE / mesh.stage.size()).view_as(x), balance

    return layer


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


def train(of: Training, split: Split, schedule: str = "GPipe", compiled: bool = False) -> Run:
    """`one_process.train` on this rank's part of the tokens, of the layers, of the dense parameters and of the experts.

    Where it is compiled, a layer is, whole, and once for all of them.
    """
    torch._dynamo.reset()  # what it knows of other cases' groups would only grow
    before = set(dist.distributed_c10d._world.pg_map)
    mesh = moe_mesh("cpu", pp=split.pp, dp=split.dp, tp=split.tp, ep=split.ep, etp=split.etp)
    assert tuple(mesh.expert.shape) == (split.pp, split.edp, split.ep, split.etp)
    pp = mesh.dense["pp"]
    run, modules = pipeline(of, mesh, schedule, compiled)
    parameters = {name: p for module in modules for name, p in module.named().items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE)
    # The ranks that have the same part of a parameter, each with its own tokens' part of the gradient; no other stage has any.
    repeated = {"*.dense.*": mesh.dense["dp"], "*.experts.*": mesh.expert["edp"], "*": mesh.stage}
    # The groups whose ranks have different parts.
    parts = {"*.dense.*": [mesh.dense["tp"], pp], "*.experts.*": [mesh.expert["ep"], mesh.expert["etp"], pp], "*": pp}

    losses, norms = [], []
    for step in range(of.steps):
        errors = run(*(share(whole, of.microbatches, mesh) for whole in one_process.batch(of.sizes, step)))
        mf.sync_grads_(parameters, repeated, reduce="sum")
        norms.append(mf.clip_grad_norm_(parameters, of.clip, parts).item())
        optimizer.step()
        optimizer.zero_grad()
        balances = [BALANCE * balance for module in modules for balance in module.balances]
        losses.append(total([total(errors, mesh.stage), *balances], pp).item() / of.microbatches)
        for module in modules:
            module.balances.clear()
    whole = {name: module.whole(name, p.detach()) for module in modules for name, p in module.named().items()}
    dist.barrier()
    for group in set(dist.distributed_c10d._world.pg_map) - before:  # the sockets of all cases together would be too many
        dist.destroy_process_group(group)
    return Run(losses, norms, whole)


def pipeline(of: Training, mesh: MoEMesh, schedule: str, compiled: bool) -> tuple[Callable[[Tensor, Tensor], list[Tensor]], list[Stage]]:
    """This rank's stages, and what runs them forward and backward and gives the errors of the last one: of each microbatch this rank's
    part of the mean."""
    pp, ranks, sizes = mesh.dense["pp"], mesh.stage.size(), of.sizes
    kind = schedules.get_schedule_class(schedule)
    single = issubclass(kind, schedules.PipelineScheduleSingle)
    count, place = pp.size() * (1 if single else 2), pp.get_local_rank()
    places = [place] if single else [place, count - 1 - place] if "ZBV" in schedule else [place, place + pp.size()]
    layer = layer_on(mesh, sizes.top_k)
    if compiled:
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    own = sizes.layers // count
    modules = [Stage(sizes, range(i * own, (i + 1) * own), mesh, layer) for i in places]
    shape = sizes.batch // of.microbatches // mesh.dense["dp"].size(), sizes.length // mesh.dense["tp"].size(), sizes.dim
    example = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    stages = [
        PipelineStage(module, i, count, torch.device("cpu"), example, example, group=pp.get_group())
        for i, module in zip(places, modules, strict=True)
    ]
    plan = kind(stages[0] if single else stages, of.microbatches, loss_fn=lambda out, y: mse_loss(out, y) / ranks)
    first, last = any(module.first for module in modules), any(module.last for module in modules)

    def run(x: Tensor, y: Tensor) -> list[Tensor]:
        errors: list[Tensor] = []
        # A zero-bubble schedule runs a stage's backward in two parts, for its input and then for its weights, through the same graph. A
        # compiled graph is one node to it, which it runs twice as a whole, exchanges and all: so its buffers must not be given away.
        with torch._functorch.config.patch(donated_buffer=not schedule.endswith("ZeroBubble")):
            plan.step(*([x] if first else []), target=y if last else None, losses=errors)
        return [error.detach() for error in errors]

    return run, modules


def share(whole: Tensor, microbatches: int, mesh: MoEMesh) -> Tensor:
    """This rank's part of each microbatch of a batch, one behind the other."""
    pieces = (mf.slice_scatter(microbatch, mesh.dense["dp"]) for microbatch in whole.chunk(microbatches))
    return torch.cat([mf.slice_scatter(piece, mesh.dense["tp"], dim=1) for piece in pieces])


def total(parts: list[Tensor], group: DeviceMesh) -> Tensor:
    """The sum of all parts of all ranks of a group."""
    mine = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
    return mf.slice_gather(mine[None], group).sum()


def assert_is_one_process(runs: list[Run], expected: Run) -> None:
    """float64 on both sides: only the order of sums differs."""
    assert {name for run in runs for name in run.parameters} == set(expected.parameters)
    for run in runs:
        torch.testing.assert_close(run.losses, expected.losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(run.norms, expected.norms, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(run.parameters, {name: expected.parameters[name] for name in run.parameters}, rtol=1e-8, atol=1e-10)
