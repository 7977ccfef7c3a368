"""Pipeline stages, each with its experts spread over its own ranks: the same training as on one process, whatever the schedule."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn.functional import mse_loss

import moecomm.functional as mf
from moecomm.group import GroupLike
from moecomm.mesh import MoEMesh, moe_mesh
from tests import layers, one_process
from tests.one_process import BALANCE, RATE, Run, Sizes
from tests.spawn import run_ranks

pytestmark = pytest.mark.slow  # whole trainings; the inner loop has those of test_expert_parallel.py and test_hybrid.py

STEPS = 4
MICROBATCHES = 4
CLIP = 2.0  # below the norms of all steps
SIZES = Sizes(layers=4)
# Each schedule, and the stages of pipeline rank r of 2.
SCHEDULES = {
    ScheduleGPipe: [[0], [1]],
    Schedule1F1B: [[0], [1]],
    ScheduleInterleaved1F1B: [[0, 2], [1, 3]],
    ScheduleInterleavedZeroBubble: [[0, 2], [1, 3]],
    ScheduleZBVZeroBubble: [[0, 3], [1, 2]],
}


class Stage(nn.Module):
    """Some layers of `one_process.loss`; their balance losses are attached to what goes on to the next stage."""

    def __init__(self, mine: list[int], mesh: MoEMesh, compiled: bool) -> None:
        super().__init__()
        self.mine, self.mesh, self.ranks = mine, mesh, mesh.stage.size()
        ep, place = mesh.expert["ep"].size(), mesh.expert["ep"].get_local_rank()
        self.last = mine[-1] == SIZES.layers - 1
        whole = {name: p for name, p in one_process.initial(SIZES).items() if (self.last if name == "head" else int(name[0]) in mine)}
        self.names = list(whole)
        self.values = nn.ParameterList(p.chunk(ep)[place].clone() if "experts" in name else p for name, p in whole.items())
        self.layers = torch.compile(self.run, fullgraph=True, backend="aot_eager") if compiled else self.run
        self.balances: list[Tensor] = []  # of each microbatch

    def named(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    def run(self, x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        balances = []
        for i in self.mine:
            own = {name.removeprefix(f"{i}."): p for name, p in parameters.items() if name.startswith(f"{i}.")}
            x = x + one_process.dense(x, own["dense.into"], own["dense.out"])
            experts = own["gate"], own["experts.into"], own["experts.out"]
            z, balance = layers.moe(x.flatten(0, 1), *experts, SIZES.top_k, self.mesh.expert["ep"], self.mesh.stage)
            x = x + mf.attach_loss(z, balance, BALANCE / self.ranks).view_as(x)
            balances.append(balance)
        return x @ parameters["head"].T if self.last else x, torch.stack(balances).sum().detach()

    def forward(self, x: Tensor) -> Tensor:
        x, balance = self.layers(x, self.named())
        self.balances.append(balance)
        return x


def train(name: str, compiled: bool) -> Run:
    """`one_process.train` with the layers of this rank's stages, and its share of each microbatch and of the experts."""
    schedule_type, placing = next((schedule, placing) for schedule, placing in SCHEDULES.items() if schedule.__name__ == name)
    mesh = moe_mesh("cpu", pp=2, ep=2)
    ranks, rank, pipeline = mesh.stage.size(), mesh.stage.get_local_rank(), mesh.dense["pp"]
    count = sum(len(stages) for stages in placing)
    per_stage = SIZES.layers // count
    modules = {s: Stage(list(range(s * per_stage, (s + 1) * per_stage)), mesh, compiled) for s in placing[pipeline.get_local_rank()]}
    example = torch.zeros(SIZES.batch // MICROBATCHES // ranks, SIZES.length, SIZES.dim, dtype=torch.float64, requires_grad=True)
    stages = [
        PipelineStage(module, s, count, torch.device("cpu"), example, example, group=pipeline.get_group()) for s, module in modules.items()
    ]
    single = len(stages) == 1
    schedule = schedule_type(stages[0] if single else stages, MICROBATCHES, loss_fn=lambda out, y: mse_loss(out, y) / ranks)
    parameters = {name: p for module in modules.values() for name, p in module.named().items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE)

    losses, norms = [], []
    for step in range(STEPS):
        x, y = (share(whole, ranks, rank) for whole in one_process.batch(SIZES, step))
        errors: list[Tensor] = []  # of each microbatch, on the last stage's ranks
        # A zero-bubble schedule runs a stage's backward in two parts, for its input and then for its weights, through the same graph. A
        # compiled graph is one node to it, which it runs twice as a whole, exchanges and all: so its buffers must not be given away.
        with torch._functorch.config.patch(donated_buffer=not name.endswith("ZeroBubble")):
            schedule.step(*([x] if 0 in modules else []), target=y if count - 1 in modules else None, losses=errors)
        # A stage's gradients are the sums over its own ranks, and no others.
        mf.sync_grads_(parameters, {"*.experts.*": mesh.expert["edp"], "*": mesh.stage}, reduce="sum")
        norms.append(mf.clip_grad_norm_(parameters, CLIP, {"*.experts.*": [mesh.expert["ep"], pipeline], "*": pipeline}).item())
        optimizer.step()
        optimizer.zero_grad()
        error = total([e.detach() for e in errors], mesh.stage)  # they are divided by the ranks
        balance = torch.stack([b for module in modules.values() for b in module.balances]).sum()
        for module in modules.values():
            module.balances.clear()
        losses.append(total([error, BALANCE * balance], pipeline).item() / MICROBATCHES)
    whole = {name: mf.slice_gather(p.detach(), mesh.expert["ep"]) if "experts" in name else p.detach() for name, p in parameters.items()}
    return Run(losses, norms, whole)


def share(whole: Tensor, ranks: int, rank: int) -> Tensor:
    """This rank's part of each microbatch of a batch, one behind the other."""
    return torch.cat([microbatch.chunk(ranks)[rank] for microbatch in whole.chunk(MICROBATCHES)])


def total(parts: list[Tensor], group: GroupLike) -> Tensor:
    """The sum of all parts of all ranks."""
    mine = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
    return mf.slice_gather(mine[None], group).sum()


EAGER = [(schedule.__name__, False) for schedule in SCHEDULES]
COMPILED = [
    pytest.param(ScheduleGPipe.__name__, True, marks=pytest.mark.slow),
    pytest.param(ScheduleInterleaved1F1B.__name__, True, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    pytest.param(ScheduleZBVZeroBubble.__name__, True, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
]


@pytest.mark.parametrize(("schedule", "compiled"), [*EAGER, *COMPILED])
def test_pipelined_training_is_that_of_one_process(schedule: str, compiled: bool) -> None:
    expected = one_process.train(SIZES, STEPS, CLIP, MICROBATCHES)
    assert min(expected.norms) > CLIP
    runs = run_ranks(train, 4, schedule, compiled)
    assert {name for run in runs for name in run.parameters} == set(expected.parameters)
    for run in runs:
        torch.testing.assert_close(run.losses, expected.losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(run.norms, expected.norms, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(run.parameters, {name: expected.parameters[name] for name in run.parameters}, rtol=1e-8, atol=1e-10)


def sent_here(name: str) -> int:
    """How many all-to-alls a training starts."""
    with patch.object(dist, "all_to_all_single", side_effect=dist.all_to_all_single) as exchange:
        train(name, compiled=False)
    return exchange.call_count


def test_a_backward_pass_split_into_that_of_inputs_and_that_of_weights_exchanges_no_more() -> None:
    assert run_ranks(sent_here, 4, "ScheduleInterleavedZeroBubble") == run_ranks(sent_here, 4, "ScheduleInterleaved1F1B")


def compiled_module_here() -> None:
    module = torch.compile(nn.Linear(2, 2))
    pipeline = moe_mesh("cpu", pp=2, ep=2).dense["pp"]
    stages = [PipelineStage(module, s, 4, torch.device("cpu"), group=pipeline.get_group()) for s in (pipeline.get_local_rank(), 2)]
    with pytest.raises(RuntimeError, match="schedule is not supported with stage modules that have used torch.compile"):
        ScheduleInterleavedZeroBubble(stages, MICROBATCHES, loss_fn=mse_loss)


def test_zero_bubble_takes_a_compiled_function_but_torch_refuses_a_compiled_module() -> None:
    run_ranks(compiled_module_here, 4)
