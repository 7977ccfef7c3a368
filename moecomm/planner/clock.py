"""Times that all ranks of a group take together, for `calibrate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moecomm.ops.exchange.collectives import all_gathered, start_all_gather

REPEATS = 7


class Ranks(NamedTuple):
    """Who measures, on what, with which clock."""

    name: str  # of the group
    size: int
    device: str
    clock: Callable[[], float]


def everyones(mine: Tensor, ranks: Ranks) -> list[Tensor]:
    """The vector of each rank, on the host."""
    if ranks.size == 1:
        return [mine]
    mine = mine[None].to(ranks.device)
    return list(all_gathered(start_all_gather(mine, ranks.size, ranks.name), mine, ranks.size).to("cpu"))


def seconds(ranks: Ranks, *runs: Callable[[], object]) -> list[float]:
    """The seconds of each of ``runs``, which all ranks start together: the median of some, and the mean of the ranks.

    The runs take turns, so that a while in which the machine is slow is one for all of them.
    """
    for run in runs:
        run()
    taken = torch.zeros(REPEATS, len(runs), dtype=torch.float64)
    for repeat in range(REPEATS):
        for i, run in enumerate(runs):
            everyones(torch.zeros(1), ranks)
            begun = now(ranks)
            run()
            taken[repeat, i] = now(ranks) - begun
    return [float(each) for each in torch.stack(everyones(taken.median(0).values, ranks)).mean(0)]


def now(ranks: Ranks) -> float:
    if ranks.device == "cuda":
        torch.cuda.synchronize()
    return ranks.clock()
