"""rank_sum: the ranks' parts, added in their order in float32, divided and rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.rows.rank_sum import rank_sum, rank_sum_cpu, rank_sum_fake, rank_sum_triton
from tests.ops.cases import FLOATS, assert_same_layout, assert_within_rounding, guarded, seeded

HOW = [(1, False), (1, True), (3, False), (8, True)]  # divisor, before


def parts_of(ranks: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(ranks, n, generator=seeded(ranks * n), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("ranks", [1, 2, 5, 8, 20])
@pytest.mark.parametrize("n", [0, 1, 3, 1024, 1500])
def test_the_sum_agrees_with_float64_and_is_rounded_once(ranks: int, n: int, device: str) -> None:
    for dtype in FLOATS:
        parts = parts_of(ranks, n, dtype)
        terms, wide = parts.double().abs().sum(0), torch.finfo(torch.float32).eps
        for divisor, before in HOW:
            want = parts.double().sum(0) / divisor
            on_device = guarded(rank_sum_triton, parts.to(device), divisor, before)
            for got, interpreted in ((rank_sum_cpu(parts, divisor, before), False), (on_device, device == "cpu")):
                assert_within_rounding(got, want, terms / divisor, ranks * wide, interpreted)
                assert_same_layout(rank_sum_fake(parts, divisor, before), got)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_wider_dtypes_are_added_up_in_themselves(dtype: torch.dtype, device: str) -> None:
    parts = torch.randn(5, 7, generator=seeded(1), dtype=torch.float64).to(dtype) * (1 + 2j if dtype.is_complex else 1)
    for divisor, before in HOW:
        want = parts.to(torch.complex128).sum(0) / divisor
        for got in (rank_sum_cpu(parts, divisor, before), rank_sum_triton(parts.to(device), divisor, before)):
            assert got.dtype == dtype
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got.cpu().to(torch.complex128), want, rtol=0, atol=20 * eps)


@pytest.mark.parametrize("ranks", [2, 5, 8, 20])
def test_an_element_has_the_same_bits_whatever_it_is_sent_along_with(ranks: int, device: str) -> None:
    for dtype in FLOATS:
        parts = parts_of(ranks, 1500, dtype)
        for sum_of, its_parts in ((rank_sum_cpu, parts), (rank_sum_triton, parts.to(device))):
            whole = sum_of(its_parts, 1, False)
            for columns in (slice(0, 1), slice(7, 10), slice(400, 433), slice(3, None)):
                assert torch.equal(sum_of(its_parts[:, columns], 1, False), whole[columns])


@pytest.mark.parametrize("ranks", [2, 5, 8, 20])
def test_parts_are_added_in_the_order_of_the_ranks(ranks: int, device: str) -> None:
    parts = parts_of(ranks, 33, torch.float32)
    want = parts[0]
    for part in parts[1:]:
        want = want + part
    assert torch.equal(rank_sum_cpu(parts, 1, False), want)
    assert torch.equal(rank_sum_triton(parts.to(device), 1, False).cpu(), want)


def test_the_mean_is_finite_where_the_sum_of_low_precision_is_not(device: str) -> None:
    parts = torch.full((4, 3), torch.finfo(torch.float16).max, dtype=torch.float16)
    huge = torch.full((4, 3), torch.finfo(torch.float32).max)
    for sum_of, where in ((rank_sum_cpu, "cpu"), (rank_sum_triton, device)):
        assert torch.equal(sum_of(parts.to(where), 4, False).cpu(), parts[0])
        assert torch.equal(sum_of(huge.to(where), 4, True).cpu(), huge[0])  # of float32 only where it is divided before
    assert rank_sum_cpu(huge, 4, False).isinf().all()


@pytest.mark.slow
def test_opcheck_passes_on_rank_sum(device: str) -> None:
    for dtype in (*FLOATS, torch.float64, torch.complex64):
        opcheck(rank_sum, (parts_of(3, 5, dtype).to(device), 3, False))
        opcheck(rank_sum, (parts_of(3, 0, dtype).to(device), 1, True))
