"""The logger "moecomm": silent until it is asked, at DEBUG a line a plan, and never in compiled code."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import moecomm.functional as mf
from moecomm.inspect.log import LOGGER
from tests.spawn import run_ranks
from tests.traffic import Traffic

EXPERTS = torch.tensor([[2, 0], [2, -1], [1, 2]])


def layer(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    plan = mf.plan(experts, weights, 3, like=x)
    return mf.combine(mf.dispatch(x, plan), plan)


def line(caplog: pytest.LogCaptureFixture) -> str:
    [record] = caplog.records
    caplog.clear()
    assert (record.name, record.levelno) == ("moecomm", logging.DEBUG)
    return record.getMessage()


def test_each_plan_logs_its_sizes_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "moecomm")
    start = "plan on 1 ranks: T 3, K 2, E 3; pairs sent S 0, received R 3; rows N "
    layer(torch.ones(3, 8), EXPERTS, torch.ones(3, 2))
    assert line(caplog) == start + "5; bytes a row 32"
    mf.plan(EXPERTS, torch.ones(3, 2), 3)
    assert line(caplog) == start + "5; bytes a row unknown without like"
    mf.plan(EXPERTS, torch.ones(3, 2), 3, max_rows=2)
    assert line(caplog) == (
        "plan on 1 ranks: T 3, K 2, E 3; pairs sent S 0, received R 3; rows N 4; bytes a row unknown without like"
        "; static: S, R and N count padding"
    )
    mf.plan(EXPERTS[:0], torch.ones(0, 2), 3, like=torch.ones(0, 8, dtype=torch.bfloat16))
    assert line(caplog).endswith("received R 0; rows N 0; bytes a row 16")


def test_nothing_is_made_to_be_logged_where_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moecomm")
    with patch.object(LOGGER, "debug", side_effect=AssertionError), patch("moecomm.inspect.log.resolve_group", side_effect=AssertionError):
        layer(torch.ones(3, 8), EXPERTS, torch.ones(3, 2))
    assert caplog.records == []


def logged_here() -> tuple[list[str], list[str], list[str]]:
    """What two ranks log of a plan, and what the plan then sends and reads."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG)
    experts = torch.tensor([[0, 1], [2, 3], [3, 0]])[: 3 - dist.get_rank()]  # pairs to each rank: 2 and 2; 1 and 1
    if dist.get_rank():
        experts[:] = 3
    try:
        with Traffic() as traffic:
            mf.plan(experts, torch.ones(experts.shape), 4, like=torch.ones(experts.shape[0], 4))
        mf.plan(experts, torch.ones(experts.shape), 4, max_rows=2)
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)
    return lines, traffic.collectives, traffic.reads


def test_a_line_says_how_uneven_the_ranks_are_and_costs_no_exchange_and_no_read() -> None:
    static = "pairs sent S 4, received R 4; rows N 8; bytes a row unknown without like; static: S, R and N count padding"
    (first, *costs), (second, *other_costs) = run_ranks(logged_here, 2)
    assert costs == other_costs == [["all_to_all_single"], ["plan_sizes", "numpy"]]  # of the splits, which are on the CPU
    assert first == [
        "plan on 2 ranks: T 3, K 2, E 4; pairs sent S 4 (at most 2 to a rank, 1.00 times the mean), received R 2; rows N 3; bytes a row 16",
        f"plan on 2 ranks: T 3, K 2, E 4; {static}",
    ]
    assert second == [
        "plan on 2 ranks: T 2, K 2, E 4; pairs sent S 2 (at most 2 to a rank, 2.00 times the mean), received R 4; rows N 7; bytes a row 16",
        f"plan on 2 ranks: T 2, K 2, E 4; {static}",
    ]


@pytest.mark.slow
def test_a_compiled_layer_is_one_graph_and_logs_nothing_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "moecomm")
    given = torch.ones(3, 8, requires_grad=True), EXPERTS, torch.ones(3, 2, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(*given)
    y.sum().backward()
    assert [record for record in caplog.records if record.name == "moecomm"] == []
    caplog.clear()
    torch.testing.assert_close(layer(*given), y)
    line(caplog)  # the eager one does


@pytest.mark.parametrize("max_rows", [None, 2])
def test_tracing_by_other_means_logs_nothing_and_fixes_no_size(caplog: pytest.LogCaptureFixture, max_rows: int | None) -> None:
    caplog.set_level(logging.DEBUG, "moecomm")
    given = EXPERTS, torch.ones(3, 2)
    traced = make_fx(lambda experts, weights: mf.plan(experts, weights, 3, max_rows=max_rows).offsets, tracing_mode="symbolic")(*given)
    assert [record for record in caplog.records if record.name == "moecomm"] == []
    longer = EXPERTS.repeat(3, 1), torch.ones(9, 2)
    assert traced(*longer).tolist() == mf.plan(*longer, 3, max_rows=max_rows).offsets.tolist()


IMPORTED = """
import logging
before = logging.getLogger().handlers[:], logging.getLogger().level
import torch, moecomm.functional as mf
logger = logging.getLogger("moecomm")
mf.plan(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 1)
logger.warning("not to be seen where nobody configured anything")
print((logging.getLogger().handlers, logging.getLogger().level) == before, [type(h).__name__ for h in logger.handlers], logger.level)
"""


@pytest.mark.slow
def test_importing_moecomm_configures_no_logging() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"True \['NullHandler'\] 0\n", done.stdout)
    assert done.stderr == ""
