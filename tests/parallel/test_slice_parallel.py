"""Tokens that a group of ranks has whole, routed in slices: the layer and the training of one process, and how many exchanges it takes."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import mse_loss

import moecomm.functional as mf
from moecomm.parallel.group import GroupLike
from tests import layers, one_process
from tests.one_process import BALANCE, RATE, Run, Sizes
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

pytestmark = pytest.mark.slow  # whole trainings; the inner loop has those of test_expert_parallel.py and test_hybrid.py

A2A, GATHER = "all_to_all_single", "all_gather_into_tensor"
STEPS, CLIP = 5, 0.5  # the norms of all steps are above the clip's


def moe_of_slices(
    x: Tensor, gate: Tensor, into: Tensor, out: Tensor, k: int, tp: GroupLike, ep: GroupLike, grad: Literal["slice", "reduce"] = "slice"
) -> tuple[Tensor, Tensor]:
    """x [T, D], the same on all ranks of tp, each of which routes its slice: y [T, D] on all of them, and the balance loss of all ranks."""
    z, balance = layers.moe(mf.slice_scatter(x, tp), gate, into, out, k, ep, None)
    return mf.slice_gather(z, tp, grad=grad, size=x.shape[0]), balance


def train(sizes: Sizes, dp: int, tp: int, way: str, compiled: bool) -> Run:
    """`one_process.train`, the experts spread over all ranks: the tp ranks have the same sequences, whole or, where ``way`` is "sequence",
    in slices along their length from the beginning to the end."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    everyone = mesh._flatten("ep")
    ranks, rank = mesh.size(), mesh.get_rank()
    parameters = {
        name: (p.chunk(ranks)[rank] if "experts" in name else p).clone().requires_grad_() for name, p in one_process.initial(sizes).items()
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE)

    def forward(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The part that this rank's tokens have in the mean over all of them, and the balance loss, which is that of all ranks."""
        balances = []
        for i in range(sizes.layers):
            own = {name.removeprefix(f"{i}."): p for name, p in parameters.items() if name.startswith(f"{i}.")}
            x = x + one_process.dense(x, own["dense.into"], own["dense.out"])
            tokens = x.flatten(0, 1)
            if way == "sequence":
                z, balance = layers.moe(tokens, own["gate"], own["experts.into"], own["experts.out"], sizes.top_k, everyone, None)
            else:
                z, balance = moe_of_slices(tokens, own["gate"], own["experts.into"], own["experts.out"], sizes.top_k, mesh["tp"], everyone)
            x = x + z.view_as(x)
            balances.append(balance)
        whole = sizes.batch * sizes.length * sizes.dim
        return mse_loss(x @ parameters["head"].T, y, reduction="sum") / whole, BALANCE * torch.stack(balances).sum()

    # Where the tp ranks have the same tokens, they have the same gradients of the dense parameters, which are added up over dp alone. Of
    # the gate each has its own slice's.
    tokens = None if way == "sequence" else mesh["dp"]
    groups: dict[Any, Any] = {"*.experts.*": "", "*.gate": None, "*": tokens}
    step_loss = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    losses, norms = [], []
    for step in range(STEPS):
        x, y = (each.chunk(dp)[mesh.get_local_rank("dp")] for each in one_process.batch(sizes, step))
        if way == "sequence":
            x, y = (mf.slice_scatter(each, mesh["tp"], dim=1) for each in (x, y))
        part, balance = step_loss(parameters, x, y)
        (part + balance / ranks).backward()  # each rank's balance loss has a part in all ranks' gradients
        mf.sync_grads_(parameters, groups, reduce="sum")
        norms.append(mf.clip_grad_norm_(parameters, CLIP, {"*.experts.*": everyone, "*": ""}).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append((mf.sum_ranks(part.detach(), tokens) + balance.detach()).item())
    whole = {name: mf.slice_gather(p.detach(), everyone) if "experts" in name else p.detach() for name, p in parameters.items()}
    return Run(losses, norms, whole)


SHAPES = [(1, 2), (2, 2), (1, 4)]


@pytest.mark.parametrize(
    ("dp", "tp", "compiled", "way"),
    [
        *((*shape, False, way) for shape in SHAPES for way in ("whole", "sequence")),
        *(pytest.param(2, 2, True, way, marks=pytest.mark.exhaustive) for way in ("whole", "sequence")),  # test_hybrid.py compiles one
    ],
)
def test_training_on_slices_is_that_of_one_process(dp: int, tp: int, compiled: bool, way: str) -> None:
    sizes = Sizes(batch=2, length=7)  # on a rank 7 or 14 tokens, which 2 and 4 do not, or do not all, divide
    expected = one_process.train(sizes, STEPS, CLIP)
    for run in run_ranks(train, dp * tp, sizes, dp, tp, way, compiled, timeout=200):
        torch.testing.assert_close(run.losses, expected.losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(run.norms, expected.norms, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(run.parameters, expected.parameters, rtol=1e-8, atol=1e-10)


def sequence_here(tokens: int) -> tuple[list[str], list[str]]:
    """What a layer sends whose tokens are in slices before it and after it."""
    sizes = Sizes()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    gate, into, out = (one_process.initial(sizes)[f"0.{name}"] for name in ("gate", "experts.into", "experts.out"))
    piece = mf.slice_scatter(torch.ones(tokens, sizes.dim, dtype=torch.float64), mesh["tp"])
    local = [each.clone().requires_grad_() for each in (piece, gate, *(mf.slice_scatter(p, mesh["tp"]) for p in (into, out)))]
    with Traffic() as forward:
        y, _ = layers.moe(*local, sizes.top_k, mesh["tp"], None)
    with Traffic() as backward:
        y.sum().backward()
    return forward.collectives, backward.collectives


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_a_layer_between_slices_of_a_sequence_sends_its_own_exchanges_alone(ranks: int) -> None:
    for forward, backward in run_ranks(sequence_here, ranks, 7):
        assert sorted(forward) == sorted([A2A] * 3 + [GATHER])  # the gather is the balance loss's
        assert backward == [A2A] * 3


def layer_here(tokens: int, grad: str) -> tuple[list[str], list[str]]:
    """One layer whose consumers have the same gradient on all ranks ("slice") or each its own ("reduce"), against all of it here."""
    mesh = init_device_mesh("cpu", (1, torch.distributed.get_world_size()), mesh_dim_names=("dp", "tp"))
    rank, ranks, sizes = mesh.get_rank(), mesh.size(), Sizes()
    seed = torch.Generator().manual_seed(tokens)
    parameters = [one_process.initial(sizes)[f"0.{name}"] for name in ("gate", "experts.into", "experts.out")]
    x = torch.randn(tokens, sizes.dim, generator=seed, dtype=torch.float64)
    heads = [torch.randn(tokens, sizes.dim, generator=seed, dtype=torch.float64) for _ in range(ranks)]  # what each rank makes of y

    all_of_it = [each.clone().requires_grad_() for each in (x, *parameters)]
    y, _ = one_process.moe(all_of_it[0], *all_of_it[1:], sizes.top_k)
    (y * (heads[0] if grad == "slice" else sum(heads))).sum().backward()

    local = [x, parameters[0], *(p.chunk(ranks)[rank] for p in parameters[1:])]
    local = [each.clone().requires_grad_() for each in local]
    everyone = mesh._flatten("ep")  # made now: a group is made by messages, which are none of the layer's
    with Traffic() as forward:
        got, _ = moe_of_slices(local[0], *local[1:], sizes.top_k, mesh["tp"], everyone, grad)
    torch.testing.assert_close(got, y.detach(), rtol=1e-12, atol=1e-12)
    with Traffic() as backward:
        (got * heads[rank if grad == "reduce" else 0]).sum().backward()
    torch.testing.assert_close(local[0].grad, all_of_it[0].grad, rtol=1e-11, atol=1e-12)
    mf.sync_grads_([local[1]], None, reduce="sum")  # each rank has its own tokens' part of the gate's
    torch.testing.assert_close(local[1].grad, all_of_it[1].grad, rtol=1e-11, atol=1e-12)
    for mine, whole in zip(local[2:], all_of_it[2:], strict=True):
        torch.testing.assert_close(mine.grad, whole.grad.chunk(ranks)[rank], rtol=1e-11, atol=1e-12)
    return forward.collectives, backward.collectives


@pytest.mark.parametrize("ranks", [2, FOUR])
@pytest.mark.parametrize("grad", ["slice", "reduce"])
def test_a_layer_of_slices_takes_one_gather_beside_its_own_exchanges_each_way(ranks: int, grad: str) -> None:
    for tokens in (8, 7, 1, 2):
        for forward, backward in run_ranks(layer_here, ranks, tokens, grad):
            assert sorted(forward) == sorted([A2A] * 3 + [GATHER] * 2)  # the balance loss has one gather of its own
            # Back from the gather of y nothing is sent, or one reduce; back from the slice of x, one gather.
            assert sorted(backward) == sorted([A2A] * (3 + (grad == "reduce")) + [GATHER])
