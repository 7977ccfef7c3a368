"""Logits of -inf, scores that round to zero, and padding tokens: what they are in route, in every loss and in every count."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from tests.spawn import run_ranks

E, K, D, INF = 6, 2, 4, math.inf
SCORES = ("softmax", "sigmoid")
ROUTES: list[dict[str, Any]] = [
    {"score": score, "normalize": normalize, **groups}
    for score, normalize in itertools.product(SCORES, (True, False))
    for groups in ({}, {"num_groups": 3, "top_groups": 2}, {"num_groups": 2, "top_groups": 1, "group_score": "max"})
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def log_score(logit: Tensor, score: str) -> Tensor:
    """The logarithm of a finite logit's score, up to a number that all experts share."""
    return logit if score == "softmax" else min(logit, 0 * logit) - (-logit.abs()).exp().log1p()


def balance(logits: Tensor, experts: Tensor, score: str) -> Tensor:
    """E * sum over e of f_e * p_e by loops, with no number for what is masked; logits are float64."""
    slots = [e for ids in experts.tolist() for e in ids if e >= 0]
    routed = [t for t, ids in enumerate(experts.tolist()) if max(ids) >= 0]
    loss = (0 * logits[logits > -INF]).sum()
    for t in routed:
        allowed = [e for e in range(E) if logits[t, e] > -INF]
        logs = [log_score(logits[t, e], score) for e in allowed]
        powers = [(log - max(logs).detach()).exp() for log in logs]
        for e, power in zip(allowed, powers, strict=True):
            loss = loss + E * slots.count(e) / len(slots) * power / sum(powers) / len(routed)
    return loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_the_balance_loss_of_logits_is_right_for_any_finite_logits_and_masked_ones_get_no_gradient(score: Any, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for middle, width in ((0, 1), (-20, 1), (-90, 3), (-1e4, 3), (1e4, 3), (0, 300), (info.min, 0), (info.max, 0)):
        logits = (middle + width * normal(7, E)).clamp(info.min, info.max).to(dtype)
        logits[1], logits[2, :3], logits[3, 1:] = -INF, -INF, -INF
        mine, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        experts = mf.route(mine, K, score=score)[1]
        experts[4] = -1
        loss, want = mf.load_balance_loss(mine, experts, score=score), balance(exact, experts, score)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(loss.double(), want, rtol=32 * torch.finfo(loss.dtype).eps, atol=0)
        (grad,), (want_grad,) = torch.autograd.grad(loss, mine), torch.autograd.grad(want, exact)
        rounding = 8 * max(info.eps, torch.finfo(loss.dtype).eps)
        least = info.smallest_normal * info.eps + rounding * float(want_grad.abs().max())
        torch.testing.assert_close(grad.double(), want_grad, rtol=rounding, atol=least)
        assert not grad[logits == -INF].any()
        assert not grad[4].any()


def masks() -> dict[str, Tensor]:
    """Additive masks [T, E] of 5 tokens: padding tokens, experts switched off, a group of experts, all but one, and all."""
    mask = {name: torch.zeros(5, E) for name in ("padding", "experts", "group", "all but one", "all")}
    mask["padding"][1:3] = mask["experts"][:, [0, 4]] = mask["group"][1:4, 2:4] = mask["all but one"][:, 1:] = mask["all"][:] = -INF
    return mask


@pytest.mark.parametrize("name", masks())
def test_a_gate_with_masked_logits_gets_a_finite_gradient_and_what_is_masked_none(name: str) -> None:
    mask = masks()[name]
    for options, dtype in itertools.product(ROUTES, (torch.float32, torch.bfloat16)):
        x, gate = normal(5, D, dtype=dtype), normal(D, E, seed=1, dtype=dtype).requires_grad_()
        logits = x @ gate + mask.to(dtype)
        weights, experts = mf.route(logits, K, bias=normal(E, seed=2), **options)
        without = (mask == -INF).all(1)
        assert experts[without].eq(-1).all()
        assert weights[without].eq(0).all()
        losses = [mf.load_balance_loss(logits, experts, score=options["score"]), mf.z_loss(logits), mf.z_loss(logits, experts)]
        assert all(loss.isfinite() for loss in losses)
        torch.testing.assert_close(losses[1], losses[2], rtol=0, atol=0)
        for result in (*losses, (weights * normal(5, K, seed=3)).sum()):
            to_logits, to_gate = torch.autograd.grad(result, (logits, gate), retain_graph=True)
            assert to_gate.isfinite().all()
            assert not to_logits[mask == -INF].any()
        if name == "all":
            assert [loss.item() for loss in losses] == [0, 0, 0]
            assert torch.equal(mf.update_bias(normal(E), experts), normal(E))


def test_a_logit_of_the_lowest_finite_number_beside_logits_of_minus_infinity_has_all_of_the_weight() -> None:
    for dtype, options in itertools.product((torch.float32, torch.bfloat16), ROUTES):
        logits = torch.full((1, E), -INF, dtype=dtype)
        logits[0, 3] = torch.finfo(dtype).min
        weights, experts = mf.route(logits, K, **options)
        assert experts.tolist() == [[3, -1]]
        assert weights.tolist() == [[0 if options["score"] == "sigmoid" and not options["normalize"] else 1, 0]]
        assert mf.load_balance_loss(logits, experts, score=options["score"]).item() == E


def padded(values: Tensor, fill: float) -> Tensor:
    """A batch [T, ...] padded to twice its length: a padding token after each of the first half, the others at the end."""
    half = len(values) // 2
    fills = values.new_full(values.shape, fill)
    first = torch.stack((values[:half], fills[:half]), 1).flatten(0, 1)
    return torch.cat((first, values[half:], fills[half:]))


def batch_here(tokens: tuple[int, ...], how: str, score: Any) -> dict[str, Tensor]:
    """Losses and counts over the group, and the gradient of each loss for the gate, averaged over the ranks as data parallelism does."""
    rank = dist.get_rank()
    x, gate = normal(sum(tokens), D).split(tokens)[rank], normal(D, E, seed=1).requires_grad_()
    mask = torch.zeros(len(x), 1, dtype=torch.float64)
    if how != "none" and rank != 0:  # rank 0 has no padding: the ranks' parts of the batch differ
        x, mask = padded(x, 0.5), padded(mask, -INF)
    logits = x @ gate
    if how == "logits":
        logits = logits + mask
    weights, experts = mf.route(logits, K, score=score)
    if how == "ids":
        experts = experts.masked_fill(mask == -INF, -1)
    plan = mf.plan(experts, weights, E)
    losses = {
        "balance": mf.load_balance_loss(logits, experts, score=score),
        "z": mf.z_loss(logits, experts, None),
        "layer": mf.combine(mf.dispatch(x, plan).sin(), plan).square().sum(),
    }
    results: dict[str, Tensor] = {"bias": mf.update_bias(torch.zeros(E), experts)}
    for name, loss in losses.items():
        (grad,) = torch.autograd.grad(loss, gate, retain_graph=True)
        results[name], results[f"{name}'s gradient"] = loss.detach(), mf.slice_gather(grad.unsqueeze(0), None).mean(0)
    kept = mf.limit_by_capacity(experts, E, 2)
    results["kept"] = kept[mask[:, 0] == 0]
    results["z of this rank"] = mf.z_loss(logits, experts).detach()
    return results


def batches_here() -> list[Any]:
    return [
        [batch_here(tokens, how, score) for how in ("none", "logits", "ids")]
        for tokens, score in itertools.product(((5, 8), (0, 3), (0, 0)), SCORES)
    ]


@pytest.mark.slow
def test_a_batch_padded_to_twice_its_length_has_the_same_losses_counts_and_gradients_over_a_group_too() -> None:
    for cases in run_ranks(batches_here, 2):
        for plain, *others in cases:
            for other in others:
                torch.testing.assert_close(other, plain, rtol=1e-12, atol=1e-13)


def z_here(tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    logits = normal(sum(tokens), E).split(tokens)[dist.get_rank()].clone().requires_grad_()
    loss = mf.z_loss(logits, None, None)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_the_z_loss_over_a_group_is_that_of_all_ranks_tokens_and_its_gradient_that_of_the_sum_of_all_ranks_losses() -> None:
    tokens = (5, 0, 2)
    logits = normal(7, E).requires_grad_()
    want = logits.logsumexp(1).square().mean()
    (want_grad,) = torch.autograd.grad(want, logits)
    losses, grads = zip(*run_ranks(z_here, 3, tokens), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    torch.testing.assert_close(losses[0], want.detach())
    torch.testing.assert_close(torch.cat(grads), 3 * want_grad)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens_of_which_some_are_padding(tokens: int) -> None:
    for score, dropped in itertools.product(SCORES, range(tokens + 1)):
        logits = normal(tokens, E).requires_grad_()
        weights, experts = mf.route(logits, K, score=score)
        experts = experts.clone()
        experts[:dropped] = -1
        loss = mf.load_balance_loss(logits, experts, score=score)
        z = mf.z_loss(logits, experts)
        torch.testing.assert_close(loss, balance(logits, experts, score))
        torch.testing.assert_close(z, logits[dropped:].logsumexp(1).square().sum() / max(1, tokens - dropped))
        (grad,) = torch.autograd.grad(loss + z + 0 * weights.sum(), logits)
        assert grad.isfinite().all()
        assert not grad[:dropped].any()


IDS = torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mf.load_balance_loss(torch.zeros(4, 5), IDS, score="relu"), ValueError, "score was 'relu'; it must be"),
        (lambda: mf.z_loss(torch.zeros(4, 5), torch.zeros(4, 2)), TypeError, "experts was of dtype torch.float32"),
        (lambda: mf.z_loss(torch.zeros(4, 5), IDS[1:]), ValueError, r"experts was of shape \[3, 2\]; .* logits' T = 4 tok"),
        (lambda: mf.z_loss(torch.zeros(4, 5, device="meta"), IDS), ValueError, "experts was on cpu; .* logits' device"),
        (lambda: mf.z_loss(torch.zeros(4, 5), None, 3), TypeError, "group was int"),
        (lambda: mf.route(torch.zeros(4, 5), 2, scale="a"), TypeError, "scale was str; it must be a number"),
        (lambda: mf.route(torch.zeros(4, 5), 2, scale=True), TypeError, "scale was bool; it must be a number"),
        (lambda: mf.route(torch.zeros(4, 5), 2, normalize="no"), TypeError, "normalize was str; it must be a bool"),
        (lambda: mf.route(torch.zeros(4, 5), 2, normalize=1), TypeError, "normalize was int; it must be a bool"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
