"""The CPU path of the weighted sum and its backward in low precision, with float32 weights that the rows' dtype cannot hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moecomm.functional as mf
from moecomm.ops.rows.weighted_sum import weighted_sum_cpu
from moecomm.ops.rows.weighted_sum_backward import backward_cpu
from tests.ops.cases import seeded

LOW = [torch.float16, torch.bfloat16]
EXPONENTS = {torch.float16: (-45.0, 30.0), torch.bfloat16: (-148.0, 127.0)}  # of weights: from float32's least number on


def units(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in units in the last place of ``want`` (float64) in got's dtype."""
    info = torch.finfo(got.dtype)
    unit = info.eps * torch.exp2(want.abs().clamp(min=info.smallest_normal).log2().floor())
    return torch.where(got.double() == want.to(got.dtype).double(), 0, (got.double() - want).abs() / unit)


def case(dtype: torch.dtype, tokens: int, k: int, d: int) -> tuple[Tensor, ...]:
    """(rows [N, D], weights [T, K], order, position, grad [T, D]): no sign differs within a sum, and a third of the slots are dropped."""
    generator = seeded(tokens + k)
    low, high = EXPONENTS[dtype]
    weights = torch.exp2(low + (high - low) * torch.rand(tokens, k, generator=generator, dtype=torch.float64)).float()
    weights[torch.rand(tokens, k, generator=generator) < 0.1] = 0
    weights[::7] = torch.rand(weights[::7].shape, generator=generator)
    order = torch.randperm(tokens * k, generator=generator)[: tokens * k * 2 // 3].int()
    position = torch.full((tokens * k,), -1, dtype=torch.int32)
    position[order.long()] = torch.arange(len(order), dtype=torch.int32)
    rows, grad = (torch.exp2(16 * torch.rand(n, d, generator=generator) - 8).to(dtype) for n in (len(order), tokens))
    return rows, weights, order, position.view(tokens, k), grad


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_sums_and_their_gradients_are_within_one_unit_in_the_last_place_for_weights_of_any_size(dtype: torch.dtype, k: int) -> None:
    rows, weights, order, position, grad = case(dtype, 60, k, 40)
    token = order.long() // k
    factors = weights.flatten()[order.long()].double().unsqueeze(1)
    want = torch.zeros(60, 40, dtype=torch.float64).index_add_(0, token, factors * rows.double())
    assert units(weighted_sum_cpu(rows, weights, order, position), want).max() <= 1
    grad_rows, grad_weights = backward_cpu(grad, rows, weights, order, position)
    assert units(grad_rows, factors * grad.double()[token]).max() <= 1
    dots = torch.zeros(weights.numel(), dtype=torch.float64).index_copy_(0, order.long(), (grad.double()[token] * rows.double()).sum(1))
    torch.testing.assert_close(grad_weights.double(), dots.view_as(weights), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("weight", [1e-6, 1e-7, 1e-8, 7e4, 1e-39, 3.4e38, float("inf"), float("nan")])
def test_one_weight_beyond_the_rows_dtype_changes_its_own_token_alone(dtype: torch.dtype, weight: float) -> None:
    rows, _, order, position, _ = case(dtype, 20, 2, 8)
    weights = torch.rand(20, 2, generator=seeded(0)) + 0.01
    before = weighted_sum_cpu(rows, weights, order, position)
    token, slot = (position >= 0).nonzero()[5].tolist()
    weights[token, slot] = weight
    weights[position < 0] = float("nan")  # those of dropped slots do not count
    after = weighted_sum_cpu(rows, weights, order, position)
    others = torch.arange(20) != token
    assert torch.equal(after[others], before[others])
    terms = torch.where(position[token] >= 0, weights[token].double(), 0) @ rows[position[token].clamp(min=0).long()].double()
    torch.testing.assert_close(after[token], terms.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW)
def test_a_layer_with_small_sigmoid_scores_is_exact_to_one_unit_in_the_last_place(dtype: torch.dtype) -> None:
    logits = -14 + torch.randn(30, 6, generator=seeded(1))
    x = (1 + torch.rand(30, 16, generator=seeded(2))).mul(1000).to(dtype).requires_grad_()
    weights, experts = mf.route(logits, 2, score="sigmoid", normalize=False)
    plan = mf.plan(experts, weights, 6)
    y = mf.combine(mf.dispatch(x, plan), plan)
    exact = logits.double().sigmoid().gather(1, experts).sum(1, keepdim=True)  # the experts do nothing
    assert units(y.detach(), exact * x.detach().double()).max() <= 1
    (grad,) = torch.autograd.grad(y.sum(), x)
    info = torch.finfo(dtype)
    torch.testing.assert_close(grad.double(), exact.expand(30, 16), rtol=2 * info.eps, atol=info.smallest_normal)
