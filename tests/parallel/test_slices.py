"""slice_scatter and slice_gather against torch.chunk and torch.cat in one process, forward and backward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import moecomm.functional as mf
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

SIZES = [0, 1, 3, 4, 5, 8, 9]  # along the dim: on 4 ranks 5 is 2, 2, 1, 0, and 9 is 3, 3, 3, 0
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]


def whole(size: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A tensor of three dims, ``size`` long in ``dim``."""
    shape = [2, 3, 2]
    shape[dim] = size
    values = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def chunk(x: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """What the rank has of x: torch.chunk gives fewer chunks where there is nothing left for the last ones."""
    chunks = x.chunk(ranks, dim)
    return chunks[rank] if rank < len(chunks) else x.narrow(dim, 0, 0)


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got.is_contiguous()


def slices_here() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for size, dim, dtype in itertools.product(SIZES, (0, 1, 2, -1, -3), DTYPES):
        x = whole(size, dim, dtype)
        piece = mf.slice_scatter(x, None, dim)
        assert_same(piece, chunk(x, dim, rank, ranks))
        assert_same(mf.slice_gather(piece, None, dim, size=size), x)
        if size % ranks == 0:
            assert_same(mf.slice_gather(piece, None, dim), x)
    x = whole(8, 0, torch.float32).transpose(0, 1)  # not contiguous
    piece = mf.slice_scatter(x, None, 1)
    torch.testing.assert_close(piece, chunk(x, 1, rank, ranks), rtol=0, atol=0)
    torch.testing.assert_close(mf.slice_gather(piece, None, 1, size=8), x, rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_slices_are_those_of_torch_chunk_and_gather_to_the_whole(ranks: int) -> None:
    run_ranks(slices_here, ranks)


def gradients_here(dtype: torch.dtype) -> None:
    """Each rank's gradient of a result is different, where they may differ; the reference adds them up in float64."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for size, dim in itertools.product(SIZES, (0, 1, -1)):
        x = whole(size, dim, dtype).requires_grad_()
        # Of the whole: each takes bfloat16's eight bits, and their sum more, so that adding up in bfloat16 would show.
        grads = [whole(size, dim, torch.float64, seed=1 + p) * 5 / 64 for p in range(ranks)]

        # Scatter: the ranks' slices are one loss together, and each rank's x has all of its gradient.
        piece = mf.slice_scatter(x, None, dim)
        [grad] = torch.autograd.grad(piece, x, chunk(grads[0], dim, rank, ranks).to(dtype))
        assert_same(grad, grads[0].to(dtype))

        own = chunk(x.detach(), dim, rank, ranks).clone().requires_grad_()
        for kind, total in (("slice", grads[0]), ("reduce", sum(grads))):
            y = mf.slice_gather(own, None, dim, grad=kind, size=size)
            assert_same(y.detach(), x.detach())
            [grad] = torch.autograd.grad(y, own, grads[rank if kind == "reduce" else 0].to(dtype))
            torch.testing.assert_close(grad, chunk(total, dim, rank, ranks).to(dtype), rtol=0, atol=0)  # rounded once


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_gradients_are_gathered_sliced_or_reduced(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(gradients_here, ranks, dtype)


def second_gradients_here() -> None:
    x = whole(5, 0, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mf.slice_gather(mf.slice_scatter(x, None) ** 2, None, size=5), x)
    assert torch.autograd.gradgradcheck(lambda x: mf.slice_gather(mf.slice_scatter(x, None) ** 2, None, size=5), x)


@pytest.mark.slow
def test_the_slices_have_second_derivatives() -> None:
    run_ranks(second_gradients_here, 2)


def sequence_parallel_here() -> None:
    """A block over slices of the tokens, whose result goes on replicated: the same loss and gradients as without slices."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    seed = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=seed, dtype=torch.float64).requires_grad_() for shape in ((7, 4), (4, 4)))
    want = torch.autograd.grad(((x @ weight).tanh() ** 2).sum(), (x, weight))

    y = mf.slice_gather((mf.slice_scatter(x, None) @ weight).tanh(), None, size=7)
    grad_x, grad_weight = torch.autograd.grad((y**2).sum(), (x, weight))
    torch.testing.assert_close(grad_x, want[0])
    dist.all_reduce(grad_weight)  # each rank has seen its slice
    torch.testing.assert_close(grad_weight, want[1])

    # Where each rank goes on with its own part of the loss, "reduce" adds the parts up.
    part = torch.arange(7) % ranks == rank
    y = mf.slice_gather((mf.slice_scatter(x, None) @ weight).tanh(), None, grad="reduce", size=7)
    [grad_x] = torch.autograd.grad((y[part] ** 2).sum(), x)
    torch.testing.assert_close(grad_x, want[0])


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_a_block_over_slices_has_the_gradients_of_the_whole(ranks: int) -> None:
    run_ranks(sequence_parallel_here, ranks)


def traffic_here() -> None:
    x = whole(5, 0, torch.float32).requires_grad_()
    with Traffic() as scatter:
        piece = mf.slice_scatter(x, None)
    with Traffic() as scatter_back:
        torch.autograd.grad(piece.sum(), x)
    own = piece.detach().requires_grad_()
    with Traffic() as gather:
        sliced, reduced = (mf.slice_gather(own, None, grad=kind, size=5) for kind in ("slice", "reduce"))
    with Traffic() as sliced_back:
        torch.autograd.grad(sliced.sum(), own)
    with Traffic() as reduced_back:
        torch.autograd.grad(reduced.sum(), own)
    assert scatter.collectives == sliced_back.collectives == []
    assert scatter_back.collectives == ["all_gather_into_tensor"]
    assert gather.collectives == ["all_gather_into_tensor"] * 2
    assert reduced_back.collectives == ["all_to_all_single"]
    assert scatter.reads == scatter_back.reads == gather.reads == sliced_back.reads == reduced_back.reads == []


def test_each_slice_function_and_gradient_is_at_most_one_collective_and_no_host_read() -> None:
    run_ranks(traffic_here, 2)


def groups_here() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = whole(5, 1, torch.float32, seed=mesh.get_local_rank("dp"))  # each pair of ranks has its own
    tp: list[Any] = [mesh["tp"], (mesh, 1), mesh.get_group("tp"), mesh.get_group("tp").group_name]
    for group in tp:
        piece = mf.slice_scatter(x, group, 1)
        assert_same(piece, chunk(x, 1, mesh.get_local_rank("tp"), 2))
        assert_same(mf.slice_gather(piece, group, 1, size=5), x)


def test_a_group_that_is_not_the_world_slices_its_own() -> None:
    run_ranks(groups_here, 4)


def dtensors_here() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for size in (4, 5, 1):
        plain = whole(size, 1, torch.float32)
        x = distribute_tensor(plain, mesh, [Shard(0), Replicate()]).requires_grad_()  # 2-D: the other dim stays as it is
        piece = mf.slice_scatter(x, mesh["tp"], 1)
        assert isinstance(piece, DTensor)
        assert piece.placements == (Shard(0), Shard(1))
        own = mf.slice_scatter(x.to_local().detach(), mesh["tp"], 1)
        assert_same(piece.to_local().detach(), own)

        y = mf.slice_gather(piece, mesh["tp"], 1)
        assert isinstance(y, DTensor)
        assert y.placements == (Shard(0), Replicate())
        assert torch.equal(y.full_tensor(), plain)
        assert torch.equal(mf.slice_gather(piece, (mesh, 1), 1, size=size).full_tensor(), plain)

        [grad] = torch.autograd.grad((piece**2).sum(), x, retain_graph=True)
        assert torch.equal(grad.full_tensor(), 2 * plain)
        [grad] = torch.autograd.grad((y**2).sum(), x)
        assert torch.equal(grad.full_tensor(), 2 * plain)


@pytest.mark.slow
def test_a_dtensor_goes_from_replicate_to_shard_and_back() -> None:
    run_ranks(dtensors_here, 4)


def test_a_single_process_has_all_of_it() -> None:
    x = torch.rand(3, 2)
    assert mf.slice_scatter(x, None) is x
    assert mf.slice_gather(x, None, -1, size=2) is x
