"""A rank that raises, dies or hangs fails its call with where it was, and the next call has new ranks."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.spawn import GROUPS, RankFailed, run_ranks


def total_here(x: int) -> tuple[int, int, int]:
    total = torch.tensor(x + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total), os.getpid()


def raise_here() -> None:
    if dist.get_rank() == 1:
        raise KeyError("what went wrong")
    dist.barrier()  # waits for the rank that has raised


def die_here() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    time.sleep(60)


def hang_here() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def assert_a_new_pool_works(before: list[tuple[int, int, int]]) -> None:
    after = run_ranks(total_here, 2, 10)
    assert [answer[:2] for answer in after] == [(0, 21), (1, 21)]
    assert {answer[2] for answer in after}.isdisjoint(answer[2] for answer in before)
    for _, _, process in before:
        with pytest.raises(ProcessLookupError):  # nothing is left of the old one
            os.kill(process, 0)


def test_ranks_are_kept_from_call_to_call_and_answer_in_order() -> None:
    first, second = run_ranks(total_here, 2, 1), run_ranks(total_here, 2, 10)
    assert [answer[:2] for answer in first] == [(0, 3), (1, 3)]
    assert [answer[2] for answer in first] == [answer[2] for answer in second]


def make_groups(number: int) -> int:
    for _ in range(number):
        dist.new_group([0, 1])
    return os.getpid()


def test_ranks_with_too_many_process_groups_are_not_kept() -> None:
    run_ranks(make_groups, 2, GROUPS)  # so that what other tests have made in the pool that is there does not count
    first = run_ranks(make_groups, 2, 1)
    assert run_ranks(make_groups, 2, GROUPS) == first
    assert not set(run_ranks(make_groups, 2, 0)) & set(first)


def test_a_rank_that_raises_fails_the_call_with_its_traceback() -> None:
    before = run_ranks(total_here, 2, 1)
    with pytest.raises(RankFailed) as failed:
        run_ranks(raise_here, 2)
    text = str(failed.value)
    assert text.startswith("rank 1: Traceback (most recent call last)")
    assert "KeyError: 'what went wrong'" in text
    assert "in raise_here" in text
    assert "rank 0:" in text  # and where the other one waited, or what it then raised
    assert_a_new_pool_works(before)


@pytest.mark.slow
def test_a_rank_that_dies_fails_the_call_with_its_exit_code() -> None:
    before = run_ranks(total_here, 2, 1)
    started = time.monotonic()
    with pytest.raises(RankFailed) as failed:
        run_ranks(die_here, 2)
    assert time.monotonic() - started < 20  # the other rank's sleep is not waited for
    assert str(failed.value).startswith("rank 1: died with exit code 7")
    assert "in die_here" in str(failed.value)  # where the other rank stands
    assert_a_new_pool_works(before)


@pytest.mark.slow
def test_a_rank_that_hangs_fails_the_call_with_where_it_hangs() -> None:
    before = run_ranks(total_here, 2, 1)
    with pytest.raises(RankFailed) as failed:
        run_ranks(hang_here, 2, timeout=2.0)
    text = str(failed.value)
    assert text.startswith("rank 1: no answer")
    assert "in hang_here" in text
    assert "rank 0" not in text
    assert_a_new_pool_works(before)


def unpicklable_here() -> object:
    return lambda: None


def test_an_answer_that_cannot_be_sent_back_is_a_failure_with_a_traceback() -> None:
    with pytest.raises(RankFailed, match="rank 0: Traceback"):
        run_ranks(unpicklable_here, 1)
