"""The benchmark beside torchtitan's own dispatcher runs, and both ways give the same there."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from benchmarks import layer_tables, timing, titan
from tests.spawn import run_ranks

with patch("torch._utils._get_available_device_type", lambda: "cpu"):
    pytest.importorskip("torchtitan.tools.utils", reason="torchtitan is not installed: make test-torchtitan")


def lines_here() -> list[timing.Line]:
    small = {"tokens": 8, "dim": 16, "hidden": 16, "experts": titan.EXPERTS, "k": 2}
    with patch.multiple(titan, TOKENS=16, DIM=8, DEBUG=small):
        return titan.around(torch.float32, 2, 2) + titan.around(torch.bfloat16, 1, 2) + titan.whole(2)


@pytest.mark.slow
def test_torchtitans_dispatcher_is_measured_beside_moecomms() -> None:
    of_ranks = run_ranks(lines_here, titan.RANKS, timeout=200)
    assert all(lines == of_ranks[0] for lines in of_ranks)  # the slowest rank's times
    for line in of_ranks[0]:
        assert (line["case"], line["to"]) == ("torchtitan", "moecomm")
        assert 0 < line["low"] <= line["ratio"] <= line["high"]
    about = timing.made_on("cpu") | {"seconds": 1.0, "load before": 0.0}
    shown = layer_tables.titan({"about": about, "lines": [line | {"memory": timing.WARM} for line in of_ranks[0]]})
    assert shown.count("| warm |") == 3
