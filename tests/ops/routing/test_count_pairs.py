"""count: which ranks a token goes to, how many pairs and slots each rank gets, and the range of the ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.base.signature import NOT_FINITE
from moecomm.ops.routing.count_pairs import count, count_cpu, count_fake, count_triton, keys_cpu, keys_fake, keys_triton, rank_keys
from tests.ops.cases import assert_same_layout, guarded, routing, strided

SIGNATURE = [2, 8, -1, 5]


def expected(experts: Tensor, num_experts: int, ranks: int, placed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(keys, message) by loops."""
    keys = torch.full(experts.shape, -1, dtype=torch.int32)
    pairs, slots = [0] * ranks, [0] * ranks
    ids = experts.tolist()
    for t, row in enumerate(ids):
        seen = set()
        for j, expert in enumerate(row):
            if not 0 <= expert < num_experts:
                continue
            rank = expert // (num_experts // ranks) if placed is None else int(placed[t, j])
            slots[rank] += 1
            if rank not in seen:
                seen.add(rank)
                pairs[rank] += 1
                keys[t, j] = rank
    flat = [expert for row in ids for expert in row] or [-1]
    message = [[pairs[p], slots[p], min(flat), max(flat), experts.shape[0], 0, *SIGNATURE] for p in range(ranks)]
    return keys, torch.tensor(message)


def check(experts: Tensor, num_experts: int, ranks: int, device: str, placed: Tensor | None = None) -> None:
    want = expected(experts, num_experts, ranks, placed)
    args = num_experts, ranks, SIGNATURE
    there = placed if placed is None else placed.to(device)
    for got in (count_cpu(experts, *args, placed), guarded(count_triton, experts.to(device), *args, there)):
        torch.testing.assert_close([tensor.cpu() for tensor in got], list(want), rtol=0, atol=0)
        assert_same_layout(count_fake(experts, *args), got)
    for keys in (keys_cpu(experts, num_experts, ranks, placed), guarded(keys_triton, experts.to(device), num_experts, ranks, there)):
        assert torch.equal(keys.cpu(), want[0])
        assert_same_layout(keys_fake(experts, num_experts, ranks), keys)


@pytest.mark.parametrize(
    ("tokens", "k", "num_experts", "ranks"),
    [
        (5, 2, 8, 4),
        (33, 3, 6, 2),
        (64, 8, 16, 4),
        (70, 1, 4, 4),
        (7, 2, 1, 1),
        (7, 5, 3, 1),
        (1, 1, 1, 1),
        (0, 2, 4, 2),
        pytest.param(20, 300, 512, 4, marks=pytest.mark.slow),
    ],  # fmt: skip
)
def test_count_agrees_with_a_loop(tokens: int, k: int, num_experts: int, ranks: int, device: str) -> None:
    check(routing(tokens, k, num_experts, seed=tokens), num_experts, ranks, device)


@pytest.mark.parametrize(
    "dtype", [torch.int64, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8))]
)
def test_count_takes_any_integer_dtype_and_any_strides(dtype: torch.dtype, device: str) -> None:
    experts = routing(37, 3, 8, seed=1, dropped=0.0 if dtype == torch.uint8 else 0.3).to(dtype)
    for layout in strided(experts):
        check(layout, 8, 4, device)
    for layout in strided(experts[:, :1]):
        check(layout, 8, 4, device)


def test_more_experts_than_the_dtype_of_ids_can_name_are_no_problem(device: str) -> None:
    check(routing(20, 2, 100, seed=2).to(torch.int8), 300, 3, device)


@pytest.mark.parametrize("wrong", [-2, 8, -(2**31), 2**31, 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)])
def test_ids_out_of_range_are_reported_and_not_followed(wrong: int, device: str) -> None:
    """Also where they would be in range once cast to int32."""
    experts = routing(9, 2, 8, seed=3)
    experts[4, 1] = wrong
    check(experts, 8, 2, device)
    _, message = count(experts, 8, 2, SIGNATURE)
    assert wrong in (int(message[0, 2]), int(message[1, 3]))


def test_a_token_goes_once_to_a_rank_however_many_of_its_experts_are_there() -> None:
    keys, message = count(torch.tensor([[0, 1, 0, 1], [3, 3, -1, 0]]), 4, 2, [])
    assert keys.tolist() == [[0, -1, -1, -1], [1, -1, -1, 0]]
    assert message[:, :2].tolist() == [[2, 5], [1, 2]]


@pytest.mark.parametrize(("tokens", "k", "num_experts", "ranks"), [(33, 3, 5, 4), (70, 1, 2, 4), (40, 8, 12, 3), (0, 2, 3, 2)])
def test_slots_may_be_placed_on_any_rank(tokens: int, k: int, num_experts: int, ranks: int, device: str) -> None:
    """Ids out of range are reported all the same."""
    experts = routing(tokens, k, num_experts, seed=tokens)
    placed = torch.where(experts < 0, -1, (experts * 5 + torch.arange(tokens).unsqueeze(1)) % ranks).to(torch.int32)
    check(experts, num_experts, ranks, device, placed)
    check(experts, num_experts, ranks, device, placed.t().contiguous().t())
    if tokens:
        experts[3, 0], placed[3, 0] = num_experts, -1
        check(experts, num_experts, ranks, device, placed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_counted(dtype: torch.dtype, device: str) -> None:
    experts, weights = routing(40, 3, 8, seed=1), torch.rand(40, 3).to(dtype)
    weights[3, 1], weights[39, 2], weights[0, 0] = float("nan"), float("inf"), -float("inf")
    for wrong, factors in ((3, weights), (0, torch.zeros(40, 3, dtype=dtype))):
        for implementation in (count_cpu, count_triton):
            on = device if implementation is count_triton else "cpu"
            _, message = implementation(experts.to(on), 8, 4, SIGNATURE, None, factors.to(on))
            assert message[:, NOT_FINITE].tolist() == [wrong] * 4


@pytest.mark.slow
def test_count_passes_opcheck(device: str) -> None:
    for tokens, k in ((5, 2), (4, 1), (0, 2), (1, 1)):
        experts = routing(tokens, k, 4, seed=tokens).to(device)
        opcheck(count, (experts, 4, 2, SIGNATURE))
        opcheck(count, (experts, 4, 2, SIGNATURE, torch.zeros(tokens, k, dtype=torch.int32, device=device)))
        opcheck(rank_keys, (experts, 4, 2))
