"""gather: each row's token, zeros for padding; its backward is the sum of each token's rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from moecomm.ops.routing.counting_sort import counting_sort
from moecomm.ops.rows.gather import gather, gather_cpu, gather_fake, gather_triton
from tests.ops.cases import FLOATS, assert_same_layout, guarded, inverse, padded, routing, seeded, strided

ALL_DTYPES = (torch.float64, torch.bool, torch.uint8, torch.int16, torch.int64, torch.uint16, torch.complex64, torch.complex128)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


def indices(tokens: int, k: int, seed: int, extra: int = 0) -> tuple[Tensor, Tensor]:
    """(order, position) of a routing to 5 experts, with ``extra`` rows of padding."""
    experts = routing(tokens, k, 5, seed)
    order, _, _ = counting_sort(experts, 5, int((experts >= 0).sum()))
    order = padded(order, extra)
    return order, inverse(order, tokens, k)


def expected(x: Tensor, order: Tensor, k: int) -> Tensor:
    rows = torch.zeros(order.shape[0], x.shape[1], dtype=x.dtype)
    for n, pair in enumerate(order.tolist()):
        if pair >= 0:
            rows[n] = x[pair // k]
    return rows


def check(x: Tensor, order: Tensor, position: Tensor, device: str) -> None:
    want = bits(expected(x, order, position.shape[1]))
    on_device = (x.to(device), order.to(device), position.to(device))
    for got in (gather_cpu(x, order, position), guarded(gather_triton, *on_device)):
        assert torch.equal(bits(got).cpu(), want)
        assert_same_layout(gather_fake(x, order, position), got)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("d", [0, 1, 17, pytest.param(1024, marks=pytest.mark.slow), pytest.param(1500, marks=pytest.mark.slow)])
def test_gather_agrees_with_a_loop(k: int, d: int, device: str) -> None:
    for dtype in FLOATS:
        x = torch.randn(9, d, generator=seeded(d)).to(dtype)
        check(x, *indices(9, k, seed=k), device)
        check(x, *indices(9, k, seed=k, extra=5), device)


def test_more_rows_than_a_block(device: str) -> None:
    check(torch.randn(150, 3, generator=seeded(0)), *indices(150, 2, seed=0, extra=20), device)


@pytest.mark.parametrize("dtype", ALL_DTYPES + FLOAT8)
def test_gather_moves_any_dtype(dtype: torch.dtype, device: str) -> None:
    x = torch.randint(0, 100, (7, 5), generator=seeded(0)).to(torch.float32 if dtype in FLOAT8 else dtype).to(dtype)
    check(x, *indices(7, 2, seed=1, extra=3), device)


def test_gather_takes_any_strides(device: str) -> None:
    for layout in strided(torch.randn(9, 20, generator=seeded(1))):
        check(layout, *indices(9, 2, seed=2, extra=2), device)
    check(torch.randn(9, 1, generator=seeded(1)).expand(9, 20), *indices(9, 2, seed=2), device)
    check(torch.randn(9, 4, generator=seeded(1)).to(torch.complex128).t().contiguous().t(), *indices(9, 2, seed=2), device)


def test_gather_of_nothing(device: str) -> None:
    none = torch.zeros(0, dtype=torch.int32)
    check(torch.randn(4, 3), none, torch.full((4, 2), -1, dtype=torch.int32), device)
    check(torch.randn(0, 3), none, torch.zeros(0, 2, dtype=torch.int32), device)
    check(torch.randn(0, 3), torch.full((3,), -1, dtype=torch.int32), torch.zeros(0, 2, dtype=torch.int32), device)  # only padding


@pytest.mark.parametrize(("tokens", "k", "d", "extra"), [(4, 2, 3, 0), (3, 1, 2, 0), (3, 2, 2, 3), (0, 2, 3, 0)])
def test_gradients_of_gather(tokens: int, k: int, d: int, extra: int, device: str) -> None:
    order, position = (index.to(device) for index in indices(tokens, k, seed=3, extra=extra))
    x = torch.randn(tokens, d, dtype=torch.float64, generator=seeded(3)).to(device).requires_grad_()
    assert gradcheck(lambda x: gather(x, order, position), x)
    assert gradgradcheck(lambda x: gather(x, order, position), x)


@pytest.mark.slow
def test_gather_passes_opcheck(device: str) -> None:
    for tokens, k, d, extra in ((5, 2, 3, 0), (5, 2, 3, 2), (4, 1, 7, 0), (0, 2, 3, 0), (3, 2, 0, 0), (1, 1, 1, 0)):
        x = torch.randn(tokens, d, generator=seeded(d)).to(device).requires_grad_()
        opcheck(gather, (x, *(index.to(device) for index in indices(tokens, k, seed=tokens, extra=extra))))
