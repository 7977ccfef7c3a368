"""A rank that is killed, is stopped or raises, in each place of a layer: the others fail in the group's timeout, and say in which."""

from __future__ import annotations

import functools
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from tests.faults.faults import (
    FAULTY,
    LATE,
    PLACES,
    RANKS,
    TIMEOUT,
    TOKENS,
    At,
    Ended,
    Fault,
    Ranks,
    lost_ranks,
    nowhere,
    step,
    told_of_exchanges,
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with lost_ranks() as started:
        yield started


def others(ends: list[Ended]) -> list[Ended]:
    return ends[:FAULTY] + ends[FAULTY + 1 :]


def assert_failed_in_time(end: Ended, place: str = "") -> None:
    """By an error of gloo's, in the group's timeout, that says what the rank waited for: what the others wait for that lost one there."""
    assert end.error is not None
    assert end.error.startswith("RuntimeError: ")
    assert "gloo" in end.error
    assert f"\nmoecomm: while waiting for {PLACES.get(place, '')}" in end.error
    assert end.seconds < TIMEOUT + LATE


@pytest.mark.slow
def test_a_rank_that_is_killed_in_any_place_fails_the_others_which_say_where(ranks: Ranks) -> None:
    for place in PLACES:
        ends = ranks.case(Fault("killed", place))
        assert ends[FAULTY].exit_code == -signal.SIGKILL
        for end in others(ends):
            assert_failed_in_time(end, place)


FEW = ["dispatch's backward"]
MANY = [pytest.param([place], marks=pytest.mark.exhaustive, id=place) for place in PLACES if place not in FEW]


@pytest.mark.slow
@pytest.mark.parametrize("places", [pytest.param(FEW, id="some"), *MANY])
def test_a_rank_that_is_stopped_in_any_place_fails_the_others_after_the_groups_timeout(ranks: Ranks, places: list[str]) -> None:
    for place in places:
        ends = ranks.case(Fault("stopped", place))
        for end in ends:  # and its own exchange fails it, once it goes on
            assert_failed_in_time(end, place)
        assert min(end.seconds for end in ends) > 0.9 * TIMEOUT
    assert [end.error for end in ranks.case(None)] == [None] * RANKS  # the same processes, in a new group


@pytest.mark.slow
def test_a_rank_whose_experts_raise_ends_and_fails_the_others(ranks: Ranks) -> None:
    for place in ("experts", "experts' backward"):
        ends = ranks.case(Fault("raises", place))
        assert (ends[FAULTY].error, ends[FAULTY].exit_code) == ("ArithmeticError: in an expert\n", 0)
        for end in others(ends):
            assert_failed_in_time(end, place)


def compiled_step(group: dist.ProcessGroup, at: At) -> None:
    x, weights = torch.ones(TOKENS, 6, requires_grad=True), torch.ones(TOKENS, 2, requires_grad=True)
    with told_of_exchanges(at):
        compiled_layer(x, torch.arange(2 * TOKENS).view(TOKENS, 2) % 3, weights, group.group_name).sum().backward()


@functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
def compiled_layer(x: Tensor, experts: Tensor, weights: Tensor, group: str) -> Tensor:
    plan = mf.plan(experts, weights, 3, group, like=x)
    return mf.combine(mf.dispatch(x, plan) * 2, plan)


@pytest.mark.slow
def test_compiled_code_says_where_it_waited_too(ranks: Ranks) -> None:
    for place in ("dispatch", "combine's backward"):
        for end in others(ranks.case(Fault("killed", place), compiled_step)):
            assert_failed_in_time(end, place)


def two_groups(group: dist.ProcessGroup, at: At) -> None:
    """A layer over each of two groups of the same ranks; a rank that is astray takes the second group first."""
    groups = [group, dist.new_group(timeout=group._get_backend(torch.device("cpu")).options._timeout)]
    if at("counts"):
        groups.reverse()
    for each in groups:
        step(each, nowhere)


@pytest.mark.slow
def test_ranks_that_enter_the_exchanges_of_two_groups_in_different_orders_fail_in_time(ranks: Ranks) -> None:
    """The circular wait of two groups' collectives: torchrec pull request 4149, and DeepEP issue 496, where it hung."""
    for end in ranks.case(Fault("astray", "counts"), two_groups):
        assert_failed_in_time(end, "counts")
        assert end.seconds > 0.9 * TIMEOUT


def cut_graph(group: dist.ProcessGroup, at: At) -> None:
    """Of rank FAULTY's expert nobody wants anything; a rank that is astray then gives rows that have nothing to do with what came."""
    x, weights = torch.ones(5, 64, requires_grad=True), torch.ones(5, 1, requires_grad=True)
    plan = mf.plan(torch.arange(5).view(5, 1) % 2 * (RANKS - 1), weights, RANKS, group, like=x)
    rows = mf.dispatch(x, plan)
    rows = torch.empty(0, 64) if at("experts") else rows * 2
    mf.combine(rows, plan).sum().backward()


@pytest.mark.slow
def test_experts_whose_result_is_cut_from_the_graph_fail_the_others_in_time(ranks: Ranks) -> None:
    """PaddleFormers pull request 3010: experts that gave a new empty tensor where no token came skipped an exchange of the backward, and
    the others waited for it for ever. Here gloo finds that the next one does not fit, and ends that rank's process."""
    for end in others(ranks.case(Fault("astray", "experts"), cut_graph)):
        assert_failed_in_time(end)
        assert "(backward)" in str(end.error)


MEBI = 2**20
NO_MEMORY = "moecomm: no memory for the tokens of dispatch; nothing was sent"


def one_has_no_memory(group: dist.ProcessGroup, at: At) -> None:
    """All tokens go to rank FAULTY, 192 MiB; one that is astray has memory for the 64 MiB that it sends, but not for these."""
    x = torch.zeros(2, 8 * MEBI)
    plan = mf.plan(torch.full((2, 1), FAULTY), torch.ones(2, 1), RANKS, group, like=x)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if at("dispatch"):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 120 * MEBI, hard))
    try:
        mf.dispatch(x, plan)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def none_has_memory(group: dist.ProcessGroup, at: At) -> None:
    """No rank has memory for the 8 rows that it is sent; after which the group does what it did before."""
    tokens = 1 + group.rank() ** 2
    x, empty = torch.ones(tokens, 4), Tensor.new_empty

    def full(tensor: Tensor, *size: Any, **keywords: Any) -> Tensor:
        if size[0] == 8:
            raise torch.OutOfMemoryError("it is full")
        return empty(tensor, *size, **keywords)

    plan = mf.plan(torch.arange(RANKS).expand(tokens, -1), torch.ones(tokens, RANKS), RANKS, group, like=x)
    with patch.object(Tensor, "new_empty", full), pytest.raises(torch.OutOfMemoryError, match="it is full") as raised:
        mf.dispatch(x, plan)
    assert NO_MEMORY in raised.value.__notes__[0]
    assert mf.dispatch(x, plan).shape == (8, 4)


@pytest.mark.slow
def test_a_rank_without_memory_for_what_it_is_sent_fails_the_others(ranks: Ranks) -> None:
    ends = ranks.case(Fault("astray", "dispatch"), one_has_no_memory)
    assert "allocate" in str(ends[FAULTY].error)
    assert NO_MEMORY in str(ends[FAULTY].error)
    for end in others(ends):
        assert_failed_in_time(end, "dispatch")


@pytest.mark.slow
def test_a_group_of_which_no_rank_had_memory_can_be_used_afterwards(ranks: Ranks) -> None:
    assert [end.error for end in ranks.case(None, none_has_memory)] == [None] * RANKS
