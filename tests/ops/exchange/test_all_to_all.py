"""dispatch_exchange, combine_exchange and return_exchange: what arrives, from whom, in which order."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef

from moecomm.ops.base.signature import ROOM
from moecomm.ops.exchange.all_to_all import combine_exchange, dispatch_exchange, return_exchange
from moecomm.ops.exchange.collectives import wait
from moecomm.ops.exchange.messages import messages_exchange
from tests.ops.cases import IN_FLIGHT, assert_within_rounding, seeded
from tests.spawn import FOUR, run_ranks

PAIRS = {  # [P, P]: how many pairs each rank sends to each
    2: ([[2, 3], [0, 1]], [[0, 0], [4, 0]], [[0, 0], [0, 0]], [[3, 3], [3, 3]]),
    4: ([[1, 0, 2, 3], [0, 0, 0, 0], [4, 1, 0, 0], [1, 1, 1, 0]], [[2] * 4] * 4),
}
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
K = 2


def splits_of(pairs: list[list[int]]) -> Tensor | None:
    """[2, P] for this rank; None where all ranks send as many to each, as in static mode."""
    rank = dist.get_rank()
    if min(map(min, pairs)) == max(map(max, pairs)) > 0:
        return None
    return torch.tensor([pairs[rank], [row[rank] for row in pairs]])


def data(rank: int, pairs: list[list[int]], d: int) -> dict[str, Tensor]:
    """What a rank holds: tokens to send from, and rows to sum for the pairs that it received."""
    generator = seeded(rank)
    sent, received, tokens = sum(pairs[rank]), sum(row[rank] for row in pairs), 3 + rank
    position = torch.randperm(received * K, generator=generator).to(torch.int32).view(received, K)
    position[torch.rand(received, K, generator=generator) < 0.3] = -1
    return {
        "x": torch.randn(tokens, d, generator=generator) * 10,
        "order": torch.randint(-2, tokens * K, (sent,), generator=generator, dtype=torch.int32).clamp(min=-1),  # -1 is padding
        "rows": torch.randn(received * K, d, generator=generator),
        "weights": torch.rand(received, K, generator=generator),
        "position": position,
        "back": torch.randn(received, d, generator=generator),
    }


def taken(x: Tensor, order: Tensor) -> Tensor:
    """The bytes of the rows that are sent, zeros for padding."""
    rows = x.view(torch.uint8)
    return torch.cat((rows, torch.zeros_like(rows[:1])))[order.long() // K]


def blocks(tensors: list[Tensor], pairs: list[list[int]], rank: int) -> Tensor:
    """What ``rank`` receives where rank r sends the rows of tensors[r], pairs[r][p] of them to rank p."""
    return torch.cat([tensor.split(pairs[source])[rank] for source, tensor in enumerate(tensors)])


def exchange_all(pairs: list[list[int]], d: int) -> dict[str, Any]:
    group, here = dist.group.WORLD.group_name, data(dist.get_rank(), pairs, d)
    splits, sent, received = splits_of(pairs), here["order"].shape[0], here["weights"].shape[0]
    none = torch.zeros(0, dtype=torch.int32)
    args = (here["rows"], here["weights"], none, here["position"], splits, sent, group)
    return {
        "dispatched": [
            wait(dispatch_exchange(here["x"].to(dtype), here["order"], K, splits, received, group)).view(torch.uint8) for dtype in DTYPES
        ],
        "combined": wait(combine_exchange(*args)),
        "again": wait(combine_exchange(*args)),
        "unweighted": wait(combine_exchange(here["rows"], None, none, here["position"], splits, sent, group)),
        "returned": wait(return_exchange(here["back"].t().contiguous().t(), splits, sent, group)),
    }


def sums(here: dict[str, Tensor], weighted: bool) -> tuple[Tensor, Tensor]:
    """[R, D] in float64 by loops, and the sum of the terms' sizes."""
    y = torch.zeros(here["position"].shape[0], here["rows"].shape[1], dtype=torch.float64)
    sizes = torch.zeros_like(y)
    for r, slots in enumerate(here["position"].tolist()):
        for j, n in enumerate(slots):
            if n >= 0:
                term = here["rows"][n].double() * (here["weights"][r, j].double() if weighted else 1.0)
                y[r] += term
                sizes[r] += term.abs()
    return y, sizes


@pytest.mark.parametrize("ranks", [2, FOUR])
@pytest.mark.parametrize("d", [5, 0])
def test_what_arrives_is_what_was_sent_here_in_the_order_of_the_ranks(ranks: int, d: int) -> None:
    for pairs in PAIRS[ranks]:
        held = [data(rank, pairs, d) for rank in range(ranks)]
        back = [list(column) for column in zip(*pairs, strict=True)]
        for rank, got in enumerate(run_ranks(exchange_all, ranks, pairs, d)):
            for dtype, dispatched in zip(DTYPES, got["dispatched"], strict=True):
                sent = [taken(here["x"].to(dtype), here["order"]) for here in held]
                assert torch.equal(dispatched, blocks(sent, pairs, rank))
            assert torch.equal(got["returned"], blocks([here["back"] for here in held], back, rank))
            for name, weighted in (("combined", True), ("unweighted", False)):
                want, sizes = (blocks(list(parts), back, rank) for parts in zip(*(sums(here, weighted) for here in held), strict=True))
                assert_within_rounding(got[name], want, sizes, 2.0**-22)
            assert torch.equal(got["combined"], got["again"])


def messages_here() -> tuple[Tensor, list[Tensor]]:
    ranks, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD.group_name
    messages = torch.arange(ranks * 3).view(ranks, 3) + 100 * rank  # row p goes to rank p
    few = torch.arange(ranks * ROOM).view(ranks, ROOM) + 10**6 * rank
    opcheck(messages_exchange, (messages, few, "numbers", group), test_utils=IN_FLIGHT)
    opcheck(messages_exchange, (messages, None, "numbers", group), test_utils=IN_FLIGHT)
    return torch.cat((messages, few), 1), [wait(messages_exchange(messages, with_few, "numbers", group)) for with_few in (few, None)]


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_each_rank_has_its_message_of_every_other(ranks: int) -> None:
    sent, received = zip(*run_ranks(messages_here, ranks), strict=True)
    full, empty = zip(*received, strict=True)
    assert torch.equal(torch.stack(sent).transpose(0, 1), torch.stack(full))
    assert torch.equal(torch.stack(sent).transpose(0, 1)[..., :3], torch.stack(empty)[..., :3])
    assert not torch.stack(empty)[..., 3:].any()


def overwrite_the_input(pairs: list[list[int]]) -> tuple[Tensor, ...]:
    group, here = dist.group.WORLD.group_name, data(dist.get_rank(), pairs, 1000)
    splits, sent, received = splits_of(pairs), here["order"].shape[0], here["weights"].shape[0]
    x, back = here["x"].clone(), here["back"].clone()
    dispatched = dispatch_exchange(x, here["order"], K, splits, received, group)
    returned = return_exchange(back, splits, sent, group)
    x.fill_(0)
    back.fill_(0)
    return wait(dispatched), wait(returned)


def test_the_input_may_be_overwritten_while_the_exchange_is_in_flight() -> None:
    """As the compiler does, which knows of no reader once an op has returned."""
    pairs = PAIRS[2][0]
    held = [data(rank, pairs, 1000) for rank in range(2)]
    for rank, (dispatched, returned) in enumerate(run_ranks(overwrite_the_input, 2, pairs)):
        assert torch.equal(dispatched.view(torch.uint8), blocks([taken(here["x"], here["order"]) for here in held], pairs, rank))
        assert torch.equal(returned, blocks([here["back"] for here in held], [list(column) for column in zip(*pairs, strict=True)], rank))


def sent_here(pairs: list[list[int]]) -> tuple[list[bool], list[bool]]:
    """Of each exchange, whether what was sent is as it was once waited for; and whether its memory is free once nobody holds it."""
    group, here = dist.group.WORLD.group_name, data(dist.get_rank(), pairs, 5)
    splits, sent, received = splits_of(pairs), here["order"].shape[0], here["weights"].shape[0]
    start, held = dist.all_to_all_single, []

    def keep(out: Tensor, send: Tensor, *rest: Any, **options: Any) -> Any:
        held.append((send, send.clone()))
        return start(out, send, *rest, **options)

    with patch.object(dist, "all_to_all_single", keep):
        wait(dispatch_exchange(here["x"], here["order"], K, splits, received, group))
        wait(combine_exchange(here["rows"], here["weights"], here["order"], here["position"], splits, sent, group))
        wait(return_exchange(here["back"], splits, sent, group))
        wait(messages_exchange(torch.ones(2, 3, dtype=torch.int64), None, "numbers", group))
    untouched = [send.untyped_storage().nbytes() >= send.nbytes and torch.equal(send, before) for send, before in held]
    memory = [StorageWeakRef(send.untyped_storage()) for send, _ in held]
    held.clear()
    deadline = time.monotonic() + 30  # gloo's thread lets go of it by itself, as soon as it gets to run
    while not all(each.expired() for each in memory) and time.monotonic() < deadline:
        time.sleep(0.001)
    return untouched, [each.expired() for each in memory]


def test_what_was_sent_stays_whole_for_whoever_holds_it_and_its_memory_is_free_once_nobody_does() -> None:
    assert run_ranks(sent_here, 2, PAIRS[2][0]) == [([True] * 4, [True] * 4)] * 2


def opcheck_all(pairs: list[list[int]], d: int) -> None:
    group, here = dist.group.WORLD.group_name, data(dist.get_rank(), pairs, d)
    splits, sent, received = splits_of(pairs), here["order"].shape[0], here["weights"].shape[0]
    none = torch.zeros(0, dtype=torch.int32)
    rest = (none, here["position"], splits, sent, group)
    opcheck(dispatch_exchange, (here["x"], here["order"], K, splits, received, group), test_utils=IN_FLIGHT)
    opcheck(combine_exchange, (here["rows"], here["weights"], *rest), test_utils=IN_FLIGHT)
    opcheck(combine_exchange, (here["rows"], None, *rest), test_utils=IN_FLIGHT)
    opcheck(return_exchange, (here["back"], splits, sent, group), test_utils=IN_FLIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_the_exchanges_pass_opcheck(ranks: int) -> None:
    for pairs in PAIRS[ranks]:
        run_ranks(opcheck_all, ranks, pairs, 3)
    run_ranks(opcheck_all, ranks, PAIRS[ranks][0], 0)
