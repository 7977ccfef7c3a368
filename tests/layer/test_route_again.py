"""route and the losses give the same again: in recomputation, beside other tokens, and for gradients of any layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moecomm.functional as mf
from moecomm.layer.scores import log_sigmoid, sigmoid

E, K = 8, 2
OPTIONS: list[dict[str, Any]] = [
    {"score": score, "normalize": normalize, **more}
    for score, normalize in itertools.product(("softmax", "sigmoid"), (True, False))
    for more in ({}, {"bias": torch.linspace(-0.1, 0.1, E), "num_groups": 4, "top_groups": 2})
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_token_has_the_same_bits_whatever_else_is_in_the_batch(dtype: torch.dtype) -> None:
    for options in OPTIONS:
        logits = (3 * normal(21, E, dtype=dtype)).requires_grad_()
        weights, experts = mf.route(logits, K, **options)
        cotangent = normal(21, K, dtype=weights.dtype, seed=1)
        (grad,) = torch.autograd.grad(weights, logits, cotangent)
        for part in (slice(0, 1), slice(5, 6), slice(20, 21), slice(3, 6), slice(0, 10), slice(10, 21)):
            own = logits[part].detach().requires_grad_()
            weights_alone, experts_alone = mf.route(own, K, **options)
            assert torch.equal(experts_alone, experts[part])
            assert torch.equal(weights_alone, weights[part])
            assert torch.equal(torch.autograd.grad(weights_alone, own, cotangent[part])[0], grad[part])


def test_the_scores_agree_with_those_of_torch_in_float64_and_so_do_their_derivatives() -> None:
    values = torch.cat((normal(50) * 5, torch.tensor([0.0, -0.0, -90.0, 90.0, -1e4, 1e4, -16.0, 16.0])))
    for ours, theirs in ((sigmoid, torch.sigmoid), (log_sigmoid, torch.nn.functional.logsigmoid)):
        mine, exact = values.clone().requires_grad_(), values.double().requires_grad_()
        got, want = ours(mine), theirs(exact)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-38)
        (got,), (want,) = torch.autograd.grad(got.sum(), mine), torch.autograd.grad(want.sum(), exact)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
    assert torch.autograd.gradcheck(log_sigmoid, normal(5, dtype=torch.float64).requires_grad_())
    masked = torch.tensor([-torch.inf, 0.0], requires_grad=True)
    (grad,) = torch.autograd.grad(log_sigmoid(masked)[1], masked)
    assert grad.tolist() == [0, 0.5]


@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
def test_recomputation_under_checkpointing_makes_the_same_choice_among_ties_and_the_same_load(options: dict[str, Any]) -> None:
    """Logits in bfloat16 have many ties. What a layer gives out of a checkpoint counts once."""
    chosen: list[Tensor] = []

    def layer(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        logits = (x @ gate).mul(4).round().div(4)
        weights, experts = mf.route(logits, K, **options)
        chosen.append(experts)
        plan = mf.plan(experts, weights, E)
        y = mf.combine(mf.dispatch(x, plan).sin(), plan)
        return y.float().square().sum() + mf.load_balance_loss(logits, experts, score=options["score"]) + mf.z_loss(
            logits, experts
        ), experts

    x = normal(40, 4, dtype=torch.bfloat16)
    results = []
    for again in (False, True):
        chosen.clear()
        leaves = [x.clone().requires_grad_(), normal(4, E, seed=1, dtype=torch.bfloat16).requires_grad_()]
        loss, experts = checkpoint(layer, *leaves, use_reentrant=False) if again else layer(*leaves)
        loss.backward()
        assert len(chosen) == 1 + again
        assert all(torch.equal(each, experts) for each in chosen)
        results.append([loss, experts, mf.update_bias(torch.zeros(E), experts), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def layouts(values: Tensor) -> list[Tensor]:
    """The same values in other layouts."""
    wide = torch.zeros(values.shape[0], 2 * values.shape[1], dtype=values.dtype)
    wide[:, ::2] = values
    return [values.t().contiguous().t(), wide[:, ::2]]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_and_gradients_of_any_layout_give_what_dense_ones_give(options: dict[str, Any]) -> None:
    def gradients(logits: Tensor, cotangent: Tensor) -> list[Tensor]:
        weights, experts = mf.route(logits, K, **options)
        losses = mf.load_balance_loss(logits, experts, score=options["score"]), mf.z_loss(logits, experts)
        return [torch.autograd.grad(weights, logits, cotangent)[0], *(torch.autograd.grad(loss, logits)[0] for loss in losses)]

    values, cotangent = normal(9, E), normal(9, K, seed=1)
    dense = gradients(values.clone().requires_grad_(), cotangent)
    for logits, grad in zip(layouts(values), layouts(cotangent), strict=True):
        torch.testing.assert_close(gradients(logits.detach().requires_grad_(), grad), dense, rtol=1e-6, atol=1e-7)
    row, one = values[:1].expand(9, E), torch.ones(()).expand(9, K)  # as the backward of a sum gives it
    want = gradients(row.clone().requires_grad_(), one.clone())
    torch.testing.assert_close(gradients(row.detach().requires_grad_(), one), want, rtol=1e-6, atol=1e-7)
