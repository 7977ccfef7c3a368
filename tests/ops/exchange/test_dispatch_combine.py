"""The ops dispatch and combine: tokens to their experts' ranks and back, in one op each, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

import moecomm.functional as mf
from moecomm.ops.exchange.dispatch_combine import combine, dispatch
from tests.ops.cases import COMPOSED, assert_within_rounding, check_gradients_across_ranks, gradient_of, routing, seeded
from tests.spawn import FOUR, run_ranks

TOKENS = {2: ((4, 3), (0, 3), (0, 0)), 4: ((2, 0, 3, 1),)}
NUM_EXPERTS, K = 4, 2


def held(rank: int, tokens: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, experts, weights) of a rank, in float64."""
    generator = seeded(rank)
    x = torch.randn(tokens, d, dtype=torch.float64, generator=generator)
    return x, routing(tokens, K, NUM_EXPERTS, seed=rank), torch.rand(tokens, K, dtype=torch.float64, generator=generator)


def indices(plan: mf.Plan) -> tuple[object, ...]:
    return plan.send_order, plan.send_position, plan.row_order, plan.row_position, plan.splits, plan.group


def both_ways(tokens: tuple[int, ...], d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """(rows, y, whether a second call, and one in static mode with room for all, gave the same bits)."""
    x, experts, weights = held(dist.get_rank(), tokens[dist.get_rank()], d)
    plan = mf.plan(experts, weights.float(), NUM_EXPERTS)
    rows = dispatch(x.to(dtype), *indices(plan))
    y = combine(rows, plan.weights, *indices(plan))
    again = combine(rows, plan.weights, *indices(plan))
    same = torch.equal(y, again)
    if plan.offsets.shape[0] >= K:  # a token may name an expert twice: a rank of fewer experts has not room for both
        static = mf.plan(experts, weights.float(), NUM_EXPERTS, max_rows=max(1, *tokens))
        padded = dispatch(x.to(dtype), *indices(static))
        same &= torch.equal(padded[: rows.shape[0]], rows) and torch.equal(combine(padded, static.weights, *indices(static)), y)
    return rows, y, same


@pytest.mark.parametrize("ranks", [2, FOUR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_reach_their_experts_and_come_back_weighted(ranks: int, dtype: torch.dtype) -> None:
    local = NUM_EXPERTS // ranks
    for tokens in TOKENS[ranks]:
        for d in (3, 0):
            parts = [held(rank, tokens[rank], d) for rank in range(ranks)]
            for rank, (rows, y, same) in enumerate(run_ranks(both_ways, ranks, tokens, d, dtype)):
                want = [
                    x[t].to(dtype)
                    for expert in range(rank * local, (rank + 1) * local)
                    for x, experts, _ in parts
                    for t, slots in enumerate(experts.tolist())
                    for slot in slots
                    if slot == expert
                ]
                assert torch.equal(rows, torch.stack(want) if want else torch.zeros(0, d, dtype=dtype))
                x, experts, weights = parts[rank]
                total = (weights.float().double() * (experts >= 0)).sum(1, keepdim=True)
                once = x.to(dtype).double() * total
                # One rounding of each rank's sum, beside the last: the terms are of one sign, so that these add up to once.
                assert_within_rounding(y, once, once.abs(), torch.finfo(dtype).eps)
                assert same


def gradients(tokens: tuple[int, ...], d: int, max_rows: int | None = None) -> None:
    x, experts, weights = held(dist.get_rank(), tokens[dist.get_rank()], d)
    plan = mf.plan(experts, weights, NUM_EXPERTS, max_rows=max_rows)
    rest = indices(plan)
    rows = torch.randn(plan.row_order.shape[0], d, dtype=torch.float64, generator=seeded(dist.get_rank() + 50))
    weighted = {
        "dispatch": (lambda x: dispatch(x, *rest), (x,)),
        "combine": (lambda rows, weights: combine(rows, weights, *rest), (rows, plan.weights)),
        "unweighted": (lambda rows: combine(rows, None, *rest), (rows,)),
    }
    for seed, (function, inputs) in enumerate(weighted.values()):
        check_gradients_across_ranks(function, *inputs, seed=seed)
        check_gradients_across_ranks(gradient_of(function), *inputs, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_first_and_second_derivatives_across_ranks(ranks: int) -> None:
    for tokens in TOKENS[ranks]:
        run_ranks(gradients, ranks, tokens, 2)
    run_ranks(gradients, ranks, TOKENS[ranks][0], 2, 2)  # with padding, and dropped slots


def opcheck_both(tokens: tuple[int, ...], d: int, max_rows: int | None = None) -> None:
    x, experts, weights = held(dist.get_rank(), tokens[dist.get_rank()], d)
    plan = mf.plan(experts, weights, NUM_EXPERTS, max_rows=max_rows)
    rows = torch.randn(plan.row_order.shape[0], d, dtype=torch.float64).requires_grad_()
    opcheck(dispatch, (x.requires_grad_(), *indices(plan)), test_utils=COMPOSED)
    opcheck(combine, (rows, plan.weights.detach().requires_grad_(), *indices(plan)), test_utils=COMPOSED)


@pytest.mark.slow
def test_both_pass_opcheck_on_two_ranks() -> None:
    for tokens, d, max_rows in (((4, 3), 3, None), ((0, 3), 1, None), ((2, 2), 0, None), ((0, 3), 2, 2)):
        run_ranks(opcheck_both, 2, tokens, d, max_rows)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_both_pass_opcheck_on_four_ranks() -> None:
    for tokens, d in (((2, 0, 3, 1), 3), ((0, 0, 0, 0), 2)):
        run_ranks(opcheck_both, 4, tokens, d)
