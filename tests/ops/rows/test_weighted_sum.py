"""weighted_sum and weighted_sum_backward: each token's weighted sum over its rows, and the gradients of the rows and of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from moecomm.ops.routing.counting_sort import counting_sort
from moecomm.ops.rows.weighted_sum import weighted_sum, weighted_sum_cpu, weighted_sum_fake, weighted_sum_triton
from moecomm.ops.rows.weighted_sum_backward import backward_cpu, backward_fake, backward_triton, weighted_sum_backward
from tests.ops.cases import FLOATS, assert_same_layout, assert_within_rounding, guarded, inverse, padded, routing, seeded, strided

FLOAT32_SUM = 2.0**-23  # what one float32 operation may add of the sum of the terms' sizes, generously
SPLIT_WEIGHT = {torch.float32: 0.0, torch.bfloat16: 2.0**-16, torch.float16: 2.0**-22}  # the CPU path: a weight in two parts


def case(tokens: int, k: int, d: int, dtype: torch.dtype, weight_dtype: torch.dtype, extra: int = 0) -> tuple[Tensor, ...]:
    """(rows [N, D], weights [T, K], order, position, grad [T, D])."""
    experts = routing(tokens, k, 5, seed=tokens + k)
    order, _, _ = counting_sort(experts, 5, int((experts >= 0).sum()))
    order = padded(order, extra)
    generator = seeded(d)
    rows = torch.randn(order.shape[0], d, generator=generator).to(dtype)
    weights = torch.rand(tokens, k, generator=generator).to(weight_dtype)
    grad = torch.randn(tokens, d, generator=generator).to(dtype)
    return rows, weights, order, inverse(order, tokens, k), grad


def expected_sum(rows: Tensor, weights: Tensor | None, position: Tensor) -> tuple[Tensor, Tensor]:
    """y [T, D] in float64, and the sum of its terms' sizes."""
    y = torch.zeros(position.shape[0], rows.shape[1], dtype=torch.float64)
    sizes = torch.zeros_like(y)
    for m, slots in enumerate(position.tolist()):
        for j, n in enumerate(slots):
            if n >= 0:
                term = rows[n].double() * (1.0 if weights is None else weights[m, j].double())
                y[m] += term
                sizes[m] += term.abs()
    return y, sizes


def expected_gradients(grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_rows [N, D], grad_weights [T, K], the sum of its terms' sizes) in float64."""
    k = weights.shape[1]
    grad_rows = torch.zeros(rows.shape, dtype=torch.float64)
    grad_weights = torch.zeros(weights.shape, dtype=torch.float64)
    sizes = torch.zeros_like(grad_weights)
    for n, pair in enumerate(order.tolist()):
        if pair >= 0:
            m, j = divmod(pair, k)
            grad_rows[n] = weights[m, j].double() * grad[m].double()
            products = grad[m].double() * rows[n].double()
            grad_weights[m, j] = products.sum()
            sizes[m, j] = products.abs().sum()
    return grad_rows, grad_weights, sizes


def check_sum(rows: Tensor, weights: Tensor | None, order: Tensor, position: Tensor, device: str) -> None:
    want, sizes = expected_sum(rows, weights, position)
    k = position.shape[1]
    args = (rows, weights, order, position)
    on_device = [None if tensor is None else tensor.to(device) for tensor in args]
    got = guarded(weighted_sum_triton, *on_device)
    assert_within_rounding(got, want, sizes, (k + 1) * FLOAT32_SUM, interpreted=device == "cpu")
    assert_same_layout(weighted_sum_fake(*args), got)
    got = weighted_sum_cpu(*args)
    assert_within_rounding(got, want, sizes, (k + 1) * FLOAT32_SUM + SPLIT_WEIGHT[rows.dtype])
    assert_same_layout(weighted_sum_fake(*args), got)


def check_gradients(grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, position: Tensor, device: str) -> None:
    want_rows, want_weights, sizes = expected_gradients(grad, rows, weights, order)
    args = (grad, rows, weights, order, position)
    on_device = guarded(backward_triton, *(tensor.to(device) for tensor in args))
    for got, interpreted in ((backward_cpu(*args), False), (on_device, device == "cpu")):
        assert_same_layout(backward_fake(*args), got)
        assert_within_rounding(got[0], want_rows, want_rows.abs(), FLOAT32_SUM, interpreted)
        assert_within_rounding(got[1], want_weights, sizes, rows.shape[1] * FLOAT32_SUM / 2, interpreted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("d", [0, 1, 17, pytest.param(1024, marks=pytest.mark.slow), pytest.param(1500, marks=pytest.mark.slow)])
def test_both_paths_agree_with_a_float64_loop(k: int, d: int, dtype: torch.dtype, device: str) -> None:
    """To one rounding to the dtype, beside what accumulation in float32 allows."""
    for weight_dtype in {torch.float32, dtype}:
        rows, weights, order, position, grad = case(5, k, d, dtype, weight_dtype)
        check_sum(rows, weights, order, position, device)
        check_gradients(grad, rows, weights, order, position, device)
    check_sum(rows, None, order, position, device)


@pytest.mark.slow
def test_more_tokens_than_a_block_has_rows(device: str) -> None:
    rows, weights, order, position, grad = case(150, 2, 3, torch.float32, torch.float32)
    check_sum(rows, weights, order, position, device)
    check_gradients(grad, rows, weights, order, position, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_of_low_precision_accumulate_in_float32(dtype: torch.dtype, device: str) -> None:
    """64 terms: an accumulator in the dtype itself would be off by several roundings."""
    order = torch.arange(64, dtype=torch.int32)
    rows = 1 + torch.rand(64, 5, generator=seeded(0)).to(dtype)
    for weights in (None, torch.rand(1, 64, generator=seeded(1)), torch.rand(1, 64, generator=seeded(1)).to(dtype)):
        for layout in strided(rows):
            check_sum(layout, weights, order, order.view(1, 64), device)


def test_padding_has_no_gradient(device: str) -> None:
    for k in (1, 2, 8):
        rows, weights, order, position, grad = case(9, k, 19, torch.float32, torch.float32, extra=5)
        check_sum(rows, weights, order, position, device)
        check_gradients(grad.fill_(torch.finfo(torch.float32).max / 4), rows.abs() * 1e-3, weights, order, position, device)


def test_any_strides_will_do(device: str) -> None:
    rows, weights, order, position, grad = case(9, 2, 20, torch.float32, torch.float32, extra=2)
    for r, w, g in zip(strided(rows), strided(weights), strided(grad), strict=True):
        check_sum(r, w, order, position, device)
        check_gradients(g, r, w, order, position, device)
    check_gradients(grad[:, :1].expand(-1, 20), rows, weights[:1].expand(9, 2), order, position, device)  # as the backward of sum gives


def test_sums_of_nothing(device: str) -> None:
    for tokens, extra in ((4, 0), (4, 3), (0, 0), (0, 3)):
        order = torch.full((extra,), -1, dtype=torch.int32)
        position = torch.full((tokens, 2), -1, dtype=torch.int32)
        rows, weights, grad = torch.randn(extra, 3), torch.rand(tokens, 2), torch.randn(tokens, 3)
        check_sum(rows, weights, order, position, device)
        check_sum(rows, None, order, position, device)
        check_gradients(grad, rows, weights, order, position, device)


def test_the_same_call_gives_the_same_bits(device: str) -> None:
    rows, weights, order, position, grad = case(300, 8, 96, torch.float32, torch.float32)
    for function, args in (
        (weighted_sum_cpu, (rows, weights, order, position)),
        (backward_cpu, (grad, rows, weights, order, position)),
    ):
        once, again = function(*args), function(*args)
        torch.testing.assert_close(once, again, rtol=0, atol=0)
    rows, weights, order, position, grad = (x.to(device) for x in case(20, 8, 96, torch.float32, torch.float32))
    once, again = weighted_sum_triton(rows, weights, order, position), weighted_sum_triton(rows, weights, order, position)
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    once, again = backward_triton(grad, rows, weights, order, position), backward_triton(grad, rows, weights, order, position)
    torch.testing.assert_close(once, again, rtol=0, atol=0)


def test_the_number_of_threads_does_not_show() -> None:
    rows, weights, order, position, grad = case(300, 8, 96, torch.float32, torch.float32)
    threads = torch.get_num_threads()
    sums, gradients = [], []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums.append(weighted_sum_cpu(rows, weights, order, position))
            gradients.append(backward_cpu(grad, rows, weights, order, position))
    finally:
        torch.set_num_threads(threads)
    for i in (1, 2):
        torch.testing.assert_close((sums[i], *gradients[i]), (sums[0], *gradients[0]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tokens", "k", "d", "extra"), [(4, 2, 3, 0), (3, 1, 2, 0), pytest.param(3, 2, 2, 3, marks=pytest.mark.slow), (0, 2, 3, 0)]
)
def test_gradients_first_and_second(tokens: int, k: int, d: int, extra: int, device: str) -> None:
    rows, weights, order, position, grad = (x.to(device) for x in case(tokens, k, d, torch.float64, torch.float64, extra))
    rows, weights, grad = rows.requires_grad_(), weights.requires_grad_(), grad.requires_grad_()
    for function, inputs in (
        (lambda rows, weights: weighted_sum(rows, weights, order, position), (rows, weights)),
        (lambda rows: weighted_sum(rows, None, order, position), (rows,)),
        (lambda grad, rows, weights: weighted_sum_backward(grad, rows, weights, order, position), (grad, rows, weights)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.slow
def test_both_pass_opcheck(device: str) -> None:
    for tokens, k, d, extra in ((5, 2, 3, 0), (5, 2, 3, 2), (4, 1, 7, 0), (0, 2, 3, 0), (3, 2, 0, 0), (1, 1, 1, 0)):
        rows, weights, order, position, grad = (x.to(device) for x in case(tokens, k, d, torch.float32, torch.float32, extra))
        rows, weights, grad = rows.requires_grad_(), weights.requires_grad_(), grad.requires_grad_()
        opcheck(weighted_sum, (rows, weights, order, position))
        opcheck(weighted_sum, (rows, None, order, position))
        opcheck(weighted_sum_backward, (grad, rows, weights, order, position))
