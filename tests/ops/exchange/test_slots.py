"""exchange_slots: beside each received row, its token's local experts and weights; its backward brings the gradient of weights home."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.base.signature import signature
from moecomm.ops.exchange.collectives import wait
from moecomm.ops.exchange.messages import messages_exchange
from moecomm.ops.exchange.slots import exchange_slots, slots_exchange
from moecomm.ops.routing.count_pairs import count
from moecomm.ops.routing.counting_sort import bounded_sort, counting_sort
from moecomm.ops.routing.drop_overflow import fit
from moecomm.ops.routing.read_sizes import plan_sizes
from moecomm.ops.routing.slots_with_counts import few_slots
from tests.ops.cases import (
    COMPOSED,
    IN_FLIGHT,
    check_gradients_across_ranks,
    gradient_of,
    routing,
    seeded,
)
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

TOKENS = {2: (5, 3), 4: (3, 0, 5, 1)}  # of each rank
WEIGHTS = (torch.float32, torch.float64, torch.bfloat16)


def held(rank: int, tokens: int, k: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """(experts, weights in float64) of a rank."""
    return routing(tokens, k, num_experts, seed=rank), torch.rand(tokens, k, dtype=torch.float64, generator=seeded(rank))


def arguments(experts: Tensor, weights: Tensor, num_experts: int, early: bool) -> tuple[object, ...]:
    """What exchange_slots takes after the weights: (experts, keys, order, position, local, messages, few, splits, received, group).

    The slots come with the counts where that is ``early``, and else by themselves.
    """
    ranks, local, group = dist.get_world_size(), num_experts // dist.get_world_size(), dist.group.WORLD.group_name
    keys, sent = count(experts, num_experts, ranks, signature(experts, weights, num_experts))
    order, position, ends = counting_sort(keys, ranks, keys.numel(), True)
    slots = few_slots(experts, weights, keys, order, ends, local) if early else None
    messages = wait(messages_exchange(sent, slots, "counts", group))
    s, r, _, splits, few = plan_sizes(sent, messages)
    assert few.tolist() == [early]
    return experts, keys, order[:s], position, local, messages, few, splits, r, group


def static_arguments(experts: Tensor, num_experts: int, most: int) -> tuple[object, ...]:
    """The same where each rank sends ``most`` pairs to each."""
    ranks, group = dist.get_world_size(), dist.group.WORLD.group_name
    keys, _ = count(experts, num_experts, ranks, [])
    order, position = bounded_sort(keys, ranks, most)
    fits, _ = fit(experts, experts, position, num_experts // ranks)
    return fits, keys, order, position, num_experts // ranks, None, None, None, ranks * most, group


def expected(
    tokens: tuple[int, ...], k: int, num_experts: int, rank: int, most: int | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """(ids, weights) that ``rank`` receives, by loops over the ranks' tokens; ``most`` from each rank, the rest padding."""
    local = num_experts // len(tokens)
    ids, there = [], []
    for source, count_of in enumerate(tokens):
        experts, weights = held(source, count_of, k, num_experts)
        received = []
        for slots, factors in zip(experts.tolist(), weights.tolist(), strict=True):
            here = [expert - rank * local if expert // local == rank else -1 for expert in slots]
            if max(here) >= 0:
                received.append((here, factors))
        if most is not None:
            received = (received + [([-1] * k, [0.0] * k)] * most)[:most]
        ids += [here for here, _ in received]
        there += [factors for _, factors in received]
    return ids, there


def exchange(tokens: tuple[int, ...], k: int, num_experts: int, most: int | None, early: bool) -> list[tuple[list[int], Tensor, Tensor]]:
    """(bytes sent to each rank, weights, ids) for each dtype of weights."""
    experts, weights = held(dist.get_rank(), tokens[dist.get_rank()], k, num_experts)
    results = []
    for dtype in WEIGHTS:
        here = weights.to(dtype)
        rest = arguments(experts, here, num_experts, early) if most is None else static_arguments(experts, num_experts, most)
        with Traffic() as traffic:
            results.append((traffic.bytes, *exchange_slots(here, *rest)))
    return results


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("ranks", [2, FOUR])
def test_slots_arrive_with_their_rows(ranks: int, early: bool) -> None:
    """With local experts that need 1, 2 and 4 bytes, at both sides of the limits."""
    sizes = ((1, 2, None), (3, 2, None), (2, 128, None), (2, 129, None), (2, 2**15, None), (2, 2**15 + 1, None))
    for k, local, most in (*sizes, *(() if early else ((1, 2, 6), (2, 2, 2), (2, 129, 6), (2, 2**15 + 1, 1)))):
        for rank, results in enumerate(run_ranks(exchange, ranks, TOKENS[ranks], k, local * ranks, most, early)):
            want_ids, want = expected(TOKENS[ranks], k, local * ranks, rank, most)
            for dtype, (sent, there, ids) in zip(WEIGHTS, results, strict=True):
                assert (sent == []) == early
                assert ids.dtype == torch.int32
                assert torch.equal(ids, torch.tensor(want_ids, dtype=torch.int32).view(-1, k))
                assert torch.equal(there, torch.tensor(want, dtype=torch.float64).view(-1, k).to(dtype))


def gradients(tokens: tuple[int, ...]) -> None:
    experts, weights = held(dist.get_rank(), tokens[dist.get_rank()], 2, 4)

    def early(weights: Tensor) -> tuple[Tensor, Tensor]:
        return exchange_slots(weights, *arguments(experts, weights, 4, True))

    rests = static_arguments(experts, 4, 2), arguments(experts, weights, 4, False)
    for exchanged in (early, *(lambda weights, rest=rest: exchange_slots(weights, *rest) for rest in rests)):
        check_gradients_across_ranks(exchanged, weights)
        check_gradients_across_ranks(gradient_of(lambda weights, exchanged=exchanged: exchanged(weights)[0]), weights)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, FOUR])
def test_gradient_of_the_weights_comes_home_and_its_own_does(ranks: int) -> None:
    run_ranks(gradients, ranks, TOKENS[ranks])


def opcheck_all(tokens: tuple[int, ...]) -> None:
    experts, weights = held(dist.get_rank(), tokens[dist.get_rank()], 2, 4)
    weights = weights.float()
    for ids, keys, order, position, *rest in (
        *(arguments(experts, weights, 4, early) for early in (False, True)),
        static_arguments(experts, 4, 2),
    ):
        opcheck(slots_exchange, (ids, weights.detach(), keys, order, *rest), test_utils=IN_FLIGHT)
        opcheck(exchange_slots, (weights.requires_grad_(), ids, keys, order, position, *rest), test_utils=COMPOSED)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_slots_pass_opcheck(ranks: int) -> None:
    run_ranks(opcheck_all, ranks, TOKENS[ranks])
    run_ranks(opcheck_all, ranks, (0,) * ranks)
