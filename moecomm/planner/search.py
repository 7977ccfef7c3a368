"""search: every split of the ranks and every way to run it, ranked by the time that a step is predicted to take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moecomm.errors import wrong_value
from moecomm.mesh import divisors
from moecomm.planner.cluster import Cluster
from moecomm.planner.cost import RECOMPUTE, Times, Way, predict
from moecomm.planner.memory import Memory, peak
from moecomm.planner.model import Model
from moecomm.planner.routing import Fullest, check_loads, fullest
from moecomm.planner.splits import Split, misfits, splits
from moecomm.planner.table import Row, Table, Unfit

WIRES, PLANS = ("bf16", "fp8"), ("dynamic", "static")


def search(
    model: Model,
    cluster: Cluster,
    loads: ArrayLike | None = None,
    *,
    ranks: int | None = None,
    wires: Sequence[str] = WIRES,
    plans: Sequence[str] = PLANS,
    recompute: Sequence[str] = RECOMPUTE,
    microbatches: Sequence[int] | None = None,
) -> Table:
    """Predict the step time and the memory of every legal split, and rank them. It computes on numbers: no process group, no device.

    Args:
        model: the sizes of the model and its batch, by hand or from `read_config`.
        cluster: the machines, one of `PRESETS` or from `calibrate`.
        loads: the slots that each expert gets, [layers, E], or a trace of them, [snapshots, layers, E], of the layers with experts. In
            each layer all ranks wait for the fullest. None: all experts get as many.
        ranks: all ranks. None: those of one node.
        wires: in what tokens travel to their experts: "bf16" (the model's own numbers) and "fp8".
        plans: "dynamic" sizes, or "static" ones with room for 1.25 times the pairs that the fullest rank gets.
        recompute: what the backward pass makes again: "none", "lean" (rows and products of the experts) or "full" (all but what arrived).
        microbatches: the numbers to try. None: every one that divides the sequences of a data-parallel rank.

    Returns:
        A `Table`. Its ``rows`` are those that fit in memory, the fastest first: one for each split, wire, plan and recomputation, with the
        number of microbatches that is fastest. ``unfit`` has the rest, and why.

    Raises:
        ValueError: ranks below 1 or no multiple of a node's, loads of another shape, or an unknown wire, plan or recomputation.

    Example:
        >>> from moecomm.planner import PRESETS, Model
        >>> small = Model(layers=8, dim=1024, hidden=512, experts=64, k=4, heads=16, kv_heads=16, head=64, vocabulary=32000, batch=64)
        >>> table = search(small, PRESETS["h100"], ranks=8)
        >>> table.rows[0].split.pp, table.rows[0].memory.total() < PRESETS["h100"].memory
        (1, True)
    """
    ranks = cluster.node if ranks is None else ranks
    if ranks < 1 or (ranks > cluster.node and ranks % cluster.node):
        wrong_value("ranks", ranks, f"at least 1, and above the {cluster.node} ranks of a node a multiple of it")
    for argument, given, known in (("wires", wires, WIRES), ("plans", plans, PLANS), ("recompute", recompute, RECOMPUTE)):
        if not given or set(given) - set(known):
            wrong_value(argument, list(given), f"some of {', '.join(known)}")
    shares = None if loads is None else check_loads(loads, model)
    every = [(split, misfits(split, model)) for split in splits(ranks)]
    unfit = [Unfit(split, None, "; ".join(why)) for split, why in every if why]
    legal = [split for split, why in every if not why]
    which, m = _microbatches(legal, model, microbatches)
    unfit += [Unfit(legal[i], None, "no such number of microbatches") for i in sorted(set(range(len(legal))) - set(which.tolist()))]
    rows: list[Row] = []
    for wire, plan, again in itertools.product(wires, plans, recompute) if len(which) else ():
        chosen: list[Any] = [np.full(len(m), value) for value in (wire == "fp8", plan == "static", RECOMPUTE.index(again))]
        way = Way(m, *chosen)
        columns = Split(*np.array(legal)[which].T)
        times, memory = _predicted(model, cluster, columns, way, shares)
        fits = memory.total() <= cluster.memory
        # of a split's numbers of microbatches: the fastest that fits, and if none fits the one that needs least
        order = np.lexsort((np.where(fits, times.total(), memory.total()), ~fits, which))
        best = order[np.unique(which[order], return_index=True)[1]]
        for row in _rows(model, *(_taken(each, best) for each in (columns, way, times, memory))):
            if row.memory.total() <= cluster.memory:
                rows.append(row)
            else:
                unfit.append(Unfit(row.split, row.way, _too_much(row.memory, cluster)))
    return Table(model, cluster, ranks, sorted(rows, key=lambda row: (row.seconds, row.split)), unfit)


def assess(model: Model, cluster: Cluster, candidates: Sequence[tuple[Split, Way]], loads: ArrayLike | None = None) -> list[Row]:
    """Predict the candidates, in their order: what `search` does with those that it finds. Whether they fit is not looked at.

    >>> from moecomm.planner import PRESETS
    >>> small = Model(layers=8, dim=1024, hidden=512, experts=64, k=4, heads=16, kv_heads=16, head=64, vocabulary=32000, batch=64)
    >>> way, ep = Way(8, fp8=False, static=False, recompute=0), Split(pp=1, dp=8, cp=1, tp=1, edp=1, ep=8, etp=1)
    >>> [row.split.ep for row in assess(small, PRESETS["h100"], [(ep, way)])]
    [8]
    """
    columns, ways = Split(*np.array([split for split, _ in candidates]).T), Way(*np.array([way for _, way in candidates], int).T)
    return _rows(model, columns, ways, *_predicted(model, cluster, columns, ways, None if loads is None else check_loads(loads, model)))


def _predicted(model: Model, cluster: Cluster, split: Split, way: Way, shares: Any) -> tuple[Times, Memory]:
    """The times and the memory of arrays [n] of splits and ways."""
    places, inverse = np.unique(np.stack((split.ep, split.pp), 1), axis=0, return_inverse=True)
    table = np.array([fullest(model, shares, int(ep), int(pp)) for ep, pp in places])  # [(ep, pp), 2]
    full = Fullest(*table[inverse.reshape(-1)].T)
    return predict(model, cluster, split, way, full), peak(model, split, way, full)


def _microbatches(legal: list[Split], model: Model, allowed: Sequence[int] | None) -> tuple[Any, Any]:
    """For every number of microbatches of every split, the split's index and the number: [n] each."""
    of_dp = {dp: divisors(model.batch // dp) for dp in {split.dp for split in legal}}
    found = [(i, m) for i, split in enumerate(legal) for m in of_dp[split.dp] if m >= split.pp and (allowed is None or m in allowed)]
    index, number = zip(*found, strict=True) if found else ((), ())
    return np.array(index, int), np.array(number, int)


def _taken(columns: Any, index: Any) -> Any:
    return type(columns)(*(np.broadcast_to(column, len(columns[0]))[index] for column in columns))


def _rows(model: Model, split: Split, way: Way, times: Times, memory: Memory) -> list[Row]:
    """Columns [n] as n rows of Python's numbers."""
    count = len(np.atleast_1d(split.pp))
    parts = [zip(*(np.broadcast_to(column, count).tolist() for column in columns), strict=True) for columns in (split, way, times, memory)]
    found = []
    for of_split, (m, fp8, static, again), of_time, of_memory in zip(*parts, strict=True):
        seconds = sum(of_time)
        of_step = model.batch * model.sequence / seconds
        way_of_row = Way(m, bool(fp8), bool(static), again)
        found.append(Row(Split(*of_split), way_of_row, seconds, of_step, Times(*of_time), Memory(*of_memory)))
    return found


def _too_much(memory: Memory, cluster: Cluster) -> str:
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in memory._asdict().items())
    return f"needs {memory.total() / 2**30:.1f} of {cluster.memory / 2**30:.1f} GiB: {parts}"
