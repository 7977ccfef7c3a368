"""Legal splits are those of the definition, found by trying every combination of sizes."""

from __future__ import annotations

import itertools
import math

import pytest

from moecomm.planner import Model, Split, splits
from moecomm.planner.splits import misfits

SMALL = Model(layers=3, dim=24, hidden=6, experts=6, k=2, heads=4, kv_heads=2, head=6, vocabulary=16, sequence=12, batch=6)


@pytest.mark.parametrize("ranks", [1, 2, 4, 6, 8, 12])
def test_the_splits_are_those_whose_sizes_multiply_to_the_ranks(ranks: int) -> None:
    sizes = range(1, ranks + 1)
    expected = set()
    for dense in itertools.product(sizes, repeat=4):
        if math.prod(dense) == ranks:
            stage = ranks // dense[0]
            expected |= {Split(*dense, *view) for view in itertools.product(range(1, stage + 1), repeat=3) if math.prod(view) == stage}
    found = list(splits(ranks))
    assert set(found) == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12])
def test_a_split_fits_the_model_if_and_only_if_every_part_is_whole(ranks: int) -> None:
    reasons = 0
    for split in splits(ranks):
        pp, dp, cp, tp, _, ep, etp = split
        whole = all(size == int(size) for size in (4 / tp, 12 / (cp * tp), 6 / ep, 6 / etp, 6 / dp))
        keys = 2 % tp == 0 or tp % 2 == 0
        fits = whole and keys and pp <= 3 and 6 // dp >= pp
        found = misfits(split, SMALL)
        assert (not found) == fits, split
        reasons += len(found)
    assert reasons or ranks < 4


def test_a_misfit_names_the_size_and_what_it_must_divide() -> None:
    split = Split(pp=5, dp=5, cp=1, tp=3, edp=1, ep=5, etp=4)
    assert misfits(split, SMALL) == [
        "pp = 5 is more than the 3 layers",
        "tp = 3 does not divide the 4 heads",
        "ep = 5 does not divide the 6 experts",
        "etp = 4 does not divide an expert's hidden dim of 6",
        "dp = 5 does not divide the batch of 6 sequences",
    ]


def test_the_call_to_paste_makes_the_split() -> None:
    split = Split(pp=2, dp=2, cp=1, tp=2, edp=2, ep=2, etp=1)
    given: dict[str, int] = {}
    eval(split.call("cpu"), {"moe_mesh": lambda device, **sizes: given.update(sizes)})
    assert given == {"pp": 2, "dp": 2, "cp": 1, "tp": 2, "ep": 2, "etp": 1}
