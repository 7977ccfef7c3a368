"""How long should the exchanges of a layer take? What the planner's cost model says of them, for moecomm and for the K-fold way.

`moecomm/planner/routing.py` has the expected pairs, `moecomm/planner/cluster.py` the links. `benchmarks/links.py` fits a link to gloo on
this machine and compares the model with measurements. The cluster here is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moecomm.planner import PRESETS, Cluster
from moecomm.planner.cluster import exchange
from moecomm.planner.cost import sent_home, sent_there
from moecomm.planner.routing import pairs

COUNT = 8  # bytes of one of the K-fold exchange's counts
HOPPER = PRESETS["h100"]


class Load(NamedTuple):
    """A layer on each rank."""

    tokens: int
    dim: int
    experts: int
    k: int
    itemsize: int = 2


def moecomm(cluster: Cluster, ranks: int, load: Load, most_nodes: int | None = None) -> float:
    """Seconds of a layer's exchanges forward: counts, ids and weights where they are not few, tokens, sums."""
    nodes = max(1, ranks // cluster.node)
    to_each = load.tokens * pairs(load.experts, load.k, ranks, nodes, most_nodes) / ranks
    row = load.dim * load.itemsize
    return float(sent_there(cluster, ranks, to_each, load.k, row) + sent_home(cluster, ranks, to_each, row))


def k_fold(cluster: Cluster, ranks: int, load: Load) -> float:
    """Seconds of the exchanges of the K-fold way: counts, and a row for each slot there and back; wherever its experts are."""
    rows = load.tokens * load.k / ranks * load.dim * load.itemsize
    return float(sum(exchange(cluster, ranks, size) for size in (load.experts // ranks * COUNT, rows, rows)))


def grown(ranks: int) -> Load:
    """The load of the predictions: as DeepSeek-V3 has it, with at least one expert a rank."""
    return Load(tokens=8192, dim=7168, experts=max(256, ranks), k=8)


def predicted(cluster: Cluster, sizes: Sequence[int], most_nodes: int = 4) -> list[dict[str, float]]:
    """Milliseconds for each number of GPUs."""
    lines = []
    for ranks in sizes:
        load = grown(ranks)
        way = {"moecomm": moecomm(cluster, ranks, load), "k_fold": k_fold(cluster, ranks, load)}
        way[f"moecomm, {most_nodes} nodes a token"] = moecomm(cluster, ranks, load, most_nodes)
        nodes = max(1, ranks // cluster.node)
        counted = {
            "pairs": pairs(load.experts, load.k, ranks, nodes),
            "pairs limited": pairs(load.experts, load.k, ranks, nodes, most_nodes),
        }
        lines.append({"gpus": ranks} | {name: 1e3 * seconds for name, seconds in way.items()} | counted)
    return lines
