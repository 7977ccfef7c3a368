"""few_slots: the slots of all pairs, where they fit beside the counts; and what is taken from the messages that came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import pad

from moecomm.ops.base.signature import LENGTH, PAIRS, ROOM, WIDTH
from moecomm.ops.routing.count_pairs import count
from moecomm.ops.routing.slot_bytes import unpack_cpu
from moecomm.ops.routing.slots_with_counts import few_cpu, few_fake, few_slots, few_triton, most_pairs, take_cpu, take_triton
from tests.ops.cases import assert_same_layout, guarded, routing, seeded, sorted_slots, strided

RANKS = 3
ROUTINGS: list[Any] = [(5, 2, 3), (0, 2, 3)]  # T, K, L
ROUTINGS += [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((33, 1, 2), (70, 3, 129), (9, 8, 2**15 + 1), (40, 5, 1))]


def chosen(tokens: int, k: int, local: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(experts, weights, keys)."""
    experts = routing(tokens, k, RANKS * local, seed=tokens + seed)
    weights = torch.rand(tokens, k, dtype=torch.float64, generator=seeded(k + seed)).to(dtype)
    return experts, weights, count(experts, RANKS * local, RANKS, [])[0]


def by_rank(keys: Tensor, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(keys, order, ends), as a plan has them before it knows how many pairs there are."""
    order, _, ends = sorted_slots(keys, RANKS)
    return keys.to(device), pad(order, (0, keys.numel() - order.shape[0]), value=-1).to(device), ends.to(device)


def slots_for(rank: int, experts: Tensor, weights: Tensor, local: int) -> tuple[list[list[int]], list[list[float]]]:
    """(ids, weights) of the pairs for a rank, by a loop over the tokens."""
    ids = [[expert - rank * local if expert // local == rank else -1 for expert in slots] for slots in experts.tolist()]
    here = [t for t, slots in enumerate(ids) if max(slots) >= 0]
    return [ids[t] for t in here], [weights[t].tolist() for t in here]


def unpacked(room: Tensor, pairs: int, k: int, local: int, dtype: torch.dtype) -> tuple[list[list[int]], list[list[float]]]:
    width = k * (dtype.itemsize + (1 if local <= 2**7 else 2 if local <= 2**15 else 4))
    ids, weights = unpack_cpu(room[: pairs * width].reshape(pairs, width), k, local, dtype)
    assert not room[pairs * width :].any()
    return ids.tolist(), weights.tolist()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize(("tokens", "k", "local"), ROUTINGS)
def test_each_rank_is_sent_the_slots_of_its_pairs(tokens: int, k: int, local: int, dtype: torch.dtype, device: str) -> None:
    experts, weights, keys = chosen(tokens, k, local, dtype)
    for ids, factors in zip(strided(experts), strided(weights), strict=True):
        few = few_cpu(ids, factors, *by_rank(keys), local)
        assert few[:, 0].tolist() == [1] * RANKS
        for rank in range(RANKS):
            want = slots_for(rank, experts, weights, local)
            assert unpacked(few[rank, 1:].view(torch.uint8), len(want[0]), k, local, dtype) == want
        again = guarded(few_triton, ids.to(device), factors.to(device), *by_rank(keys, device), local)
        assert torch.equal(again.cpu(), few)
        assert_same_layout(few_fake(ids, factors, *by_rank(keys), local), again)


@pytest.mark.slow
def test_as_many_pairs_fit_as_the_room_holds_and_not_one_more(device: str) -> None:
    k, local, dtype = 2, 3, torch.float32
    most = most_pairs(k * (4 + 1))
    assert most == (8 * ROOM - 8) // (2 * (4 + 1))
    for pairs, fits in ((most, 1), (most + 1, 0)):
        experts = torch.tensor([[local, 2 * local - 1]] * pairs + [[0, -1]])  # for rank 1, but for a token for rank 0
        weights = torch.rand(pairs + 1, k, generator=seeded(pairs))
        keys, _ = count(experts, RANKS * local, RANKS, [])
        for few in (
            few_cpu(experts, weights, *by_rank(keys), local),
            guarded(few_triton, experts.to(device), weights.to(device), *by_rank(keys, device), local).cpu(),
        ):
            assert few[:, 0].tolist() == [fits] * RANKS  # of all messages of the rank: none is right without the others
            if fits:
                want = slots_for(1, experts, weights, local)
                assert unpacked(few[1, 1:].view(torch.uint8), pairs, k, local, dtype) == want


def test_where_they_cannot_fit_nothing_is_sent_but_zeros(device: str) -> None:
    tokens, k, local = RANKS * most_pairs(2 * (8 + 1)) + 1, 2, 3
    experts, weights, keys = chosen(tokens, k, local, torch.float64)
    for few in (
        few_cpu(experts, weights, *by_rank(keys), local),
        few_triton(experts.to(device), weights.to(device), *by_rank(keys, device), local),
    ):
        assert few.shape == (RANKS, ROOM)
        assert not few.any()
    wide = torch.arange(2000).view(1, 2000), torch.ones(1, 2000)  # one pair of which is larger than the room
    keys, _ = count(wide[0], 2100, RANKS, [])
    assert not few_cpu(*wide, *by_rank(keys), 700).any()
    assert not few_triton(*(part.to(device) for part in wide), *by_rank(keys, device), 700).any()


@pytest.mark.parametrize(("tokens", "k", "local"), ROUTINGS)
def test_what_came_is_taken_from_the_messages_in_the_order_of_the_ranks(tokens: int, k: int, local: int, device: str) -> None:
    """As rank 1 has it, of ranks of which the middle one has no tokens."""
    sources = [chosen(tokens if source != 1 else 0, k, local, torch.float32, source) for source in range(RANKS)]
    messages, ids, weights = torch.full((RANKS, LENGTH), -1), [], []
    for source, (experts, factors, keys) in enumerate(sources):
        here = slots_for(1, experts, factors, local)
        ids, weights = ids + here[0], weights + here[1]
        messages[source, PAIRS] = len(here[0])
        messages[source, WIDTH:] = few_cpu(experts, factors, *by_rank(keys), local)[1]
    width = k * (4 + (1 if local <= 2**7 else 2 if local <= 2**15 else 4))
    splits = torch.stack((torch.zeros(RANKS, dtype=torch.int64), messages[:, PAIRS]))
    taken = take_cpu(messages, splits, width)
    assert [part.tolist() for part in unpack_cpu(taken, k, local, torch.float32)] == [ids, weights]
    assert torch.equal(guarded(take_triton, messages.to(device), len(ids), width).cpu(), taken)


@pytest.mark.slow
def test_few_slots_pass_opcheck(device: str) -> None:
    for tokens in (5, 1, 0):
        experts, weights, keys = chosen(tokens, 2, 3, torch.float32)
        for factors in (weights.to(device), weights.to(device).requires_grad_()):
            opcheck(few_slots, (experts.to(device), factors, *by_rank(keys, device), 3))
