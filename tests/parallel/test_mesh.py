"""moe_mesh: where each rank stands in the views, what DTensor and FSDP2 make of them, and sizes that do not fit."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import moecomm.functional as mf
from moecomm.mesh import moe_mesh
from tests.spawn import run_ranks

STAGE = "ranks of a pipeline stage, dp * cp * tp"


def groups_here(sizes: dict[str, int]) -> tuple[str, dict[str, list[int]]]:
    """The printed mesh, and the ranks of each of this rank's groups."""
    mesh = moe_mesh("cpu", **sizes)
    dims = {f"{view}.{dim}": getattr(mesh, view)[dim] for view in ("dense", "expert") for dim in getattr(mesh, view).mesh_dim_names}
    groups = {name: dim.get_group() for name, dim in {**dims, "stage": mesh.stage}.items()}
    names = [group.group_name for group in groups.values() if group is not dist.group.WORLD]
    assert len(set(names)) == len(names)  # the views share no other group
    return str(mesh), {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


def test_a_printed_mesh_shows_where_each_rank_stands() -> None:
    ranks = run_ranks(groups_here, 8, {"pp": 2, "tp": 2, "ep": 4})
    expecttest.assert_expected_inline(
        ranks[0][0],
        """\
rank |  pp  dp  cp  tp |  pp edp  ep etp
   0 |   0   0   0   0 |   0   0   0   0
   1 |   0   0   0   1 |   0   0   1   0
   2 |   0   1   0   0 |   0   0   2   0
   3 |   0   1   0   1 |   0   0   3   0
   4 |   1   0   0   0 |   1   0   0   0
   5 |   1   0   0   1 |   1   0   1   0
   6 |   1   1   0   0 |   1   0   2   0
   7 |   1   1   0   1 |   1   0   3   0""",
    )


@pytest.mark.parametrize("sizes", [{}, {"pp": 2, "tp": 2, "ep": 4}, {"dp": 2, "cp": 2, "tp": 2, "ep": 2, "etp": 2}])
def test_groups_are_the_ranks_that_differ_in_one_column_of_the_printed_mesh(sizes: dict[str, int]) -> None:
    answers = run_ranks(groups_here, 8, sizes)
    head, *lines = (line.split("|") for line in answers[0][0].splitlines())
    for rank, (_, groups) in enumerate(answers):
        for view, names, column in (("dense", head[1].split(), 1), ("expert", head[2].split(), 2)):
            places = [line[column].split() for line in lines]
            for i, name in enumerate(names):
                alike = [r for r, place in enumerate(places) if place[:i] + place[i + 1 :] == places[rank][:i] + places[rank][i + 1 :]]
                assert groups[f"{view}.{name}"] == alike
        assert groups["stage"] == [r for r, place in enumerate(places) if place[0] == places[rank][0]]
        assert groups["dense.pp"] == groups["expert.pp"]


class Block(nn.Module):
    """x + x @ dense, then through the rows of experts that this rank has."""

    def __init__(self, dense: Tensor, experts: Tensor) -> None:
        super().__init__()
        self.dense = nn.Parameter(dense)
        self.experts = Experts(experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x + x @ self.dense)


class Experts(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("td,edh->eth", x, self.weight.to_local()).square().sum()


def fully_sharded_here() -> dict[str, Tensor]:
    """The gradients of a block whose experts FSDP2 shards over edp and DTensor over ep, and whose dense part FSDP2 shards over dp."""
    mesh = moe_mesh("cpu", ep=2)
    dense, experts, x = tensors()
    spread = distribute_tensor(experts, mesh.expert["ep"], [Shard(0)])
    block = Block(dense, spread)
    fully_shard(block.experts, mesh=mesh.expert["edp"])
    fully_shard(block, mesh=mesh.dense["dp"])
    for module in (block, block.experts):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    block(mf.slice_scatter(x, mesh.expert["edp"])).backward()  # the ranks of an ep group: the same tokens, other experts
    assert block.experts.weight.device_mesh.mesh_dim_names == ("edp", "ep")
    return {name: p.grad.full_tensor() for name, p in block.named_parameters()}


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 8), (4, 8, 3), (6, 8)))


def test_fsdp_and_dtensor_take_the_dims_of_both_views() -> None:
    dense, experts, x = tensors()
    whole = {"dense": dense.requires_grad_(), "experts.weight": experts.requires_grad_()}
    torch.einsum("td,edh->eth", x + x @ dense, experts).square().sum().backward()
    for grads in run_ranks(fully_sharded_here, 4):
        torch.testing.assert_close(grads, {name: p.grad for name, p in whole.items()})


def resharded_here() -> None:
    mesh = moe_mesh("cpu", dp=2, tp=2, ep=2, etp=2)
    x = torch.arange(16.0).view(4, 4)
    by_expert = distribute_tensor(x, mesh.expert["ep", "etp"], [Shard(0), Shard(1)])
    torch.testing.assert_close(by_expert.redistribute(placements=[Replicate(), Replicate()]).to_local(), x)


def test_dtensor_takes_two_dims_of_the_expert_view() -> None:
    run_ranks(resharded_here, 4)


def raised_here(sizes: dict[str, Any]) -> str:
    groups = len(dist.distributed_c10d._world.pg_map)
    with pytest.raises((TypeError, ValueError)) as raised:
        moe_mesh("cpu", **sizes)
    assert len(dist.distributed_c10d._world.pg_map) == groups  # none was made
    return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pp": 3}, "ValueError: pp * cp * tp was 3 * 1 * 1 = 3; it must be a divisor of the world's 4 ranks: 1, 2, 4"),
        ({"dp": 2}, "ValueError: pp * dp * cp * tp was 1 * 2 * 1 * 1 = 2; it must be the world's 4 ranks"),
        ({"pp": 2, "ep": 4}, f"ValueError: ep * etp was 4 * 1 = 4; it must be a divisor of the 2 {STAGE}: 1, 2"),
        ({"ep": 2, "etp": 3}, f"ValueError: ep * etp was 2 * 3 = 6; it must be a divisor of the 4 {STAGE}: 1, 2, 4"),
        ({"tp": 0}, "ValueError: tp was 0; it must be at least 1"),
        ({"dp": -1}, "ValueError: dp was -1; it must be at least 1"),
        ({"etp": 2.0}, "TypeError: etp was float; it must be an int"),
        ({"ep": True}, "TypeError: ep was bool; it must be an int"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, Any], message: str) -> None:
    assert run_ranks(raised_here, 4, sizes) == [message] * 4


def test_a_world_without_a_process_group_is_named() -> None:
    with pytest.raises(ValueError, match="the default process group was missing; it must be made first"):
        moe_mesh("cpu")
