"""All ways of parallelism in one world: every split of 8 ranks that `moe_mesh` takes trains as one process does."""

from __future__ import annotations

import functools
import itertools
import math

import pytest

from moecomm.mesh import divisors
from tests import one_process
from tests.one_process import Run, Sizes
from tests.spawn import run_ranks
from tests.stages import Split, Training, assert_is_one_process, train

WORLD = 8
SIZES = Sizes(hidden=16, batch=16, length=8)  # each of them can be split over 8 ranks


def training(split: Split, hidden: int = SIZES.hidden) -> Training:
    """What a split of the ranks is to repeat; its norms are above the clip's at all steps."""
    return Training(SIZES._replace(layers=max(2, split.pp), hidden=hidden), steps=3, clip=0.5, microbatches=2)


@functools.cache
def expected(of: Training) -> Run:
    run = one_process.train(*of)
    assert min(run.norms) > of.clip
    return run


def splits(world: int) -> list[Split]:
    """Every way to split a world: pp * dp * tp = pp * edp * ep * etp = world."""
    sizes = [divisors(world)] * len(Split._fields)
    return [split for split in itertools.starmap(Split, itertools.product(*sizes)) if fits(split, world)]


def fits(split: Split, world: int) -> bool:
    return split.pp * split.dp * split.tp == world and split.edp * split.ep * split.etp == world // split.pp


EVERY_RUN = [Split(1, 2, 4, 2, 2, 2), Split(2, 2, 2, 1, 2, 2), Split(2, 2, 2, 2, 2, 1), Split(1, 8, 1, 2, 2, 2)]


def case(split: Split, compiled: bool) -> object:
    """Some in every run, all of them where all is asked for."""
    marks = [pytest.mark.slow] if split in EVERY_RUN and not compiled else [pytest.mark.slow, pytest.mark.exhaustive]
    return pytest.param(split, compiled, id=f"{split}{', compiled' * compiled}", marks=marks)


def test_the_splits_are_all_there_are() -> None:
    found = splits(WORLD)
    assert len(set(found)) == len(found)
    # 2^n ranks are split over m dims in as many ways as n equal things over m boxes.
    ways = [math.comb(n + 1, 1) * math.comb(n + 2, 2) for n in range(4)]
    assert len(found) == sum(ways)
    assert set(EVERY_RUN) <= set(found)


@pytest.mark.parametrize(("split", "compiled"), [case(split, compiled) for compiled in (False, True) for split in splits(WORLD)])
def test_training_split_over_8_ranks_is_that_of_one_process(split: Split, compiled: bool) -> None:
    of = training(split)
    assert_is_one_process(run_ranks(train, WORLD, of, split, "GPipe", compiled, timeout=200), expected(of))


@pytest.mark.slow
def test_compiled_training_split_over_4_ranks_is_that_of_one_process() -> None:
    of = training(split := Split(pp=2, dp=1, tp=2, edp=1, ep=2, etp=1))
    assert_is_one_process(run_ranks(train, 4, of, split, "GPipe", True, timeout=200), expected(of))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("split", [Split(1, 2, 4, 2, 2, 2), pytest.param(Split(2, 1, 4, 1, 1, 4), marks=pytest.mark.exhaustive)])
def test_hidden_dims_need_not_divide_over_tp_and_etp(split: Split, compiled: bool) -> None:
    """15 over 2 is 8 and 7, over 4 it is 4, 4, 4 and 3; 9 over 4 is 3, 3, 3 and none: as `slice_scatter` cuts."""
    for hidden in (15, 9):
        of = training(split, hidden)
        assert_is_one_process(run_ranks(train, WORLD, of, split, "GPipe", compiled, timeout=300), expected(of))
