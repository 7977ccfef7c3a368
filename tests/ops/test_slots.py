"""exchange_slots: beside each received row, its token's local experts and weights; its backward brings the gradient of weights home."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.count import count
from moecomm.ops.exchange import messages_exchange, wait
from moecomm.ops.fit import fit
from moecomm.ops.signature import signature
from moecomm.ops.sizes import plan_sizes
from moecomm.ops.slots import (
    exchange_slots,
    message_cpu,
    message_fake,
    message_triton,
    slots_exchange,
    unpack_cpu,
    unpack_fake,
    unpack_slots,
    unpack_triton,
)
from moecomm.ops.sort import bounded_sort, counting_sort
from tests.ops.cases import (
    COMPOSED,
    IN_FLIGHT,
    assert_same_layout,
    check_gradients_across_ranks,
    gradient_of,
    guarded,
    routing,
    seeded,
    strided,
)
from tests.spawn import run_ranks

TOKENS = {2: (5, 3), 4: (3, 0, 5, 1)}  # of each rank
WEIGHTS = (torch.float32, torch.float64, torch.bfloat16)


def held(rank: int, tokens: int, k: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """(experts, weights in float64) of a rank."""
    return routing(tokens, k, num_experts, seed=rank), torch.rand(tokens, k, dtype=torch.float64, generator=seeded(rank))


def arguments(experts: Tensor, weights: Tensor, num_experts: int) -> tuple[object, ...]:
    """What exchange_slots takes after the weights: (experts, keys, order, position, local, splits, received, group)."""
    ranks, group = dist.get_world_size(), dist.group.WORLD.group_name
    keys, sent = count(experts, num_experts, ranks, signature(experts, weights, num_experts))
    s, r, _, splits = plan_sizes(sent, wait(messages_exchange(sent, "counts", group)))
    order, position, _ = counting_sort(keys, ranks, s)
    return experts, keys, order, position, num_experts // ranks, splits, r, group


def static_arguments(experts: Tensor, num_experts: int, most: int) -> tuple[object, ...]:
    """The same where each rank sends ``most`` pairs to each."""
    ranks, group = dist.get_world_size(), dist.group.WORLD.group_name
    keys, _ = count(experts, num_experts, ranks, [])
    order, position = bounded_sort(keys, ranks, most)
    fits, _ = fit(experts, experts, position, num_experts // ranks)
    return fits, keys, order, position, num_experts // ranks, None, ranks * most, group


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


def exchange(tokens: tuple[int, ...], k: int, num_experts: int, most: int | None = None) -> list[tuple[Tensor, Tensor]]:
    experts, weights = held(dist.get_rank(), tokens[dist.get_rank()], k, num_experts)
    rest = arguments(experts, weights, num_experts) if most is None else static_arguments(experts, num_experts, most)
    return [exchange_slots(weights.to(dtype), *rest) for dtype in WEIGHTS]


@pytest.mark.parametrize("ranks", [2, 4])
def test_slots_arrive_with_their_rows(ranks: int) -> None:
    """With local experts that need 1, 2 and 4 bytes, at both sides of the limits."""
    sizes = ((1, 2, None), (3, 2, None), (2, 128, None), (2, 129, None), (2, 2**15, None), (2, 2**15 + 1, None))
    for k, local, most in (*sizes, (1, 2, 6), (2, 2, 2), (2, 129, 6), (2, 2**15 + 1, 1)):
        for rank, results in enumerate(run_ranks(exchange, ranks, TOKENS[ranks], k, local * ranks, most)):
            want_ids, want = expected(TOKENS[ranks], k, local * ranks, rank, most)
            for dtype, (there, ids) in zip(WEIGHTS, results, strict=True):
                assert ids.dtype == torch.int32
                assert torch.equal(ids, torch.tensor(want_ids, dtype=torch.int32).view(-1, k))
                assert torch.equal(there, torch.tensor(want, dtype=torch.float64).view(-1, k).to(dtype))


def gradients(tokens: tuple[int, ...]) -> None:
    experts, weights = held(dist.get_rank(), tokens[dist.get_rank()], 2, 4)
    for rest in (static_arguments(experts, 4, 2), arguments(experts, weights, 4)):
        check_gradients_across_ranks(lambda weights, rest=rest: exchange_slots(weights, *rest), weights)
        check_gradients_across_ranks(gradient_of(lambda weights, rest=rest: exchange_slots(weights, *rest)[0]), weights)


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradient_of_the_weights_comes_home_and_its_own_does(ranks: int) -> None:
    run_ranks(gradients, ranks, TOKENS[ranks])


def opcheck_all(tokens: tuple[int, ...]) -> None:
    experts, weights = held(dist.get_rank(), tokens[dist.get_rank()], 2, 4)
    weights = weights.float()
    for ids, keys, order, position, *rest in (arguments(experts, weights, 4), static_arguments(experts, 4, 2)):
        opcheck(slots_exchange, (ids, weights.detach(), keys, order, *rest), test_utils=IN_FLIGHT)
        opcheck(exchange_slots, (weights.requires_grad_(), ids, keys, order, position, *rest), test_utils=COMPOSED)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_slots_pass_opcheck(ranks: int) -> None:
    run_ranks(opcheck_all, ranks, TOKENS[ranks])
    run_ranks(opcheck_all, ranks, (0,) * ranks)


def test_unpack_passes_opcheck() -> None:
    for received, k, local, dtype, width in ((3, 2, 4, torch.float32, 10), (0, 2, 4, torch.float32, 10), (2, 3, 300, torch.bfloat16, 12)):
        message = torch.randint(0, 256, (received, width), dtype=torch.uint8, generator=seeded(k))
        opcheck(unpack_slots, (message, k, local, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "k", "local"), [(5, 2, 3), (33, 1, 2), (70, 3, 129), (9, 8, 2**15 + 1), (0, 2, 3), (40, 5, 1)])
def test_both_paths_pack_and_unpack_alike(tokens: int, k: int, local: int, dtype: torch.dtype, device: str) -> None:
    ranks = 3
    experts = routing(tokens, k, ranks * local, seed=tokens)
    weights = torch.rand(tokens, k, dtype=torch.float64, generator=seeded(k)).to(dtype)
    keys, _ = count(experts, ranks * local, ranks, [])
    pairs, _, _ = counting_sort(keys, ranks, int((keys >= 0).sum()))
    for order, padded in ((pairs, False), (bounded_sort(keys, ranks, max(1, tokens // 2))[0], True)):
        for ids, factors in zip(strided(experts), strided(weights), strict=True):
            args = ids, factors, keys, order, local, padded
            messages = message_cpu(*args), guarded(message_triton, *(a.to(device) if isinstance(a, Tensor) else a for a in args))
            assert torch.equal(messages[0], messages[1].cpu())
            assert_same_layout(message_fake(*args), messages[1])
            want_ids, want = torch.full((order.shape[0], k), -1), torch.zeros(order.shape[0], k, dtype=dtype)
            for row, pair in enumerate(order.tolist()):
                if pair >= 0:
                    here = ids[pair // k] - int(keys.flatten()[pair]) * local
                    want_ids[row], want[row] = torch.where((here >= 0) & (here < local), here, -1), factors[pair // k]
            for unpack in (unpack_cpu, unpack_triton):
                message = messages[0].to(device) if unpack is unpack_triton else messages[0]
                got = guarded(unpack, message, k, local, dtype)
                assert_same_layout(unpack_fake(message, k, local, dtype), got)
                assert torch.equal(got[0].cpu(), want_ids.to(torch.int32))
                assert torch.equal(got[1].cpu(), want)
