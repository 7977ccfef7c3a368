"""slice_reduce, sum_ranks and sum_gradient: the ranks' sum in float64, forward and backward, in a fixed order."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import moecomm.functional as mf
from tests.parallel.test_slices import chunk
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

A2A, GATHER = "all_to_all_single", "all_gather_into_tensor"
SHAPES = [(), (1,), (5, 3), (8, 2), (0, 4), (3, 7)]


def parts(shape: tuple[int, ...], dtype: torch.dtype, ranks: int, seed: int = 0) -> list[Tensor]:
    """What each rank has: sums of it take more bits than bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(-50, 50, shape, generator=generator) * 5 / 64).to(dtype) for _ in range(ranks)]


def sums_here(dtype: torch.dtype) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for shape in SHAPES:
        whole, grads = parts(shape, dtype, ranks), parts(shape, dtype, ranks, seed=1)
        x = whole[rank].clone().requires_grad_()
        total, grad_total = (torch.stack(each).double().sum(0).to(dtype) for each in (whole, grads))  # exact in float64, rounded once
        with Traffic() as traffic:
            y = mf.sum_ranks(x, None)
        assert torch.equal(y, total)
        with Traffic() as back:
            [grad] = torch.autograd.grad(y, x, grads[0])
        assert torch.equal(grad, grads[0])
        assert (traffic.collectives, back.collectives) == (([A2A, GATHER], []) if ranks > 1 else ([], []))

        with Traffic() as traffic:
            y = mf.sum_gradient(x, None)
        assert torch.equal(y, whole[rank])
        with Traffic() as back:
            [grad] = torch.autograd.grad(y * 1, x, grads[rank])
        assert torch.equal(grad, grad_total)
        assert (traffic.collectives, back.collectives) == (([], [A2A, GATHER]) if ranks > 1 else ([], []))

        for dim in range(-1, len(shape)):
            if not shape:
                continue
            with Traffic() as traffic:
                y = mf.slice_reduce(x, None, dim)
            assert torch.equal(y, chunk(total, dim, rank, ranks))
            with Traffic() as back:
                [grad] = torch.autograd.grad(y, x, chunk(grads[0], dim, rank, ranks))
            assert torch.equal(grad, grads[0])
            assert (traffic.collectives, back.collectives) == (([A2A], [GATHER]) if ranks > 1 else ([], []))


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_are_rounded_once_and_their_gradients_are_what_the_ranks_have_in_common(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(sums_here, ranks, dtype)


def step(x: Tensor, y: Tensor, size: int) -> Tensor:
    split = mf.sum_ranks(mf.sum_gradient(x, None).sin() * (1 + y), None)
    return (split * mf.slice_gather(mf.slice_reduce(split * y, None), None, grad="reduce", size=size)).sum()


def compiled_here() -> None:
    torch._dynamo.reset()
    rank = dist.get_rank()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for size in (5, 7, 8, 2, 12):
        generator = torch.Generator().manual_seed(rank)
        x, y = (torch.randn(size, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
        want = torch.autograd.grad(step(x, y, size), (x, y))
        got = torch.autograd.grad(compiled(x, y, size), (x, y))
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/test_functions.py compiles them in every run
def test_compiled_sums_are_the_eager_ones() -> None:
    run_ranks(compiled_here, 2, timeout=200)


def dtensors_here() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    local = torch.arange(6.0).view(3, 2) + mesh.get_local_rank("tp")
    x = DTensor.from_local(local, mesh, [Replicate(), Partial()])
    total = 2 * torch.arange(6.0).view(3, 2) + 1
    y = mf.sum_ranks(x, (mesh, 1))
    assert y.placements == (Replicate(), Replicate())
    assert torch.equal(y.to_local(), total)
    piece = mf.slice_reduce(x, (mesh, 1))
    assert piece.placements == (Replicate(), Shard(0))
    assert torch.equal(piece.to_local(), chunk(total, 0, mesh.get_local_rank("tp"), 2))
    assert mf.sum_gradient(y, (mesh, 1)) is y
    for call in (mf.sum_ranks, mf.slice_reduce):
        with pytest.raises(ValueError, match=re.escape("x was R on the group's mesh dim 1; it must be P(sum) there")):
            call(y, (mesh, 1))


def test_a_dtensor_goes_from_partial_to_replicate_or_shard() -> None:
    run_ranks(dtensors_here, 4)


@pytest.mark.parametrize("call", [mf.sum_ranks, mf.sum_gradient, mf.slice_reduce])
def test_a_wrong_argument_is_named(call: object) -> None:
    for x, message in (
        (3, "x was int; it must be a tensor"),
        (torch.ones(2, dtype=torch.int64), "x was of dtype torch.int64; it must be of a floating dtype"),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            call(x, None)  # type: ignore[operator]
