"""The ways of balancing experts that are compared with `place`: what each gives is a placement, and cases by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.balancers import WAYS, Rows, eplb, fullest, laer, moved, smartmoe
from benchmarks.placement import generated


@pytest.mark.parametrize("name", WAYS)
def test_every_expert_has_a_rank_and_every_slot_an_expert(name: str) -> None:
    counts = generated(snapshots=2, layers=1)[:, 0]  # [2, P, E]
    ranks, experts = counts.shape[1:]
    slots = WAYS[name].slots
    before = [[(p * experts // ranks + slot) % experts for slot in range(slots)] for p in range(ranks)]
    rows = WAYS[name].choose(counts[0], before)
    assert {expert for row in rows for expert in row} == set(range(experts))
    assert [len(row) for row in rows] == [slots] * ranks
    assert fullest(counts[0], rows) <= fullest(counts[0], before)


def counts_of(*loads: int) -> np.ndarray:
    return np.array([loads, [0] * len(loads)])  # two ranks


def test_smartmoe_copies_no_expert_and_keeps_the_slots_of_those_that_stay() -> None:
    before: Rows = [[0, 1], [2, 3]]
    rows = smartmoe(counts_of(6, 5, 2, 1), before)
    assert rows == [[0, 3], [2, 1]]
    assert moved(rows, before) == [1, 1]


def test_the_expert_with_most_load_a_replica_gets_the_next_one() -> None:
    rows = eplb(counts_of(8, 3, 1), [[0, 1], [1, 2]])
    assert sorted(map(sorted, rows)) == [[0, 1], [0, 2]]
    assert fullest(counts_of(8, 3, 1), rows) == pytest.approx(7 / 6)


def test_laer_gives_each_node_a_replica_before_it_gives_one_two() -> None:
    counts = np.zeros((16, 4), dtype=np.int64)
    counts[0] = 80, 10, 6, 4
    rows = laer(counts, [[0]] * 16)  # 2 nodes of 8 ranks: 8 slots are left once each node has every expert, and go by twos
    copies = np.bincount(np.array(rows).ravel())
    assert copies.tolist() == [10, 2, 2, 2]
    for node in (rows[:8], rows[8:]):
        assert np.bincount(np.array(node).ravel()).tolist() == [5, 1, 1, 1]
