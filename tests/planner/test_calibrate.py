"""`calibrate` gives every rank the same numbers, and numbers that this machine can have."""

from __future__ import annotations

import time

import torch.distributed as dist

from moecomm.planner import Cluster, Model, calibrate, search
from tests.spawn import run_ranks

MODEL = Model(layers=2, dim=64, hidden=64, experts=4, k=2, heads=4, kv_heads=4, head=16, vocabulary=64, sequence=64, batch=8, itemsize=4)


def calibrated() -> tuple[Cluster, float, int]:
    start = time.monotonic()
    before = len(dist.distributed_c10d._world.pg_map)
    found = calibrate(model=MODEL)
    return found, time.monotonic() - start, len(dist.distributed_c10d._world.pg_map) - before


def test_two_ranks_get_the_same_numbers_of_this_machine() -> None:
    (found, seconds, groups), (other, *_) = run_ranks(calibrated, 2)
    assert found == other
    assert groups == 0  # it leaves none
    assert found.node == 2
    for rate in (found.matmul, found.grouped, found.attention, found.copy):
        assert 1e6 < rate < 1e13
    assert 0 < found.inside.latency + found.inside.overhead < 1
    assert 1e6 < found.inside.speed
    assert 0 < found.launch < seconds
    assert 1 <= found.spare < 100
    assert 2**20 < found.memory < 2**50
    table = search(MODEL, found)
    assert table.ranks == 2
    assert table.rows
