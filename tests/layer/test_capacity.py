"""limit_by_capacity: who comes first is served first, counted over the whole group, against one loop over all slots."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

TOKENS = {1: [(17,), (0,)], 2: [(9, 4), (0, 17), (6, 0)], 4: [(5, 0, 11, 1), (0, 0, 3, 0), (0, 0, 0, 0)]}
SIZES = [(1, 4), (2, 5), (3, 1), (8, 64)]  # K, E
CAPACITIES = [0, 1, 3, 10, sys.maxsize]


def routing(tokens: int, k: int, num_experts: int) -> Tensor:
    """[T, K] ids of which some are -1 and some are out of range, and a few experts have most."""
    seed = torch.Generator().manual_seed(tokens + k)
    experts = (num_experts * torch.rand(tokens, k, generator=seed) ** 2).long()
    for wrong in (-1, -1, -1, -7, num_experts, 2**40):
        experts = experts.masked_fill(torch.rand(tokens, k, generator=seed) < 0.05, wrong)
    return experts


def limited(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """By a loop over all slots of the group in their order."""
    served: Counter[int] = Counter()
    kept = experts.clone()
    for t, ids in enumerate(experts.tolist()):
        for j, expert in enumerate(ids):
            if 0 <= expert < num_experts:
                served[expert] += 1
                if served[expert] > capacity:
                    kept[t, j] = -1
    return kept


def limited_here(tokens: tuple[int, ...], k: int, num_experts: int, capacity: int) -> Tensor:
    rank = dist.get_rank()
    own = routing(sum(tokens), k, num_experts).split(tokens)[rank]
    before = own.clone()
    kept = mf.limit_by_capacity(own, num_experts, capacity)
    assert torch.equal(own, before)
    return kept


def all_limited_here(cases: list[Any]) -> list[Tensor]:
    return [limited_here(*case) for case in cases]


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_slots_over_capacity_are_dropped_in_the_order_of_ranks_tokens_and_slots(ranks: int) -> None:
    cases = [(tokens, k, e, capacity) for tokens in TOKENS[ranks] for k, e in SIZES for capacity in CAPACITIES]
    dropped = 0
    for case, parts in zip(cases, zip(*run_ranks(all_limited_here, ranks, cases), strict=True), strict=True):
        tokens, k, num_experts, capacity = case
        experts = routing(sum(tokens), k, num_experts)
        want = limited(experts, num_experts, capacity)
        dropped += int((want != experts).sum())
        assert torch.equal(torch.cat(parts), want), case
    assert dropped


def test_the_order_of_service_by_hand() -> None:
    experts = torch.tensor([[0, 0], [-1, 0], [1, 0]])
    assert mf.limit_by_capacity(experts, 2, 2).tolist() == [[0, 0], [-1, -1], [1, -1]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_any_signed_integer_dtype_is_kept_and_strides_do_not_matter(dtype: torch.dtype) -> None:
    """Also where E is more than the dtype of the ids can name."""
    experts = routing(30, 3, 8).clamp(max=100)
    want = limited(experts, 300, 4).to(dtype)
    for given in (experts.to(dtype), experts.to(dtype).t().contiguous().t()):
        kept = mf.limit_by_capacity(given, 300, 4)
        assert kept.dtype == dtype
        assert torch.equal(kept, want)


def test_a_plan_of_limited_experts_gives_none_more_rows_than_its_capacity() -> None:
    experts = torch.randint(0, 4, (50, 2), generator=torch.Generator().manual_seed(1))
    offsets = mf.plan(mf.limit_by_capacity(experts, 4, 24), torch.ones(50, 2), 4).offsets
    wanted = experts.flatten().bincount()
    assert wanted.min() < 24 < wanted.max()
    assert torch.equal(offsets.long(), wanted.clamp(max=24).cumsum(0))


def traffic_here() -> tuple[list[str], list[str]]:
    experts = routing(6 * dist.get_rank(), 2, 5)
    with Traffic() as traffic:
        mf.limit_by_capacity(experts, 5, 3)
    return traffic.collectives, traffic.reads


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_costs_one_collective_and_no_read_of_the_host(ranks: int) -> None:
    for collectives, reads in run_ranks(traffic_here, ranks):
        assert collectives == ["all_gather_into_tensor"] * (ranks > 1)
        assert reads == []


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"experts": [[0]]}, TypeError, r"experts was list; it must be a tensor \[T, K\]"),
        ({"experts": torch.zeros(4, dtype=torch.int64)}, ValueError, r"experts was of shape \[4\]; it must be of shape \[T, K\]"),
        (
            {"experts": torch.zeros(4, 2)},
            TypeError,
            "experts was of dtype torch.float32; it must be of dtype int8, int16, int32, int64 or uint8",
        ),
        ({"experts": torch.zeros(4, 2, dtype=torch.bool)}, TypeError, "experts was of dtype torch.bool"),
        ({"experts": torch.zeros(4, 2, dtype=torch.uint8)}, TypeError, "experts was of dtype torch.uint8; it must be of a signed integer"),
        ({"num_experts": 0}, ValueError, "num_experts was 0; it must be 1 or more"),
        ({"num_experts": 4.0}, TypeError, "num_experts was float; it must be an int"),
        ({"capacity": -1}, ValueError, "capacity was -1; it must be 0 or more"),
        ({"capacity": 1.5}, TypeError, "capacity was float; it must be an int"),
        ({"capacity": True}, TypeError, "capacity was bool; it must be an int"),
        ({"group": 3}, TypeError, "group was int"),
    ],
)
def test_a_wrong_argument_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mf.limit_by_capacity(**{"experts": torch.zeros(4, 2, dtype=torch.int64), "num_experts": 4, "capacity": 2, **changed})


def test_more_slots_than_int32_indices_number_are_refused() -> None:
    experts = torch.zeros(1, 1, dtype=torch.int8).expand(2**30, 2)  # of one byte
    with pytest.raises(ValueError, match=r"experts was of shape \[1073741824, 2\]; it must be of at most 2147483392 slots"):
        mf.limit_by_capacity(experts, 4, 1)
