"""Each expert's hidden dim split over etp ranks, beside ep and edp: the same training as on one process, in either order of the sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import silu

import moecomm.functional as mf
from tests import layers, one_process
from tests.layers import experts_by_row
from tests.one_process import RATE, Run, Sizes
from tests.spawn import run_ranks

pytestmark = pytest.mark.slow  # whole trainings; the inner loop has those of test_expert_parallel.py and test_hybrid.py

STEPS, CLIP = 5, 0.5
SPLIT = {"into": 1, "out": 2}  # the hidden dim of the experts' weights: columns of the first, rows of the second


def slices(x: Tensor, gate: Tensor, into: Tensor, out: Tensor, k: int, mesh: DeviceMesh, tokens: Any) -> tuple[Tensor, Tensor]:
    """Each rank has tokens of its own, which its etp ranks get as well; the sums go back as slices, after the combine."""
    logits = x @ gate.T
    weights, experts = mf.route(logits, k)
    whole, every_weight = (mf.slice_gather(each, mesh["etp"], grad="reduce") for each in (x, weights))  # [etp * T, ...]
    plan = mf.plan(mf.slice_gather(experts, mesh["etp"]), every_weight, gate.shape[0], mesh["ep"], like=whole)
    rows = experts_by_row(mf.dispatch(whole, plan), into, out, plan.offsets)  # this rank's part of each sum over the hidden dim
    y = mf.slice_reduce(mf.combine(rows, plan), mesh["etp"])
    return y, mf.load_balance_loss(logits.softmax(-1), experts, tokens)


def after(x: Tensor, gate: Tensor, into: Tensor, out: Tensor, k: int, mesh: DeviceMesh, tokens: Any) -> tuple[Tensor, Tensor]:
    """The etp ranks have the same tokens; their parts are summed after the combine, [T, D]."""
    logits = x @ gate.T
    weights, experts = mf.route(logits, k)
    plan = mf.plan(experts, mf.sum_gradient(weights, mesh["etp"]), gate.shape[0], mesh["ep"], like=x)
    rows = experts_by_row(mf.dispatch(mf.sum_gradient(x, mesh["etp"]), plan), into, out, plan.offsets)
    y = mf.sum_ranks(mf.combine(rows, plan), mesh["etp"])
    return y, mf.load_balance_loss(logits.softmax(-1), experts, tokens)


def before(x: Tensor, gate: Tensor, into: Tensor, out: Tensor, k: int, mesh: DeviceMesh, tokens: Any) -> tuple[Tensor, Tensor]:
    """The etp ranks have the same tokens; their parts are summed before the combine, [N, D], which has the whole rows."""
    logits = x @ gate.T
    weights, experts = mf.route(logits, k)
    plan = mf.plan(experts, weights, gate.shape[0], mesh["ep"], like=x)
    rows = mf.dispatch(x, plan)
    rows = experts_by_row(mf.sum_gradient(rows, mesh["etp"]), into, out, plan.offsets)
    y = mf.combine(mf.sum_ranks(rows, mesh["etp"]), plan)
    return y, mf.load_balance_loss(logits.softmax(-1), experts, tokens)


LAYERS = {"slices": slices, "after": after, "before": before}


def train(sizes: Sizes, shape: tuple[int, int, int], order: str, dtensors: bool, compiled: bool) -> Run:
    """`one_process.train` on this rank's share of the batch, of the experts and of their hidden dim."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("edp", "ep", "etp"))
    _, ep, etp = shape
    spread, dp = mesh["ep", "etp"], mesh["edp", "ep"]._flatten("dp")
    tokens = None if order == "slices" else dp  # the ranks that have different tokens
    rank = mesh.get_rank() if tokens is None else dp.get_local_rank()
    ranks = mesh.size() if tokens is None else dp.size()
    parameters = {}
    for name, whole in one_process.initial(sizes).items():
        part = whole.clone()
        if "experts" in name:
            hidden = SPLIT[name.rsplit(".", 1)[1]]
            if dtensors:
                part = distribute_tensor(whole, spread, [Shard(0), Shard(hidden)])
            else:
                part = whole.chunk(ep)[mesh.get_local_rank("ep")].tensor_split(etp, hidden)[mesh.get_local_rank("etp")].clone()
        parameters[name] = part.requires_grad_()
    groups: dict[Any, Any] = {"*.experts.*": mesh["edp"], "*": tokens}
    parts: dict[Any, Any] = {"*.experts.*": [mesh["ep"], mesh["etp"]], "*": ""}
    experts = [p for name, p in parameters.items() if "experts" in name]
    optimizer = torch.optim.AdamW(
        [{"params": [p for name, p in parameters.items() if "experts" not in name]}, {"params": experts}], lr=RATE
    )

    def forward(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        def moe(x: Tensor, gate: Tensor, into: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
            into, out = (p.to_local() if isinstance(p, DTensor) else p for p in (into, out))
            return LAYERS[order](x, gate, into, out, sizes.top_k, mesh, tokens)

        return layers.loss(parameters, x, y, sizes, moe)

    step_loss = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    losses, norms = [], []
    for step in range(STEPS):
        x, y = (each.chunk(ranks)[rank] for each in one_process.batch(sizes, step))
        loss = step_loss(parameters, x, y)
        (loss / ranks).backward()
        mf.sync_grads_(parameters, groups, reduce="sum")
        norms.append(mf.clip_grad_norm_(parameters, CLIP, None if dtensors else parts).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mf.slice_gather(loss.detach()[None], tokens).mean().item())
    return Run(losses, norms, {name: gathered(name, p.detach(), mesh) for name, p in parameters.items()})


def gathered(name: str, part: Tensor, mesh: DeviceMesh) -> Tensor:
    """The whole parameter, of which the ranks' parts may differ in length."""
    if isinstance(part, DTensor):
        return part.full_tensor()
    if "experts" not in name:
        return part
    hidden = SPLIT[name.rsplit(".", 1)[1]]
    pieces: list[Any] = [None] * mesh["etp"].size()
    torch.distributed.all_gather_object(pieces, part, mesh.get_group("etp"))
    return mf.slice_gather(torch.cat(pieces, hidden), mesh["ep"])


def assert_is_one_process(sizes: Sizes, *how: Any) -> None:
    expected = one_process.train(sizes, STEPS, CLIP)
    shape = how[0]
    for run in run_ranks(train, shape[0] * shape[1] * shape[2], sizes, *how, timeout=200):
        torch.testing.assert_close(run.losses, expected.losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(run.norms, expected.norms, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(run.parameters, expected.parameters, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", LAYERS)
@pytest.mark.parametrize("shape", [(1, 2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((2, 1, 2), (1, 1, 2)))])
def test_tensor_parallel_training_is_that_of_one_process(shape: tuple[int, int, int], order: str) -> None:
    assert_is_one_process(Sizes(), shape, order, False, False)


@pytest.mark.parametrize("hidden", [7, 3])
def test_the_hidden_dim_need_not_divide(hidden: int) -> None:
    """3 over 4 ranks leaves one of them without any part."""
    assert_is_one_process(Sizes(hidden=hidden), (1, 1, 4), "after", False, False)


@pytest.mark.parametrize("hidden", [pytest.param(12, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("order", LAYERS)
def test_expert_weights_may_be_dtensors_sharded_over_ep_and_the_hidden_dim(order: str, hidden: int) -> None:
    assert_is_one_process(Sizes(hidden=hidden), (1, 2, 2), order, True, False)


@pytest.mark.slow
@pytest.mark.exhaustive  # test_hybrid.py compiles one in every run
@pytest.mark.parametrize(("order", "dtensors"), [("after", True), ("slices", False), ("before", False)])
def test_compiled_tensor_parallel_training_is_that_of_one_process(order: str, dtensors: bool) -> None:
    assert_is_one_process(Sizes(), (1, 2, 2), order, dtensors, True)


def by_dtensor_here() -> None:
    """The experts as torch's own DTensors compute them: columns, then rows, and a Partial sum that slice_reduce and sum_ranks take."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("etp",))
    generator = torch.Generator().manual_seed(0)
    x, into, out = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 8), (10, 8), (8, 10)))
    grad = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    leaves = [each.clone().requires_grad_() for each in (x, into, out)]
    y = silu(leaves[0] @ leaves[1].T) @ leaves[2].T
    y.backward(grad)
    for end in (mf.sum_ranks, mf.slice_reduce):
        rows = x.clone().requires_grad_()
        columns, back = (distribute_tensor(each, mesh, [Shard(dim)]).requires_grad_() for dim, each in enumerate((into, out)))
        shared = DTensor.from_local(rows, mesh, run_check=False)  # Replicate: DTensor sums its gradient itself
        part = silu(shared @ columns.T) @ back.T
        assert part.placements[0].is_partial()
        got = end(part, mesh)
        torch.testing.assert_close(got.full_tensor(), y.detach(), rtol=1e-12, atol=1e-12)
        got.backward(distribute_tensor(grad, mesh, got.placements))
        torch.testing.assert_close(rows.grad, leaves[0].grad, rtol=1e-12, atol=1e-12)
        for weight, leaf in ((columns, leaves[1]), (back, leaves[2])):
            torch.testing.assert_close(weight.grad.full_tensor(), leaf.grad, rtol=1e-12, atol=1e-12)


def test_an_expert_may_be_computed_by_dtensors_own_columns_and_rows() -> None:
    run_ranks(by_dtensor_here, 2)
