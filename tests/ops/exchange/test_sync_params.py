"""start_broadcast, split_copy, sync_params and all_reduce: rank src's parameters on every rank, and the ranks' sums."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from moecomm.ops.exchange.collectives import wait
from moecomm.ops.exchange.sync_params import all_reduce, split_copy, start_broadcast, sync_params
from tests.ops.cases import COMPOSED, FLOATS, IN_FLIGHT, assert_within_rounding, seeded
from tests.spawn import FOUR, run_ranks

SHAPES = ((3, 4), (), (0, 2), (5,))
DTYPES = (*FLOATS, torch.float64, torch.int16, torch.int64, torch.bool, torch.uint16, torch.complex64, torch.float8_e4m3fn)
SIZES = (0, 1, 3, 4, 5, 8, 1000)  # below, at and above a multiple of 2 and of 4 ranks


def tensors_of(rank: int, dtype: torch.dtype) -> list[Tensor]:
    return [(torch.randn(shape, generator=seeded(rank)) * 5).to(torch.int64).to(torch.float32).to(dtype) for shape in SHAPES]


def group() -> tuple[int, str]:
    return dist.get_world_size(), dist.group.WORLD.group_name


def broadcast_here() -> None:
    ranks, name = group()
    for dtype in DTYPES:
        for src in (0, ranks - 1):
            mine, want = tensors_of(dist.get_rank(), dtype), tensors_of(src, dtype)
            flat = wait(start_broadcast(mine, src, name))
            pieces = split_copy(flat, [tensor.numel() for tensor in mine])
            for piece, tensor in zip(pieces, want, strict=True):
                assert torch.equal(piece.view(torch.uint8), tensor.flatten().view(torch.uint8))
                assert piece.untyped_storage().nbytes() == piece.nbytes  # no part of the message is kept alive
    none = wait(start_broadcast([torch.zeros(0), torch.zeros(2, 0)], 0, name))
    assert none.shape == (0,)


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_the_tensors_of_src_come_to_every_rank_in_any_dtype(ranks: int) -> None:
    run_ranks(broadcast_here, ranks)


def flats_of(rank: int) -> list[Tensor]:
    dtypes = (*FLOATS, torch.float64)
    return [torch.randn(size, generator=seeded(100 * rank + size)).to(dtypes[i % 4]) for i, size in enumerate(SIZES)]


def all_reduce_here() -> list[Tensor]:
    ranks, name = group()
    mine = [[flat[:2], flat[2:].view(-1, 1)] for flat in flats_of(dist.get_rank())]
    for divisor, before in ((1, False), (ranks, False), (ranks, True)):
        sums = all_reduce(mine, divisor, ranks, name, before)
        for i, got in enumerate(sums):
            parts = torch.stack([flats_of(rank)[i] for rank in range(ranks)]).double() / divisor
            wide = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
            assert_within_rounding(got, parts.sum(0), parts.abs().sum(0), ranks * wide)
    return all_reduce(mine, ranks, ranks, name)


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_all_reduce_agrees_with_float64_and_is_the_same_on_every_rank(ranks: int) -> None:
    first, *others = run_ranks(all_reduce_here, ranks)
    for other in others:
        assert all(torch.equal(mine, its) for mine, its in zip(first, other, strict=True))


def derivatives_here(src: int) -> None:
    """All ranks perturb their parameters in step, so that each sees its results change as its gradients say: by the mean's."""
    ranks, name = group()
    params = [torch.randn(shape, generator=seeded(1), dtype=torch.float64).requires_grad_() for shape in SHAPES]

    def cubes(*params: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor**3 for tensor in sync_params(params, src, ranks, ranks, name))

    assert gradcheck(cubes, params)
    assert gradgradcheck(cubes, params)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_first_and_second_derivatives_of_sync_params(ranks: int) -> None:
    run_ranks(derivatives_here, ranks, ranks - 1)


def opcheck_all() -> None:
    ranks, name = group()
    for dtype in (torch.bfloat16, torch.bool):
        opcheck(start_broadcast, (tensors_of(0, dtype), 0, name), test_utils=IN_FLIGHT)
        opcheck(split_copy, (torch.cat([tensor.flatten() for tensor in tensors_of(0, dtype)]), [12, 1, 0, 5]))
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    params = [tensors_of(0, dtype)[i].requires_grad_(dtype.is_floating_point) for dtype in dtypes for i in (0, 2)]
    for divisor in (ranks, None):
        opcheck(torch.ops.moecomm.sync_params.default, (params, 0, divisor, ranks, name), test_utils=COMPOSED)


@pytest.mark.slow
def test_the_ops_pass_opcheck() -> None:
    run_ranks(opcheck_all, 2)
