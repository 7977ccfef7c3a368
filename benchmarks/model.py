"""How long should the exchanges of a layer take? A model of expected pairs, bytes per link, latencies and overheads.

A link has three numbers: the seconds of an exchange of almost no bytes, the seconds of each message beyond that, and the bytes per second.
The links inside a node and between nodes carry data at the same time. An exchange takes the time of the slower one:

    latency + messages * overhead + bytes / speed.

Uniform routing: a token's K experts are any K of E, and all sets are equally likely. A rank has L = E / P experts. It gets a pair of the
token unless none of the K is among its L: the probability is 1 - C(E - L, K) / C(E, K).

Node-limited routing to M of the nodes: any M nodes are equally likely, and then any K of their E' = E * M / nodes experts. A rank's node is
chosen with probability M / nodes. The probability of a pair is then 1 - C(E' - L, K) / C(E', K). `route` chooses the nodes by their best
two scores, which spreads the K experts: 5 % more pairs for K = 8 of 64 experts on 16 ranks, 4 of 8 nodes.

`benchmarks/links.py` fits a link to gloo on this machine and compares the model with measurements. The cluster here is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from moecomm.ops.base.signature import LENGTH
from moecomm.ops.routing.slots_with_counts import most_pairs

HEADER = LENGTH * 8  # bytes of moecomm's counts and signature, to each rank, with room for few slots
WEIGHT, ID, COUNT = 4, 1, 8  # bytes: a weight, an id among the experts of a rank, one of the K-fold exchange's counts


class Link(NamedTuple):
    latency: float  # seconds
    overhead: float  # seconds a message
    speed: float  # bytes a second that a rank sends, while it receives as many


class Cluster(NamedTuple):
    node: int  # ranks of a node
    inside: Link
    between: Link
    sources: tuple[str, ...]


HOPPER = Cluster(
    node=8,
    inside=Link(latency=11.8e-6, overhead=0.2e-6, speed=0.85 * 450e9),
    between=Link(latency=18.0e-6, overhead=1.0e-6, speed=0.85 * 50e9),
    sources=(
        "8 H100 or H200 a node: NVLink 4, 900 GB/s of a GPU both ways together (NVIDIA, HGX H100 8-GPU)",
        "a 400 Gb/s InfiniBand port a GPU (NVIDIA, DGX H100 User Guide)",
        "85 % of either line rate reached (DeepEP V1: 153 of 160 GB/s NVLink, 43 to 58 of 50 GB/s RDMA)",
        "latency 8.4 us, and 3.4 by NVLink or 9.6 by network (NCCL, src/graph/tuning.cc: ring, Simple)",
        "overhead of a message 0.2 us by NVLink, 1 us by network: assumed, without a source",
    ),
)


class Load(NamedTuple):
    """A layer on each rank."""

    tokens: int
    dim: int
    experts: int
    k: int
    itemsize: int = 2


def pairs(experts: int, k: int, ranks: int, nodes: int = 1, most_nodes: int | None = None) -> float:
    """The (token, rank) pairs expected of a token, under uniform routing to at most ``most_nodes`` of the nodes."""
    reached = min(most_nodes or nodes, nodes)
    pool, local = experts * reached // nodes, experts // ranks
    missed = math.comb(pool - local, k) / math.comb(pool, k)
    return ranks * reached / nodes * (1 - missed)


def exchange(cluster: Cluster, ranks: int, bytes_to_each: float) -> float:
    """Seconds of an exchange of as many bytes from each rank to each."""
    here = min(cluster.node, ranks)
    seconds = []
    for link, others in ((cluster.inside, here - 1), (cluster.between, ranks - here)):
        if others:
            seconds.append(link.latency + others * (link.overhead + bytes_to_each / link.speed))
    return max(seconds, default=0.0)


def moecomm(cluster: Cluster, ranks: int, load: Load, most_nodes: int | None = None) -> float:
    """Seconds of a layer's exchanges forward: counts, ids and weights where they are not few, tokens, sums."""
    nodes = max(1, ranks // cluster.node)
    to_each = load.tokens * pairs(load.experts, load.k, ranks, nodes, most_nodes) / ranks
    most = to_each + 6 * math.sqrt(to_each)  # of all ranks to all others: six standard deviations are enough for 4096^2 of them
    slots = () if most <= most_pairs(load.k * (ID + WEIGHT)) else (to_each * load.k * (ID + WEIGHT),)
    row = load.dim * load.itemsize
    return sum(exchange(cluster, ranks, size) for size in (HEADER, *slots, to_each * row, to_each * row))


def k_fold(cluster: Cluster, ranks: int, load: Load) -> float:
    """Seconds of the exchanges of the K-fold way: counts, and a row for each slot there and back; wherever its experts are."""
    rows = load.tokens * load.k / ranks * load.dim * load.itemsize
    return sum(exchange(cluster, ranks, size) for size in (load.experts // ranks * COUNT, rows, rows))


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
