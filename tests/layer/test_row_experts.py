"""row_experts: the expert that each row was sent to, as the experts' ids and the order of the rows say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from tests.spawn import run_ranks

E, K, D = 6, 3, 4
MODES: list[dict[str, Any]] = [{}, {"max_rows": 7}, {"align": 4}, {"max_rows": 40, "align": 8}]


def routed(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, E, generator=generator).argsort(1)[:, :K]
    return experts.masked_fill(torch.rand(tokens, K, generator=generator) < 0.3, -1)


def expected(experts: Tensor, plan: mf.Plan) -> list[int]:
    """Each row carries its token's list of ids; its slot says which of them it was sent for."""
    ids = mf.dispatch(experts.to(torch.float64), plan)  # [N, K]
    local, rank = E // dist.get_world_size(), dist.get_rank()
    found = []
    for row, slot in zip(ids.tolist(), plan.row_order.tolist(), strict=True):
        found.append(int(row[slot % K]) - local * rank if slot >= 0 else -1)
    return found


def check_here(tokens: list[int], mode: dict[str, Any]) -> None:
    for seed in range(3):
        experts = routed(tokens[(dist.get_rank() + seed) % len(tokens)], 10 * seed + dist.get_rank())
        plan = mf.plan(experts, torch.ones(experts.shape), E, **mode)
        got = mf.row_experts(plan)
        assert got.dtype == torch.int32
        assert got.tolist() == expected(experts, plan)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_row_has_the_expert_that_its_slot_names(ranks: int, mode: dict[str, Any]) -> None:
    run_ranks(check_here, ranks, [9, 0], mode)


def test_a_lookup_by_row_stays_within_the_parameters_where_rows_are_padding() -> None:
    experts = routed(9, 0)
    plan = mf.plan(experts, torch.ones(9, K), E, "", max_rows=40)
    bias = torch.randn(E, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = mf.combine(mf.dispatch(torch.zeros(9, D), plan) + bias[mf.row_experts(plan)], plan)
    chosen = torch.nn.functional.one_hot(experts + 1, E + 1)[..., 1:].sum(1).float()  # [T, E]
    torch.testing.assert_close(y, chosen @ bias)
    torch.testing.assert_close(*torch.autograd.grad(y.sum(), bias), chosen.sum(0).unsqueeze(1).expand(E, D))


def test_what_is_no_plan_is_named() -> None:
    with pytest.raises(TypeError, match="plan was list"):
        mf.row_experts([1])  # type: ignore[arg-type]
