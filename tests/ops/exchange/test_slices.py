"""take_slice, pad_slice, slice_scatter, slice_gather and slice_reduce: torch.chunk's slices on the ranks, and back."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.exchange.slices import pad_rows, pad_slice, slice_gather, slice_reduce, slice_scatter, take_slice
from tests.ops.cases import COMPOSED, assert_within_rounding, check_gradients_across_ranks, seeded
from tests.spawn import FOUR, run_ranks

SIZES = (0, 1, 3, 4, 5, 8)  # below, at and above a multiple of 2 and of 4 ranks
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


def whole(size: int, dim: int, seed: int = 0) -> Tensor:
    """[size, 3], or [3, size] where dim is 1."""
    return torch.randn((size, 3) if dim == 0 else (3, size), generator=seeded(seed)) * 10


def chunks(x: Tensor, dim: int, ranks: int) -> list[Tensor]:
    """torch.chunk's, with empty ones for the ranks that it leaves out."""
    parts = list(x.chunk(ranks, dim)) if x.shape[dim] else []
    return parts + [x.narrow(dim, 0, 0)] * (ranks - len(parts))


def group() -> tuple[int, str]:
    return dist.get_world_size(), dist.group.WORLD.group_name


def there_and_back() -> None:
    ranks, name = group()
    rank = dist.get_rank()
    for size in SIZES:
        for dim in (0, 1):
            for dtype in DTYPES:
                x = whole(size, dim).to(dtype)
                for layout in (x, x.t().contiguous().t()):
                    piece = slice_scatter(layout, dim, None, ranks, name)
                    assert torch.equal(piece, chunks(x, dim, ranks)[rank])
                    assert piece.is_contiguous()
                    assert torch.equal(take_slice(layout, dim, piece.shape[dim], ranks, name), piece)
                    for reduce in (False, True):
                        back = slice_gather(piece.t().contiguous().t(), dim, size, ranks, name, reduce)
                        assert torch.equal(back, x)
                        assert back.is_contiguous()


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_slices_are_chunks_and_gather_to_the_whole(ranks: int) -> None:
    run_ranks(there_and_back, ranks)


def reduce_slices() -> None:
    ranks, name = group()
    rank = dist.get_rank()
    for size in SIZES:
        for dim in (0, 1):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64):
                parts = [whole(size, dim, seed=r).to(dtype) for r in range(ranks)]
                length = chunks(parts[0], dim, ranks)[rank].shape[dim]
                got = slice_reduce(parts[rank], dim, length, ranks, name)
                want = chunks(torch.stack(parts).double().sum(0), dim, ranks)[rank]
                if dtype == torch.int64:
                    assert torch.equal(got, want.to(dtype))
                else:
                    sizes = chunks(torch.stack(parts).double().abs().sum(0), dim, ranks)[rank]
                    assert_within_rounding(got, want, sizes, ranks * 2.0**-24 if dtype != torch.float64 else 2.0**-50)
                assert torch.equal(got, slice_reduce(parts[rank], dim, length, ranks, name))


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_reduce_adds_up_in_float32_and_gives_the_same_bits_again(ranks: int) -> None:
    run_ranks(reduce_slices, ranks)


def gradients() -> None:
    ranks, name = group()
    rank = dist.get_rank()
    for size in (0, 1, 3, 4):
        for dim in (0, 1):
            x = whole(size, dim).double()
            piece = chunks(x, dim, ranks)[rank]
            length = piece.shape[dim]
            check_gradients_across_ranks(lambda p, dim=dim, size=size: slice_gather(p, dim, size, ranks, name, True), piece)
            check_gradients_across_ranks(lambda x, dim=dim, length=length: slice_reduce(x, dim, length, ranks, name), x)
            # What is the same on all ranks has one gradient, known to all: the pieces' together, and the piece of the whole's.
            cotangent = whole(size, dim, seed=7).double()
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(slice_scatter(leaf, dim, None, ranks, name), leaf, chunks(cotangent, dim, ranks)[rank])
            assert torch.equal(grad, cotangent)
            leaf = piece.clone().requires_grad_()
            (grad,) = torch.autograd.grad(slice_gather(leaf, dim, size, ranks, name, False), leaf, cotangent)
            assert torch.equal(grad, chunks(cotangent, dim, ranks)[rank])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, FOUR])
def test_gradients_across_ranks(ranks: int) -> None:
    run_ranks(gradients, ranks)


def wrong_length() -> None:
    ranks, name = group()
    with pytest.raises(ValueError, match=r"x was 3 long in dim; it must be 2 long, the slice of rank \d of 2 where size is 4"):
        slice_gather(torch.zeros(3, 2), 0, 4, ranks, name, False)


def test_a_slice_of_the_wrong_length_raises_before_anything_is_sent() -> None:
    run_ranks(wrong_length, 2)


def opcheck_all(size: int) -> None:
    ranks, name = group()
    x = whole(size, 0)
    piece = chunks(x, 0, ranks)[dist.get_rank()].clone()
    opcheck(take_slice, (x, 0, None, ranks, name))
    opcheck(take_slice, (x, 0, piece.shape[0], ranks, name))
    opcheck(pad_rows, (x, size + 2))
    opcheck(pad_slice, (piece, size, ranks, name))
    opcheck(slice_scatter, (x.requires_grad_(), 0, None, ranks, name))
    opcheck(slice_gather, (piece.requires_grad_(), 0, size, ranks, name, False), test_utils=COMPOSED)
    opcheck(slice_gather, (piece, 0, size, ranks, name, True), test_utils=COMPOSED)
    opcheck(slice_reduce, (x, 0, piece.shape[0], ranks, name), test_utils=COMPOSED)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_slices_pass_opcheck(ranks: int) -> None:
    for size in (3, 0):
        run_ranks(opcheck_all, ranks, size)
