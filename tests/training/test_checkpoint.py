"""Training saved on one arrangement of ranks and gone on with on another: the losses are those of one process without the break."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import mse_loss

import moecomm.functional as mf
from tests import one_process
from tests.one_process import BALANCE, RATE, Sizes
from tests.parallel.test_tensor_parallel import SPLIT, slices
from tests.spawn import run_ranks

pytestmark = pytest.mark.slow  # whole trainings; the inner loop has those of test_expert_parallel.py and test_hybrid.py

STEPS, CLIP = 6, 0.5  # a third of them on each arrangement


class Arrangement(NamedTuple):
    edp: int
    ep: int
    etp: int
    fsdp: bool = False  # the dense parameters sharded over all ranks


ALONE = Arrangement(1, 1, 1)


class Weights(nn.Module):
    """Parameters by the last part of their names."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, nn.Parameter(parameter))


class Dense(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return one_process.dense(x, self.into, self.out)


class Layer(nn.Module):
    def __init__(self, own: dict[str, Tensor], k: int, mesh: DeviceMesh) -> None:
        super().__init__()
        self.k, self.mesh = k, mesh
        self.dense = Dense({"into": own["dense.into"], "out": own["dense.out"]})
        self.gate = nn.Parameter(own["gate"])
        # Shard(0) is ep, the hidden dim etp; over edp they are alike.
        experts = {name: (own[f"experts.{name}"], [Shard(0), Shard(dim)]) for name, dim in SPLIT.items()}
        self.experts = Weights({name: distribute_tensor(whole, mesh["ep", "etp"], how) for name, (whole, how) in experts.items()})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.dense(x)
        into, out = self.experts.into.to_local(), self.experts.out.to_local()
        z, balance = slices(x.flatten(0, 1), self.gate, into, out, self.k, self.mesh, None)
        return x + z.view_as(x), balance


class Model(nn.Module):
    def __init__(self, sizes: Sizes, mesh: DeviceMesh, seed: int) -> None:
        super().__init__()
        initial = one_process.initial(sizes, seed)
        own = [{name.removeprefix(f"{i}."): p for name, p in initial.items() if name.startswith(f"{i}.")} for i in range(sizes.layers)]
        self.layers = nn.ModuleList(Layer(each, sizes.top_k, mesh) for each in own)
        self.head = nn.Parameter(initial["head"])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        balances = []
        for layer in self.layers:
            x, balance = layer(x)
            balances.append(balance)
        return mse_loss(x @ self.head.T, y) + BALANCE * torch.stack(balances).sum()


def train(sizes: Sizes, how: Arrangement, source: Path, target: Path, steps: range) -> list[float]:
    """The losses of these steps, from the checkpoint ``source``, unless they are the first; ``target`` is a checkpoint after them."""
    mesh = init_device_mesh("cpu", how[:3], mesh_dim_names=("edp", "ep", "etp"))
    ranks, rank = mesh.size(), mesh.get_rank()
    model = Model(sizes, mesh, seed=steps.start)  # only the first model is the one that training begins with
    experts = {parameter for layer in model.layers for parameter in layer.experts.parameters()}
    if how.fsdp:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",)), ignored_params=experts)
        model.set_gradient_divide_factor(1)  # the loss is divided by the ranks
        model.set_force_sum_reduction_for_comms(True)
    kinds = [[p for p in model.parameters() if (p in experts) == expert] for expert in (False, True)]
    optimizer = torch.optim.AdamW([{"params": kind} for kind in kinds], lr=RATE)
    if steps.start:
        state = state_of(model, optimizer)
        dcp.load(state, checkpoint_id=source)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses = []
    for step in steps:
        x, y = (each.chunk(ranks)[rank] for each in one_process.batch(sizes, step))
        loss = model(x, y)
        (loss / ranks).backward()
        groups: dict[Any, Any] = {"*.experts.*": mesh["edp"], "*": "" if how.fsdp else None}
        mf.sync_grads_(model, groups, reduce="sum")
        mf.clip_grad_norm_(model, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mf.slice_gather(loss.detach()[None], None).mean().item())
    dcp.save(state_of(model, optimizer), checkpoint_id=target)
    return losses


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


@pytest.mark.parametrize(
    ("before", "between", "after"),
    [
        (Arrangement(1, 4, 1), Arrangement(2, 2, 1), ALONE),
        pytest.param(ALONE, Arrangement(1, 2, 2), Arrangement(1, 4, 1), marks=pytest.mark.exhaustive),
        (Arrangement(2, 2, 1, fsdp=True), Arrangement(1, 4, 1), Arrangement(1, 2, 1, fsdp=True)),
        pytest.param(Arrangement(1, 2, 2, fsdp=True), Arrangement(2, 1, 1, fsdp=True), Arrangement(2, 1, 2), marks=pytest.mark.exhaustive),
    ],
)
def test_training_goes_on_from_a_checkpoint_on_another_mesh(
    before: Arrangement, between: Arrangement, after: Arrangement, tmp_path: Path
) -> None:
    sizes = Sizes()
    expected = one_process.train(sizes, STEPS, CLIP).losses
    start = 0
    for i, how in enumerate((before, between, after)):
        stop = start + STEPS // 3
        ranks, folders = how.edp * how.ep * how.etp, (tmp_path / str(i - 1), tmp_path / str(i))
        for losses in run_ranks(train, ranks, sizes, how, *folders, range(start, stop)):
            torch.testing.assert_close(losses, expected[start:stop], rtol=1e-9, atol=1e-11)
        start = stop
