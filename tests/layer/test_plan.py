"""What stands in a plan: the experts' rows, the maps there and back, and the weights that travelled."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import moecomm.functional as mf
from tests import reference
from tests.spawn import FOUR, run_ranks

TOKENS = {1: (9,), 2: (0, 8), 4: (5, 0, 11, 1)}


class Case(NamedTuple):
    k: int
    num_experts: int
    dtype: torch.dtype  # of the experts' ids
    lowest: int = -1  # id
    transposed: bool = False  # a plan may be made of what is not contiguous


CASES = [
    Case(1, 4, torch.int64),
    Case(2, 8, torch.int32),
    Case(8, 8, torch.int64, transposed=True),
    Case(7, 4, torch.int64),  # more slots than experts
    Case(8, 64, torch.int16),
    Case(4, 64, torch.int8),
    Case(2, 200, torch.uint8, lowest=0),
    Case(3, 40_000, torch.int64),  # local ids that take two bytes
    Case(2, 140_000, torch.int32),  # and four
]


def routing(tokens: int, case: Case) -> tuple[Tensor, Tensor]:
    seed = torch.Generator().manual_seed(case.k * case.num_experts)
    shape = (case.k, tokens) if case.transposed else (tokens, case.k)
    experts = torch.randint(case.lowest, case.num_experts, shape, generator=seed).to(case.dtype)
    weights = torch.rand(shape, generator=seed)
    return (experts.t(), weights.t()) if case.transposed else (experts, weights)


def plans_here(tokens: tuple[int, ...], cases: list[Case]) -> list[mf.Plan]:
    own = slice(sum(tokens[: dist.get_rank()]), sum(tokens[: dist.get_rank() + 1]))
    return [mf.plan(*(part[own] for part in routing(sum(tokens), case)), case.num_experts) for case in cases]


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_a_plan_holds_each_experts_rows_in_token_order_and_both_maps(ranks: int) -> None:
    tokens = TOKENS[ranks]
    for rank, plans in enumerate(run_ranks(plans_here, ranks, tokens, CASES)):
        for case, plan in zip(CASES, plans, strict=True):
            experts, weights = routing(sum(tokens), case)
            local = case.num_experts // ranks
            first, last = rank * local, (rank + 1) * local
            counts = torch.bincount(experts.flatten().long() + 1, minlength=case.num_experts + 1)[1:]
            assert plan.offsets.dtype == torch.int32
            assert plan.offsets.tolist() == counts[first:last].cumsum(0).tolist()

            # Each row is one slot of one received pair, and that pair's token and slot are the expected ones.
            pairs = [t for t, ids in enumerate(experts.tolist()) if ranks == 1 or any(first <= e < last for e in ids)]
            order = plan.row_order.tolist()
            assert [(pairs[i // case.k], i % case.k) for i in order] == reference.rows(experts, first, last)
            assert plan.weights.tolist() == weights[pairs].tolist()
            position = torch.full((len(pairs) * case.k,), -1)
            position[order] = torch.arange(len(order))
            assert plan.row_position.flatten().tolist() == position.tolist()
            assert (plan.tokens, plan.num_experts) == (tokens[rank], case.num_experts)


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_a_plan_sends_a_token_once_to_each_rank_of_its_experts(ranks: int) -> None:
    tokens = TOKENS[ranks]
    for rank, plans in enumerate(run_ranks(plans_here, ranks, tokens, CASES)):
        for case, plan in zip(CASES, plans, strict=True):
            local = case.num_experts // ranks
            of_rank = [part.contiguous() for part in routing(sum(tokens), case)[0].split(tokens)]
            out = [reference.pairs(of_rank[rank], p * local, (p + 1) * local) for p in range(ranks)]
            into = [reference.pairs(of, rank * local, (rank + 1) * local) for of in of_rank]
            assert plan.splits is not None
            assert plan.splits.tolist() == [out, into]
            assert plan.splits.device.type == "cpu"

            assert plan.send_order is not None
            assert plan.send_position is not None
            sent = [i // case.k for i in plan.send_order.tolist()]
            own = of_rank[rank].tolist()
            assert sent == [t for p in range(ranks) for t, ids in enumerate(own) if any(e >= 0 and e // local == p for e in ids)]
            assert plan.send_position.flatten()[plan.send_order.long()].tolist() == list(range(len(sent)))
            assert int((plan.send_position >= 0).sum()) == len(sent)


def test_a_plan_is_a_pytree_of_tensors_and_ints_and_a_name() -> None:
    plan = mf.plan(torch.tensor([[0, 1], [1, -1]]), torch.rand(2, 2), 2)
    leaves, spec = tree_flatten(plan)
    assert all(leaf is None or isinstance(leaf, Tensor | int | str) for leaf in leaves)
    again = tree_unflatten(leaves, spec)
    assert isinstance(again, mf.Plan)
    assert torch.equal(mf.dispatch(torch.arange(2), again), torch.tensor([0, 0, 1]))


def test_a_plan_serves_many_calls() -> None:
    plan = mf.plan(torch.tensor([[1], [0]]), torch.tensor([[2.0], [3.0]]), 2)
    for x in (torch.rand(2, 3), torch.rand(2, 5, 2), torch.rand(2, dtype=torch.float64)):
        want = x * torch.tensor([2.0, 3.0]).view(2, *[1] * (x.dim() - 1)).to(x.dtype)
        torch.testing.assert_close(mf.combine(mf.dispatch(x, plan), plan), want)


def weights_gradient_here() -> Tensor:
    """The gradient of sum over slots of weights[t, j] * its own coefficient, through the plan's weights alone."""
    rank = dist.get_rank()
    tokens = TOKENS[4]
    own = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    experts, weights = (part[own] for part in routing(sum(tokens), CASES[1]))
    weights = weights.double().requires_grad_()
    plan = mf.plan(experts, weights, CASES[1].num_experts)
    rows = torch.full((plan.row_order.shape[0],), 0.5, dtype=torch.float64)
    [gradient] = torch.autograd.grad(mf.combine(rows, plan).sum(), weights)
    return gradient


def test_a_dropped_slots_weight_has_no_gradient_and_a_kept_ones_comes_home() -> None:
    experts, _ = routing(sum(TOKENS[4]), CASES[1])
    assert torch.equal(torch.cat(run_ranks(weights_gradient_here, 4)), (experts >= 0) * 0.5)
