"""The tool that looks for what grows: a layer passes it, and what leaves memory, files, threads or groups behind does not."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import moecomm.functional as mf
from benchmarks import soak
from benchmarks.soak import ROUND, Sample, Step, judge

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")

LEFT_BEHIND: list[object] = []


def leaking(device: str) -> Step:
    return leak


def leak(number: int) -> None:
    """Once a round: memory on rank 1 alone, everything else on both."""
    torch.ones(200, 200) @ torch.ones(200, 200)
    if number % ROUND == 0:
        LEFT_BEHIND.append(open(os.devnull))  # noqa: SIM115 - what is left behind
        LEFT_BEHIND.append(dist.new_group())
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        if dist.get_rank() == 1:
            LEFT_BEHIND.append(torch.ones(2**21))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_is_left_behind_is_seen_on_the_rank_that_leaves_it() -> None:
    samples = soak.soak(leaking, 2, 4.0)
    for of_rank in samples:  # from one round to the next, at the rate that it happens
        assert [sample.groups for sample in of_rank] == list(range(of_rank[0].groups, of_rank[0].groups + len(of_rank)))
    grows = {(line.rank, line.what) for line in judge([of_rank[:120] for of_rank in samples]) if line.grows}
    assert grows >= {(rank, what) for rank in (0, 1) for what in ("files", "threads", "groups")}
    assert (1, "memory") in grows


def layers(device: str) -> Step:
    return functools.partial(layer, torch.Generator().manual_seed(dist.get_rank()))


def layer(generator: torch.Generator, number: int) -> None:
    """With experts that do nothing: a matmul of other sizes each time takes memory for a minute before it has all that it needs."""
    tokens = int(torch.randint(0, 257, (), generator=generator))
    experts, x = torch.randint(-1, 8, (tokens, 2), generator=generator), torch.randn(tokens, 32, generator=generator, requires_grad=True)
    plan = mf.plan(experts, torch.ones(tokens, 2, requires_grad=True), 8, like=x, max_rows=256 if number % 2 else None)
    mf.combine(mf.dispatch(x, plan), plan).sum().backward()


@pytest.mark.slow
def test_layers_of_other_sizes_each_time_leave_nothing_behind() -> None:
    """For five seconds; make soak trains the demo's layer for half an hour."""
    lines = judge(soak.soak(layers, 2, 5.0))
    assert {(line.rank, line.what) for line in lines} == {(rank, what) for rank in (0, 1) for what in soak.ALLOWED}
    assert not [line for line in lines if line.grows]


def ramp(step: float, samples: int = 20) -> list[Sample]:
    return [Sample(float(i), 20 * i, 500.0 + step * i, 0.0, 10, 5, 1) for i in range(samples)]


def test_a_run_in_which_something_grows_ends_with_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["soak", "--minutes", "1", "--output", str(tmp_path)])
    monkeypatch.setattr(soak, "soak", lambda *args: [ramp(0.1), ramp(3.0)])
    with pytest.raises(SystemExit, match=r"it grows: memory of rank 1 from 528\.5 to 552\.5"):
        soak.main()
    figures = json.loads((tmp_path / "soak_cpu.json").read_text())  # to be looked at all the same
    assert [len(of_rank) for of_rank in figures["samples"]] == [20, 20]
    monkeypatch.setattr(soak, "soak", lambda *args: [ramp(0.1), ramp(0.0)])
    soak.main()


def test_too_few_samples_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="2 samples in 1 s are too few to tell what grows"):
        judge([ramp(0.0, samples=2)])
