"""Experts that move in the middle of a training: every tensor is where it must be, and the losses are those without moves."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import moecomm.functional as mf
from moecomm.errors import MoECommError
from moecomm.ops.exchange.all_to_all import start
from moecomm.planner import move_experts_
from tests import layers, one_process
from tests.faults.faults import FAULTY, At, Fault, lost_ranks
from tests.one_process import RATE, Sizes
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

Rows = list[list[int]]
CLIP = 0.3  # below the norms of all steps

# Each has the placements of one training, from the first to the last.
SWAPS = {
    2: [[[0, 1, 2, 3], [4, 5, 6, 7]], [[6, 1, 4, 3], [0, 7, 2, 5]], [[7, 6, 5, 4], [3, 2, 1, 0]]],
    4: [[[0, 1], [2, 3], [4, 5], [6, 7]], [[3, 1], [2, 0], [4, 7], [5, 6]], [[7, 5], [0, 1], [6, 2], [4, 3]]],
    8: [[[p] for p in range(8)], [[(p + 3) % 8] for p in range(8)], [[7 - p] for p in range(8)]],
}
REPLICAS = {
    2: [[[0, 1, 2, 3, 4], [4, 5, 6, 7, 0]], [[6, 1, 4, 3, 0], [0, 7, 2, 5, 6]], [[2, 1, 4, 3, 0], [0, 7, 2, 5, 6]]],
    4: [[[0, 1, 2], [2, 3, 0], [4, 5, 0], [6, 7, 1]], [[0, 1, 5], [3, 2, 5], [4, 5, 0], [6, 7, 5]], [[4, 1, 2], [0, 4, 3], [4, 5, 7], [6, 4, 0]]],  # noqa: E501
    8: [[[p, (p + 1) % 8] for p in range(8)], [[(p + 3) % 8, (p + 5) % 8] for p in range(8)], [[p, 5 if p != 5 else 6] for p in range(8)]],  # noqa: E501
}  # fmt: skip


def of(expert: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(expert), dtype=torch.float64)).to(dtype)


KINDS = [
    ((2, 3), torch.float32),
    ((), torch.float32),
    ((5,), torch.bfloat16),
    ((0, 2), torch.float32),
    ((4,), torch.int8),
    ((70,), torch.float32),
]


def moved_here(chain: list[Rows], chunk: int | None) -> tuple[list[int], list[int]]:
    """How many exchanges each move took, and the most bytes that this rank sent in one of its chunks."""
    rank = dist.get_rank()

    def expected(rows: Rows) -> list[Tensor]:
        return [torch.stack([of(expert, *kind) for expert in rows[rank]]) for kind in KINDS]

    tensors = expected(chain[0])
    tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)  # rows that are not contiguous
    kept = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
    exchanges, most = [], []
    for old, new in zip(chain, chain[1:], strict=False):
        with Traffic() as traffic:
            move_experts_(tensors, None, old, new, chunk_bytes=chunk)
        for tensor, want in zip(tensors, expected(new), strict=True):
            assert torch.equal(tensor, want)
        exchanges.append(traffic.collectives.count("all_to_all_single"))
        most.append(max(sum(sent) for sent in traffic.bytes[4:]))
    assert [(tensor.data_ptr(), tensor.stride()) for tensor in tensors] == kept
    return exchanges, most


@pytest.mark.parametrize("ranks", [2, FOUR, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_every_row_of_every_dtype_is_where_the_new_placement_has_its_expert(ranks: int) -> None:
    for chain in (SWAPS[ranks], REPLICAS[ranks]):
        for exchanges, _ in run_ranks(moved_here, ranks, chain, None):
            assert exchanges == [4 + 3] * 2  # what the ranks compare, then one for each dtype
        for exchanges, most in run_ranks(moved_here, ranks, chain, 300):
            assert min(exchanges) > 4 + 3
            assert max(most) <= 300


def train(sizes: Sizes, chain: list[Rows], steps: int, clip: float | None, compiled: bool, k: int) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a training that changes its placement along ``chain``, each for as many steps, and the last weights."""
    torch._dynamo.reset()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    initial = one_process.initial(sizes)
    parameters = {name: (p[chain[0][rank]] if "experts" in name else p).clone().requires_grad_() for name, p in initial.items()}
    experts = {name: p for name, p in parameters.items() if "experts" in name}
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE)

    def forward(parameters: dict[str, Tensor], x: Tensor, y: Tensor, placement: Tensor) -> Tensor:
        return layers.loss(parameters, x, y, sizes, lambda x, *own: layers.moe(x, *own, k, dist.group.WORLD, None, placement))

    counted = CompileCounterWithBackend("aot_eager")
    run = torch.compile(forward, fullgraph=True, backend=counted) if compiled else forward
    losses, graphs, old = [], [], chain[0]
    for step in range(steps):
        new = chain[step * len(chain) // steps]
        if new != old:
            move_experts_(experts, optimizer, old, new)
        old = new
        x, y = (whole.chunk(ranks)[rank] for whole in one_process.batch(sizes, step))
        loss = run(parameters, x, y, torch.tensor(new))
        (loss / ranks).backward()
        mf.sync_replica_grads_(experts, new)
        mf.sync_grads_({name: p for name, p in parameters.items() if name not in experts}, None, reduce="sum")
        if clip is not None:
            mf.clip_grad_norm_(parameters, clip, {"*experts*": None, "*": ""}, {"*experts*": (new, None)})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mf.slice_gather(loss.detach()[None], None).mean().item())
        graphs.append(counted.frame_count)
    assert graphs == [int(compiled)] * steps  # no move compiled anything
    return losses, {name: p.detach() for name, p in parameters.items()}


FEW = [(2, None, False), (4, CLIP, False)]
MANY = [
    pytest.param(ranks, clip, compiled, marks=[pytest.mark.slow, pytest.mark.exhaustive])
    for ranks in (2, 4, 8)
    for clip in (None, CLIP)
    for compiled in (False, True)
    if (ranks, clip, compiled) not in FEW
]


@pytest.mark.parametrize(("ranks", "clip", "compiled"), [*(pytest.param(*case, marks=pytest.mark.slow) for case in FEW), *MANY])
def test_a_training_that_moves_experts_is_one_that_never_does(ranks: int, clip: float | None, compiled: bool) -> None:
    sizes, steps = Sizes(layers=1, top_k=2), 6
    stays = run_ranks(train, ranks, sizes, SWAPS[ranks][:1], steps, clip, compiled and clip is None, 2, timeout=300)
    moves = run_ranks(train, ranks, sizes, SWAPS[ranks], steps, clip, compiled, 2, timeout=300)
    copies = run_ranks(train, ranks, sizes, REPLICAS[ranks], steps, clip, compiled, 2, timeout=300)
    held = {expert: (p, row.index(expert)) for p, row in enumerate(SWAPS[ranks][0]) for expert in row}
    for last, results, exact in ((SWAPS[ranks][-1], moves, clip is None), (REPLICAS[ranks][-1], copies, False)):
        for (losses, weights), row in zip(results, last, strict=True):
            # The norm that clips is a sum over the experts in another order; replicas add their gradients in another order.
            torch.testing.assert_close(losses, stays[0][0], rtol=0 if exact else 1e-12, atol=0)
            for name, got in weights.items():
                if "experts" in name:
                    want = torch.stack([stays[held[expert][0]][1][name][held[expert][1]] for expert in row])
                    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-12)


def sharded_here() -> None:
    """FSDP2 shards the hidden dim over edp; DTensors, one frozen, with Adam's state and masters of their own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    old, new = [[0, 1, 2], [3, 4, 0]], [[3, 0, 1], [2, 4, 3]]
    edp, ep = mesh.get_coordinate()

    def whole(rows: Rows, seed: int) -> Tensor:
        return torch.stack([of(100 * seed + expert, (8, 4), torch.float32) for row in rows for expert in row])  # [P * L, 8, 4]

    module = nn.ParameterList(
        nn.Parameter(DTensor.from_local(whole(old, seed).chunk(2)[ep], mesh["ep"], [Shard(0)]), requires_grad=seed == 0)
        for seed in range(2)
    )
    fully_shard(module, mesh=mesh["edp"], shard_placement_fn=lambda _: Shard(1))
    trained, frozen = module
    optimizer = torch.optim.AdamW([trained])
    trained.grad = trained.detach().clone()
    optimizer.step()
    optimizer.zero_grad()
    state = optimizer.state[trained]
    state["master"] = trained.detach().clone()
    before = {name: value.full_tensor().clone() for name, value in state.items() if isinstance(value, DTensor)}
    updated = trained.detach().full_tensor().clone()
    move_experts_(module, optimizer, old, new, mesh["ep"])
    first = {expert: i for i, expert in reversed(list(enumerate(sum(old, []))))}
    order = [first[expert] for expert in sum(new, [])]
    assert set(before) == {"exp_avg", "exp_avg_sq", "master"}
    for name, want in before.items():
        assert torch.equal(state[name].full_tensor(), want[order])
    assert torch.equal(trained.detach().full_tensor(), updated[order])
    assert torch.equal(frozen.detach().full_tensor(), whole(new, 1))
    assert float(state["step"]) == 1.0


@pytest.mark.slow
def test_state_masters_and_frozen_weights_move_under_fsdp() -> None:
    run_ranks(sharded_here, 4)


class Experts(nn.Module):
    """Experts of a placement that a checkpoint keeps beside them, as tutorials/06_planner.py has it."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
        local = torch.stack([of(expert, (3, 2), torch.float64) for expert in rows[dist.get_rank()]])
        self.weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
        self.register_buffer("placement", torch.tensor(rows))

    def step(self, optimizer: torch.optim.Optimizer, number: int) -> float:
        rows = self.placement[dist.get_rank()].tolist()
        wanted = torch.stack([of(1000 * number + expert, (3, 2), torch.float64) for expert in rows])
        loss = (self.weight.to_local() - wanted).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return mf.slice_gather(loss.detach()[None], None).sum().item()


def checkpoint_here(chain: list[Rows], folder: Path) -> list[float]:
    """Steps on chain[0]; saved there; loaded into experts that were made for chain[1], and moved to it; or without a folder, none of it."""
    model = Experts(chain[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = [model.step(optimizer, number) for number in range(2)]
    if len(chain) > 1:
        dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
        model = Experts(chain[1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model.step(optimizer, 7)  # makes the state that is loaded into
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        assert model.placement.tolist() == chain[0]
        move_experts_([model.weight], optimizer, model.placement, chain[1])
        model.placement.copy_(torch.tensor(chain[1]))
    return losses + [model.step(optimizer, number) for number in range(2, 4)]


@pytest.mark.slow
def test_a_checkpoint_has_its_placement_and_is_loaded_on_another(tmp_path: Path) -> None:
    stays = run_ranks(checkpoint_here, 2, SWAPS[2][:1], tmp_path)
    moves = run_ranks(checkpoint_here, 2, SWAPS[2][:2], tmp_path)
    torch.testing.assert_close(moves, stays, rtol=1e-14, atol=0)  # the sum of the ranks' losses is in another order


def disagreeing_here(case: str) -> list[str]:
    rank = dist.get_rank()
    weight = torch.full((2 + (case == "slots" and rank == 1), 3), float(rank))
    start, target = [[0, 1], [2, 3]], [[2, 1], [0, 3]]
    dtype = torch.float64 if case == "dtype" and rank == 1 else torch.float32
    before, weight = weight.clone(), weight.to(dtype)
    with pytest.raises((MoECommError, ValueError)) as raised, Traffic() as traffic:
        move_experts_(
            weight, None,
            target if case == "old" and rank == 1 else start,
            start if case == "new" and rank == 1 else [[2, 1, 3], [0, 3, 1]] if case == "shape" else target,
        )  # fmt: skip
    assert torch.equal(weight.to(before.dtype), before)
    return [type(raised.value).__name__, str(raised.value), *(["sent"] if len(traffic.collectives) > 3 else [])]


@pytest.mark.parametrize("case", ["old", "new", "dtype"])
def test_ranks_that_disagree_get_the_same_error_and_nothing_moves(case: str) -> None:
    first, second = run_ranks(disagreeing_here, 2, case)
    assert first == second
    assert first[0] == "MoECommError"
    assert first[1].startswith({"dtype": "params' tensor 0"}.get(case, case) + " was ")
    assert "rank 1" in first[1]


def test_what_does_not_fit_is_refused_by_name() -> None:
    for first, second in [run_ranks(disagreeing_here, 2, "shape")]:
        assert first == second == ["ValueError", "new was of 3 experts on each rank; it must be of as many as in old, 2, since shapes stay"]
    refused, told = reversed(run_ranks(disagreeing_here, 2, "slots"))
    assert refused[:2] == [
        "ValueError",
        "params was a tensor of shape [3, 3]; it must be of shape [2, ...], with the placement's L = 2 experts",
    ]
    assert told[0] == "MoECommError"
    weight = torch.zeros(2, 3, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight]["odd"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"optimizer's 'odd' was of shape \[5\]; it must be \[2, ...\]"):
        move_experts_(weight, optimizer, [[0, 1]], [[1, 0]])
    with pytest.raises(ValueError, match="without experts"):
        move_experts_(weight, None, [[0, 1]], [[1, 2]])
    with pytest.raises(TypeError, match="optimizer was dict"):
        move_experts_(weight, {}, [[0, 1]], [[1, 0]])  # type: ignore[arg-type]


def checkpointed_move(folder: Path, group: dist.ProcessGroup, at: At) -> None:
    """A checkpoint, then a move of several chunks, in whose middle the faulty rank is lost."""
    weight = torch.arange(8.0).view(2, 4) + 10 * dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    dcp.save({"weight": DTensor.from_local(weight, mesh, [Shard(0)]), "placement": torch.tensor(LOST[0])}, checkpoint_id=folder)
    chunks = iter(range(100))

    def told(*args: Any) -> Tensor:
        if next(chunks) == 1:
            at("dispatch")
        return start(*args)

    with patch("moecomm.planner.move.start", told):
        move_experts_(weight, None, *LOST, group, chunk_bytes=3 * 8)
    assert next(chunks) > 2


LOST = [[0, 1], [2, 3], [4, 5]], [[2, 1], [4, 3], [0, 5]]


@pytest.mark.slow
def test_a_rank_that_dies_in_a_move_fails_the_others_and_leaves_the_checkpoint_whole(tmp_path: Path) -> None:
    with lost_ranks() as ranks:
        ends = ranks.case(Fault("killed", "dispatch"), functools.partial(checkpointed_move, tmp_path))
    for end in ends[:FAULTY] + ends[FAULTY + 1 :]:
        assert end.error is not None
        assert "while waiting for the experts that move to this rank" in end.error
    state: dict[str, Tensor] = {"weight": torch.zeros(6, 4), "placement": torch.zeros(3, 2, dtype=torch.int64)}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it loads in a single process
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert state["placement"].tolist() == LOST[0]
    assert torch.equal(state["weight"], torch.cat([torch.arange(8.0).view(2, 4) + 10 * rank for rank in range(3)]))
