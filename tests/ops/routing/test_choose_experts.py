"""choose: the K best of each row, in one order on every device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.routing.choose_experts import choose, choose_cpu, choose_fake, choose_triton
from tests.ops.cases import FLOATS, assert_same_layout, guarded, seeded, strided

NAN, INF = math.nan, math.inf


def expected(scores: Tensor, k: int) -> Tensor:
    """By a stable sort of Python's floats."""
    rows = []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda e: (not math.isnan(row[e]), -row[e]))
        rows.append([-1 if row[e] == -INF else e for e in order[:k]])
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), k)


def check(scores: Tensor, k: int, device: str) -> None:
    want = expected(scores, k)
    for got in (choose_cpu(scores, k), guarded(choose_triton, scores.to(device), k)):
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0)
        assert_same_layout(choose_fake(scores, k), got)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "k"),
    [(5, 8, 2), (70, 6, 6), (130, 3, 1), (33, 100, 8), (9, 512, 8), (3, 700, 5), (1, 1, 1), (65, 1, 1), (0, 4, 2)],
)
def test_choose_agrees_with_a_stable_sort(tokens: int, num_experts: int, k: int, dtype: torch.dtype, device: str) -> None:
    check(torch.randn(tokens, num_experts, generator=seeded(tokens)).to(dtype), k, device)


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (*FLOATS[1:], torch.float64))])
def test_of_equal_scores_the_lower_id_comes_first(dtype: torch.dtype, device: str) -> None:
    for few in (1, 2, 5):
        scores = torch.randint(-few, few + 1, (60, 40), generator=seeded(few)).to(dtype)
        check(scores, 12, device)
    check(torch.zeros(40, 130, dtype=dtype), 7, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbouring_floats_of_any_size_are_told_apart(dtype: torch.dtype, device: str) -> None:
    limits = torch.finfo(dtype)
    sizes = torch.tensor([limits.tiny / 8, limits.tiny, 1e-5, 1.0, 3.0, 1e30, limits.max / 2], dtype=dtype)
    close = torch.stack((sizes, sizes.nextafter(torch.tensor(INF, dtype=dtype)), sizes), 1).flatten()
    values = torch.cat((close, -close, torch.tensor([0.0, -0.0], dtype=dtype)))
    order = torch.rand(30, values.shape[0], generator=seeded(1)).argsort(1)
    check(values[order], values.shape[0], device)


def test_minus_zero_is_zero(device: str) -> None:
    check(torch.tensor([[-0.0, 0.0, -0.0], [0.0, -0.0, 0.0]]), 3, device)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_scores_of_minus_infinity_are_never_chosen(dtype: torch.dtype, device: str) -> None:
    scores = torch.randn(50, 9, generator=seeded(3)).to(dtype)
    scores[torch.rand(50, 9, generator=seeded(4)) < 0.6] = -INF
    scores[7] = -INF
    scores[8, 2:] = torch.finfo(dtype).min  # finite
    assert (expected(scores, 5) == -1).any()
    check(scores, 5, device)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_nan_of_either_sign_is_the_highest(dtype: torch.dtype, device: str) -> None:
    special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, 1.0, -1.0], dtype=dtype)
    check(special[torch.randint(0, 7, (60, 11), generator=seeded(5))], 11, device)


def test_choose_takes_any_strides(device: str) -> None:
    for layout in strided(torch.randn(37, 12, generator=seeded(6))):
        check(layout, 3, device)


def test_choose_leaves_its_argument_as_it_was(device: str) -> None:
    scores = torch.randn(10, 6, generator=seeded(7))
    before = scores.clone()
    check(scores, 4, device)
    assert torch.equal(scores, before)


@pytest.mark.slow
def test_choose_passes_opcheck(device: str) -> None:
    for tokens, num_experts, k in ((5, 8, 2), (4, 1, 1), (0, 4, 2), (1, 3, 3)):
        opcheck(choose, (torch.randn(tokens, num_experts, generator=seeded(8)).to(device).requires_grad_(), k))
