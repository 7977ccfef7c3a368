"""`calibrate` gives every rank the same numbers, such as this machine can have; and the demo takes its split from them."""

from __future__ import annotations

from argparse import Namespace

import torch.distributed as dist

from moecomm.planner import Cluster, Row
from tests.spawn import run_ranks
from tutorials.demo import auto
from tutorials.demo.model import Shape
from tutorials.demo.options import parse

SHAPE = Shape(dim=32, hidden=32, context=32)


def chosen() -> tuple[Namespace, list[Row], Cluster, int]:
    before = len(dist.distributed_c10d._world.pg_map)
    found = auto.choose(parse(["--ranks=2", "--split=auto", "--no-compile", "--dtype=float32"]), SHAPE)
    return *found, len(dist.distributed_c10d._world.pg_map) - before


def test_two_ranks_measure_the_same_and_the_demo_takes_the_split_that_is_predicted_to_be_fastest() -> None:
    (options, rows, found, groups), other = run_ranks(chosen, 2)
    assert (options, rows, found) == other[:3]
    assert groups == 0  # it leaves none
    assert found.node == 2
    for rate in (found.matmul, found.grouped, found.attention, found.copy, found.stream):
        assert 1e6 < rate < 1e13
    assert 0 < found.inside.latency + found.inside.overhead < 1
    assert found.inside.speed > 1e6
    assert 0 < found.launch < 10
    assert 0 <= found.routed < 10
    assert 0 <= found.sliced < 10
    assert 0.1 < found.gathers < 100
    assert 0.1 < found.scatters < 100
    assert 1 <= found.spare < 100
    assert 2**20 < found.memory < 2**50
    assert len(rows) == 7  # one stage with 2 tp sizes and 3 splits of the experts, and two stages
    best = min(rows, key=lambda row: row.seconds).split
    assert (options.pp, options.tp, options.ep, options.etp) == (best.pp, best.tp, best.ep, best.etp)
    said = auto.said(options, rows, found)
    assert f"of 7 splits the fastest is predicted to take {1e3 * rows[0].seconds:.0f} ms" in said
    assert said.endswith(f"--pp {best.pp} --tp {best.tp} --ep {best.ep} --etp {best.etp}")
