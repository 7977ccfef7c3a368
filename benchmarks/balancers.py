"""The ways of balancing experts that benchmarks/placement.py compares, each written from its paper or from what its source does.

A way takes the counts of a snapshot, [P, E] (the rows of each rank's tokens for each expert), and the experts of each rank before, and
gives those after. It is then asked how full the ranks are at the next snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moecomm.planner import place

Counts = NDArray[np.int64]  # [P, E]
Rows = list[list[int]]
NODE = 8  # ranks


class Way(NamedTuple):
    slots: int  # of a rank
    source: str
    choose: Callable[[Counts, Rows], Rows]


def in_order(counts: Counts, before: Rows) -> Rows:
    return before


def smartmoe(counts: Counts, before: Rows) -> Rows:
    """Experts move, and none is copied: from the fullest on, to the emptiest rank that has a slot left."""
    loads, slots = counts.sum(0), len(before[0])
    rows: Rows = [[] for _ in before]
    full = [0] * len(before)
    for expert in np.argsort(-loads, kind="stable").tolist():
        rank = min((r for r, row in enumerate(rows) if len(row) < slots), key=lambda r: (full[r], r))
        rows[rank].append(expert)
        full[rank] += int(loads[expert])
    return in_their_slots(rows, before)


def eplb(counts: Counts, before: Rows) -> Rows:
    """The expert with most load per replica gets the next one; then replicas go, the largest first, to the emptiest rank with a slot."""
    loads, slots = counts.sum(0).astype(float), len(before[0])
    copies = np.ones(len(loads))
    for _ in range(len(before) * slots - len(loads)):
        copies[int((loads / copies).argmax())] += 1
    replicas = [expert for expert in np.argsort(-loads / copies, kind="stable").tolist() for _ in range(int(copies[expert]))]
    rows: Rows = [[] for _ in before]
    full = [0.0] * len(before)
    for expert in replicas:
        rank = min((r for r, row in enumerate(rows) if len(row) < slots), key=lambda r: (full[r], r))
        rows[rank].append(expert)
        full[rank] += loads[expert] / copies[expert]
    return rows  # it does not ask where the experts were


def laer(counts: Counts, before: Rows) -> Rows:
    """Replicas as EPLB's, but one for each node at a time, once every node has one. Each goes to a node with fewest of its expert."""
    loads, slots, ranks = counts.sum(0).astype(float), len(before[0]), len(before)
    nodes, room = max(1, ranks // NODE), ranks * slots
    copies = np.full(len(loads), nodes if nodes * len(loads) <= room else 1)
    growing = set(range(len(loads)))
    while copies.sum() < room:
        expert = max(growing, key=lambda e: (loads[e] / copies[e], -e))
        more = nodes if copies[expert] >= nodes else 1
        if copies.sum() + more <= room:
            copies[expert] += more
        else:
            growing.remove(expert)
    rows: Rows = [[] for _ in before]
    full = [0.0] * ranks
    for expert in np.argsort(-loads / copies, kind="stable").tolist():
        for _ in range(copies[expert]):
            there = [sum(expert in row for row in rows[n * NODE : (n + 1) * NODE]) for n in range(nodes)]
            rank = min((r for r in range(ranks) if len(rows[r]) < slots), key=lambda r: (there[min(r // NODE, nodes - 1)], full[r], r))
            rows[rank].append(expert)
            full[rank] += loads[expert] / copies[expert]
    return rows  # nor does it: it gathers the experts' weights anew in every step


def ours(counts: Counts, before: Rows) -> Rows:
    return place(counts.sum(0), len(before), len(before[0]), current=before)


def in_their_slots(rows: Rows, before: Rows) -> Rows:
    """The same experts of each rank; one that was there keeps its slot."""
    placed = []
    for row, old in zip(rows, before, strict=True):
        new = [expert for expert in row if expert not in old]
        placed.append([expert if expert in row else new.pop(0) for expert in old])
    return placed


def fullest(counts: Counts, rows: Rows) -> float:
    """Max over mean of the ranks' loads; every replica has an equal part of its expert's load, also two on one rank (EPLB makes them)."""
    held = np.array(rows)
    copies = np.bincount(held.ravel(), minlength=counts.shape[1])
    loads = (counts.sum(0) / copies)[held].sum(1)
    return float(loads.max() / loads.mean())


def moved(rows: Rows, before: Rows) -> list[int]:
    """How many experts each rank receives: those that it did not have."""
    return [len(set(row) - set(old)) for row, old in zip(rows, before, strict=True)]


def shadows(counts: Counts, rows: Rows, row_seconds: float, shadow_seconds: float) -> list[int]:
    """FasterMoE: the fullest experts whose weights all ranks get in this step, as many as the predicted step gains from."""
    chosen: list[int] = []
    best = float(shadowed(counts, rows, chosen).max()) * row_seconds
    for expert in np.argsort(-counts.sum(0), kind="stable").tolist():
        seconds = float(shadowed(counts, rows, [*chosen, expert]).max()) * row_seconds + (len(chosen) + 1) * shadow_seconds
        if seconds >= best:
            break
        chosen, best = [*chosen, expert], seconds
    return chosen


def shadowed(counts: Counts, rows: Rows, chosen: list[int]) -> NDArray[np.int64]:
    """[P]: the loads of the ranks. The tokens of a shadowed expert stay on their own rank."""
    sent = counts.sum(0)
    sent[chosen] = 0
    return sent[np.array(rows)].sum(1) + counts[:, chosen].sum(1)


LAER = "LAER-MoE (arXiv:2602.11686), the greedy re-layout of its csrc/greedy_balancer.cpp, 8 ranks a node"
SMARTMOE = "SmartMoE (ATC'23), the greedy of its online part"
EPLB = "EPLB (github.com/deepseek-ai/EPLB), its global policy"
WAYS = {
    "nothing": Way(2, "experts in order", in_order),
    "SmartMoE": Way(2, SMARTMOE, smartmoe),
    "EPLB, 3 slots": Way(3, EPLB, eplb),
    "LAER-MoE, 3 slots": Way(3, LAER, laer),
    "moecomm, 3 slots": Way(3, "moecomm.planner.place", ours),
    "EPLB, 4 slots": Way(4, EPLB, eplb),
    "LAER-MoE, 4 slots": Way(4, LAER, laer),
    "moecomm, 4 slots": Way(4, "moecomm.planner.place", ours),
}
SHADOWING = "FasterMoE", "FasterMoE (PPoPP'22), dynamic shadowing"
