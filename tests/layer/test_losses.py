"""load_balance_loss, z_loss and update_bias, against loops in float64 over the tokens of the whole group."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import moecomm.functional as mf
from tests.ops.cases import check_gradients_across_ranks
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

NUM_EXPERTS, K, INF = 5, 2, math.inf
TOKENS = {1: [(13,), (1,), (0,)], 2: [(9, 4), (0, 7)], 4: [(5, 0, 11, 1), (0, 0, 3, 0), (0, 0, 0, 0)]}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def routing(tokens: int, seed: int = 0) -> Tensor:
    """[T, K]: some slots are dropped, and all slots of some tokens; the first experts have more."""
    generator = torch.Generator().manual_seed(seed)
    experts = (NUM_EXPERTS * torch.rand(tokens, K, generator=generator) ** 2).long()
    return experts.masked_fill(torch.rand(tokens, K, generator=generator) < 0.4, -1)


def balance(probabilities: Tensor, experts: Tensor) -> Tensor:
    """E * sum over e of f_e * p_e, by loops; probabilities are float64."""
    slots = [e for ids in experts.tolist() for e in ids if e >= 0]
    routed = [t for t, ids in enumerate(experts.tolist()) if max(ids) >= 0]
    if not routed:
        return 0 * probabilities.sum()
    load = Counter(slots)
    loss = torch.zeros((), dtype=torch.float64)
    for e in range(NUM_EXPERTS):
        mean = sum(probabilities[t, e] for t in routed) / len(routed)
        loss = loss + NUM_EXPERTS * load[e] / len(slots) * mean
    return loss


def balance_here(tokens: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's loss, and its gradient."""
    rank = dist.get_rank()
    probabilities = normal(sum(tokens), NUM_EXPERTS).softmax(1).to(dtype).split(tokens)[rank].clone().requires_grad_()
    loss = mf.load_balance_loss(probabilities, routing(sum(tokens)).split(tokens)[rank])
    return loss.detach(), torch.autograd.grad(loss, probabilities)[0]


def balances_here(cases: list[Any]) -> list[Any]:
    return [balance_here(*case) for case in cases]


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_the_balance_loss_is_that_of_all_ranks_tokens_and_its_gradient_that_of_the_sum_of_all_ranks_losses(ranks: int) -> None:
    cases = [(tokens, dtype) for tokens in TOKENS[ranks] for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    for (tokens, dtype), parts in zip(cases, zip(*run_ranks(balances_here, ranks, cases), strict=True), strict=True):
        losses, grads = zip(*parts, strict=True)
        probabilities = normal(sum(tokens), NUM_EXPERTS).softmax(1).to(dtype).double().requires_grad_()
        want = balance(probabilities, routing(sum(tokens)))
        (want_grad,) = torch.autograd.grad(want, probabilities)
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        assert losses[0].dtype == torch.promote_types(dtype, torch.float32)
        assert losses[0].shape == ()
        rounding = 8 * torch.finfo(losses[0].dtype).eps
        torch.testing.assert_close(losses[0].double(), want.detach(), rtol=rounding, atol=0)
        torch.testing.assert_close(torch.cat(grads).double(), ranks * want_grad, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_the_balance_loss_is_1_in_balance_and_e_where_one_expert_has_all() -> None:
    even = torch.full((10, 5), 0.2, dtype=torch.float64)
    assert mf.load_balance_loss(even, torch.arange(10).view(10, 1) % 5).item() == pytest.approx(1)
    assert mf.load_balance_loss(torch.eye(5, dtype=torch.float64)[[3] * 10], torch.full((10, 1), 3)).item() == 5


def test_a_token_without_any_expert_counts_for_nothing_even_where_its_probabilities_are_nan() -> None:
    probabilities, experts = normal(6, NUM_EXPERTS).softmax(1), routing(6).clamp(min=0)
    want = mf.load_balance_loss(probabilities, experts)
    padded = torch.cat((probabilities, torch.full((2, NUM_EXPERTS), math.nan))).requires_grad_()
    loss = mf.load_balance_loss(padded, torch.cat((experts, torch.full((2, K), -1))))
    torch.testing.assert_close(loss, want)
    (grad,) = torch.autograd.grad(loss, padded)
    assert grad.isfinite().all()
    assert grad[6:].tolist() == [[0.0] * NUM_EXPERTS] * 2


def averaged_here(tokens: tuple[int, ...]) -> Tensor:
    """The gradient of a router's weight, averaged over the ranks as data parallelism does."""
    rank = dist.get_rank()
    x, gate = normal(sum(tokens), 3).split(tokens)[rank], normal(3, NUM_EXPERTS, seed=1).requires_grad_()
    logits = x @ gate
    loss = mf.load_balance_loss(logits.softmax(1), mf.route(logits, K)[1])
    (grad,) = torch.autograd.grad(loss, gate)
    return mf.slice_gather(grad.unsqueeze(0), None).mean(0)


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_gradients_averaged_over_ranks_are_those_of_the_one_loss_of_the_group(ranks: int) -> None:
    tokens = TOKENS[ranks][0]
    x, gate = normal(sum(tokens), 3), normal(3, NUM_EXPERTS, seed=1).requires_grad_()
    logits = x @ gate
    (want,) = torch.autograd.grad(balance(logits.softmax(1), logits.topk(K).indices), gate)
    for grad in run_ranks(averaged_here, ranks, tokens):
        torch.testing.assert_close(grad, want)


def perturbed_here() -> None:
    tokens = (3, 0, 1, 2)[dist.get_rank()]
    experts = routing(tokens, seed=dist.get_rank())
    check_gradients_across_ranks(lambda p: mf.load_balance_loss(p, experts), normal(tokens, NUM_EXPERTS, seed=dist.get_rank()).softmax(1))


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_the_balance_loss_has_the_gradient_that_perturbing_every_rank_finds(ranks: int) -> None:
    run_ranks(perturbed_here, ranks)


def test_the_losses_pass_gradcheck() -> None:
    experts = routing(4)
    assert torch.autograd.gradcheck(lambda p: mf.load_balance_loss(p, experts), normal(4, NUM_EXPERTS).requires_grad_())
    assert torch.autograd.gradcheck(mf.z_loss, normal(4, NUM_EXPERTS).requires_grad_())
    assert torch.autograd.gradgradcheck(mf.z_loss, normal(4, NUM_EXPERTS).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_the_z_loss_agrees_with_loops_in_float64(tokens: int, dtype: torch.dtype) -> None:
    for size in (1.0, 30.0):
        logits = (size * normal(tokens, NUM_EXPERTS)).to(dtype)
        logits[4:6, :2], logits[7:8] = -INF, -INF
        mine, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss = mf.z_loss(mine)
        real = [row[row > -INF] for row in exact if (row > -INF).any()]
        shifts = [row.detach().max() for row in real]
        logs = [shift + sum((logit - shift).exp() for logit in row).log() for row, shift in zip(real, shifts, strict=True)]
        want = sum((log**2 for log in logs), 0 * exact[exact > -INF].sum()) / max(1, len(logs))
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(loss.double(), want, rtol=8 * torch.finfo(loss.dtype).eps, atol=0)
        (grad,), (want_grad,) = torch.autograd.grad(loss, mine), torch.autograd.grad(want, exact)
        rounding = 8 * torch.finfo(dtype).eps * float(want_grad.abs().max()) if tokens else 0.0
        torch.testing.assert_close(grad.double(), want_grad, rtol=0, atol=rounding)


@pytest.mark.parametrize("logit", [1e4, -1e4, 200.0])
def test_the_z_loss_of_large_logits_neither_overflows_nor_vanishes(logit: float) -> None:
    assert mf.z_loss(torch.full((3, 4), logit)).item() == pytest.approx((logit + math.log(4)) ** 2, rel=1e-6)


def next_bias_here(tokens: tuple[int, ...]) -> list[Tensor]:
    own = routing(sum(tokens)).split(tokens)[dist.get_rank()]
    biases = [normal(NUM_EXPERTS, seed=2, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    return [mf.update_bias(biases[0], own), mf.update_bias(biases[1], own.to(torch.int32), 0.5, None)]


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_the_bias_of_an_expert_below_the_mean_load_of_the_group_rises_and_above_it_falls(ranks: int) -> None:
    for tokens in TOKENS[ranks]:
        load = Counter(routing(sum(tokens)).flatten().tolist())
        loads = [load[e] for e in range(NUM_EXPERTS)]
        mean = sum(loads) / NUM_EXPERTS
        signs = [(mean > n) - (mean < n) for n in loads]
        for single, double in run_ranks(next_bias_here, ranks, tokens):
            before = normal(NUM_EXPERTS, seed=2)
            torch.testing.assert_close(single, (before + 1e-3 * torch.tensor(signs, dtype=torch.float64)).float(), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(double, before + 0.5 * torch.tensor(signs, dtype=torch.float64))


def test_the_bias_stays_at_the_mean_load_exactly_and_has_no_gradient() -> None:
    bias = torch.zeros(3, requires_grad=True)
    after = mf.update_bias(bias, torch.tensor([[0, 1], [1, 0], [2, 2], [-1, -1]]))
    assert after.tolist() == [0, 0, 0]
    assert not after.requires_grad
    assert bias.tolist() == [0, 0, 0]


def test_the_bias_balances_a_skewed_router() -> None:
    """What the update is for: experts that all tokens prefer lose them to the others."""
    logits = normal(512, 8, dtype=torch.float32) + torch.linspace(1, -1, 8)
    bias = torch.zeros(8)

    def heaviest() -> float:
        load = mf.route(logits, 2, score="sigmoid", bias=bias)[1].flatten().bincount(minlength=8)
        return load.max().item() / load.float().mean().item()

    before = heaviest()
    for _ in range(60):
        bias = mf.update_bias(bias, mf.route(logits, 2, score="sigmoid", bias=bias)[1], 0.01)
    assert before > 1.8
    assert heaviest() < 1.15


def with_loss(x: Tensor, w: Tensor) -> Tensor:
    """A layer of which ``z_loss`` is attached to what it gives."""
    logits = x @ w
    return mf.attach_loss(logits.tanh(), mf.z_loss(logits), 0.25).sin()


@pytest.mark.parametrize("compiled", [False, True])
def test_an_attached_loss_is_differentiated_as_if_added_whatever_the_gradient_of_what_it_is_attached_to(compiled: bool) -> None:
    x, w, grad = normal(6, 4), normal(4, 5, seed=1), normal(6, 5, seed=2)
    ours, theirs = (([t.clone().requires_grad_() for t in (x, w)]) for _ in range(2))
    layer = torch.compile(with_loss, fullgraph=True, backend="aot_eager") if compiled else with_loss
    y = layer(*ours)
    torch.testing.assert_close(y, (x @ w).tanh().sin(), rtol=0, atol=0)
    y.backward(grad)
    logits = theirs[0] @ theirs[1]
    ((logits.tanh().sin() * grad).sum() + 0.25 * mf.z_loss(logits)).backward()
    torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


def test_an_attached_loss_gets_its_gradient_once_a_backward_pass_in_its_own_dtype() -> None:
    x, loss = torch.ones(3, dtype=torch.bfloat16, requires_grad=True), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = mf.attach_loss(mf.attach_loss(x, loss, 0.1), loss, -0.3)
    assert torch.equal(y, x)
    (0 * y.sum() + x.sum()).backward(retain_graph=True)
    torch.testing.assert_close(loss.grad, torch.tensor(0.1 - 0.3, dtype=torch.float64))
    assert torch.equal(x.grad, torch.ones_like(x))
    x.sum().backward()  # does not pass through y
    torch.testing.assert_close(loss.grad, torch.tensor(0.1 - 0.3, dtype=torch.float64))


def traffic_here() -> list[tuple[list[str], list[str]]]:
    tokens = 4 * dist.get_rank()
    experts, probabilities = routing(tokens), normal(tokens, NUM_EXPERTS).requires_grad_()
    calls = []
    with Traffic() as forward:
        loss = mf.load_balance_loss(probabilities, experts)
    with Traffic() as backward:
        loss.backward()
    with Traffic() as update:
        mf.update_bias(torch.zeros(NUM_EXPERTS), experts)
    with Traffic() as z:
        mf.z_loss(probabilities).backward()
    for traffic in (forward, backward, update, z):
        calls.append((traffic.collectives, traffic.reads))
    return calls


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_costs_one_small_exchange_or_none_and_no_read_of_the_host(ranks: int) -> None:
    sends = [["all_gather_into_tensor"], ["all_to_all_single"], ["all_reduce"], []] if ranks > 1 else [[]] * 4
    for calls in run_ranks(traffic_here, ranks):
        assert calls == [(collectives, []) for collectives in sends]


def balanced(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """All that is between the logits and the plan, and the losses."""
    weights, experts = mf.route(logits, K, bias=bias)
    kept = mf.limit_by_capacity(experts, NUM_EXPERTS, 3)
    balance = mf.load_balance_loss(logits, experts, score="softmax") + mf.load_balance_loss(logits, kept, score="sigmoid")
    return weights, balance, mf.z_loss(logits) + mf.z_loss(logits, kept, None), kept, mf.update_bias(bias, experts)


def compiled_here(backend: str) -> list[str]:
    """Compares the compiled graph with eager mode for several T, and gives the graphs that were compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(balanced, fullgraph=True, backend=counter)
    bias = 0.1 * normal(NUM_EXPERTS, seed=1, dtype=torch.float32)
    for seed, tokens in enumerate(((5, 9, 0, 1), (0, 3, 1, 2), (0, 0, 0, 0), (1, 1, 20, 7))):
        rank = dist.get_rank()
        logits = normal(tokens[rank], NUM_EXPERTS, seed=4 * seed + rank, dtype=torch.float32)
        logits[1:3], logits[4:6, 2:] = -INF, -INF
        logits.requires_grad_()
        torch._dynamo.decorators.mark_unbacked(logits, 0)
        results = [function(logits, bias) for function in (compiled, compiled, balanced)]
        grads = [torch.autograd.grad(each[0][:, 0].sum() + each[1] + each[2], logits)[0] for each in results]
        for got, again, want in zip(*results, strict=True):
            assert torch.equal(got, again)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert torch.equal(grads[0], grads[1])
        assert grads[0].isfinite().all()
        torch.testing.assert_close(grads[0], grads[2], rtol=1e-5, atol=1e-7)
    return [graph.code for graph in counter.graphs]


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/test_functions.py compiles them in every run
@pytest.mark.parametrize(("ranks", "backend"), [(2, "aot_eager"), (1, "inductor"), (2, "inductor")])
def test_compiled_they_give_what_they_give_in_eager_mode_in_one_graph_for_all_ranks_and_numbers_of_tokens(ranks: int, backend: str) -> None:
    graphs = run_ranks(compiled_here, ranks, backend, timeout=300)
    assert all(of_rank == graphs[0] for of_rank in graphs)
    assert len(graphs[0]) == 1


IDS = torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mf.load_balance_loss([0.5], IDS), TypeError, r"probabilities was list; it must be a tensor \[T, E\]"),
        (lambda: mf.load_balance_loss(torch.zeros(4), IDS), ValueError, r"probabilities was of shape \[4\]; it must be of shape \[T, E\]"),
        (lambda: mf.load_balance_loss(torch.zeros(4, 5).int(), IDS), TypeError, "probabilities was of dtype torch.int32"),
        (lambda: mf.load_balance_loss(torch.zeros(4, 5), IDS.float()), TypeError, "experts was of dtype torch.float32"),
        (lambda: mf.load_balance_loss(torch.zeros(4, 5), IDS[0]), ValueError, r"experts was of shape \[2\]; it must be of shape \[T, K\]"),
        (lambda: mf.load_balance_loss(torch.zeros(3, 5), IDS), ValueError, r"experts was of shape \[4, 2\]; .* T = 3 tokens"),
        (lambda: mf.load_balance_loss(torch.zeros(4, 5, device="meta"), IDS), ValueError, "experts was on cpu; it must be on prob.* meta"),
        (lambda: mf.load_balance_loss(torch.zeros(4, 5), IDS, 3), TypeError, "group was int"),
        (lambda: mf.z_loss(1.0), TypeError, r"logits was float; it must be a tensor \[T, E\]"),
        (lambda: mf.z_loss(torch.zeros(4)), ValueError, r"logits was of shape \[4\]; it must be of shape \[T, E\]"),
        (lambda: mf.z_loss(IDS), TypeError, "logits was of dtype torch.int64; it must be of a floating dtype"),
        (lambda: mf.update_bias(0.0, IDS), TypeError, r"bias was float; it must be a tensor \[E\]"),
        (lambda: mf.update_bias(torch.zeros(1, 5), IDS), ValueError, r"bias was of shape \[1, 5\]; it must be of shape \[E\]"),
        (lambda: mf.update_bias(torch.zeros(5).int(), IDS), TypeError, "bias was of dtype torch.int32"),
        (lambda: mf.update_bias(torch.zeros(5), IDS.float()), TypeError, "experts was of dtype torch.float32"),
        (lambda: mf.update_bias(torch.zeros(5, device="meta"), IDS), ValueError, "experts was on cpu; it must be on bias' device, meta"),
        (lambda: mf.update_bias(torch.zeros(5), IDS, "fast"), TypeError, "speed was str; it must be a number"),
        (lambda: mf.update_bias(torch.zeros(5), IDS, 0.1, 3), TypeError, "group was int"),
        (lambda: mf.attach_loss([0.5], torch.zeros(())), TypeError, "x was list; it must be a tensor of any shape"),
        (lambda: mf.attach_loss(IDS, torch.zeros(())), TypeError, "x was of dtype torch.int64; it must be of a floating dtype"),
        (lambda: mf.attach_loss(torch.zeros(4), 0.5), TypeError, r"loss was float; it must be a tensor \[\]"),
        (lambda: mf.attach_loss(torch.zeros(4), torch.zeros(1)), ValueError, r"loss was of shape \[1\]; it must be of shape \[\]"),
        (lambda: mf.attach_loss(torch.zeros(4), torch.zeros(()).int()), TypeError, "loss was of dtype torch.int32"),
        (lambda: mf.attach_loss(torch.zeros(4), torch.zeros(()), True), TypeError, "scale was bool; it must be a number"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
