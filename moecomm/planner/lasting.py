"""lasts: whether loads say anything about the loads to come. What does not last is not worth a move."""

from __future__ import annotations

import math

import numpy as np

from moecomm.planner.imbalance import Floats, Ints

CHANCE = 2.33  # standard deviations: of unrelated orders, one in a hundred agrees as well


def lasts(load: Floats, earlier: Floats) -> bool:
    """Whether the order of the experts by ``earlier`` [E] says anything about their order by ``load`` [E].

    That is so if Spearman's rank correlation of the two is at least CHANCE / sqrt(E - 1): for unrelated orders its standard deviation is
    1 / sqrt(E - 1). Of 6 experts or fewer, the orders must be the same.
    """
    now, then = _centred(load), _centred(earlier)
    both = math.sqrt(int((now * now).sum()) * int((then * then).sum()))
    least = min(1.0, CHANCE / math.sqrt(max(1, len(load) - 1)))
    return int((now * then).sum()) >= least * both * (1 - 1e-12)


def _centred(load: Floats) -> Ints:
    """[E]: the rank of each load among all, less the mean, times 2 E: whole numbers. Equal loads share the middle of their ranks."""
    ordered = np.sort(load)
    twice = ordered.searchsorted(load, "left") + ordered.searchsorted(load, "right")
    return len(load) * twice - twice.sum()
