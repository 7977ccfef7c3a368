"""A rank that raises, dies or hangs fails its call with where it was, and the next call has new ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.spawn import GROUPS, RankFailed, run_ranks

ROOT = Path(__file__).parents[2]


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


def state_of(process: int) -> str:
    """As /proc tells it: T is stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_ranks_that_wait_for_a_call_are_stopped() -> None:
    for _ in range(2):
        processes = [process for *_, process in run_ranks(total_here, 2, 1)]
        deadline = time.monotonic() + 10
        while {state_of(process) for process in processes} != {"T"}:  # the signal takes its time
            assert time.monotonic() < deadline
            time.sleep(0.01)


LONELY = """
import os, signal
from tests.project.test_spawn import total_here
from tests.spawn import run_ranks
if __name__ == "__main__":
    print(*(process for *_, process in run_ranks(total_here, 2, 1)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_stopped_ranks_end_when_the_tests_are_killed(tmp_path: Path) -> None:
    (tmp_path / "lonely.py").write_text(LONELY)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "lonely.py")], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 30
    for process in map(int, done.stdout.split()):
        while Path(f"/proc/{process}").exists() and state_of(process) != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def make_groups(number: int) -> int:
    for _ in range(number):
        dist.new_group([0, 1])
    return os.getpid()


def test_ranks_with_too_many_process_groups_are_not_kept() -> None:
    run_ranks(make_groups, 2, GROUPS)  # so that what other tests have made in the pool that is there does not count
    first = run_ranks(make_groups, 2, 1)
    assert run_ranks(make_groups, 2, GROUPS) == first
    assert not set(run_ranks(make_groups, 2, 0)) & set(first)


@pytest.mark.slow
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


def with_two_threads() -> float:
    torch.set_num_threads(2)
    try:
        return torch.embedding_bag(torch.ones(4096, 256), torch.arange(4096), torch.arange(0, 4096, 8))[0].mean().item()
    finally:
        torch.set_num_threads(1)


def test_a_rank_may_use_several_threads() -> None:
    """It waits for ever if the fork server has started OpenMP's threads."""
    assert run_ranks(with_two_threads, 2, timeout=60) == [8.0, 8.0]
