"""What routing makes of a layer: how many rows the fullest rank computes, and how many tokens it receives.

Uniform routing: a token's K experts are any K of E, and all sets are equally likely. A rank with L of the E experts gets a token unless
none of the K is among its L: the probability is 1 - C(E - L, K) / C(E, K). With measured loads, L is the E-fold of the rank's share of all
slots: a rank with twice the load of the mean counts as one with twice the experts.

Node-limited routing to M of the nodes: any M nodes are equally likely, and then any K of their E' = E * M / nodes experts. A rank's node is
chosen with probability M / nodes. The probability of a pair is then 1 - C(E' - L, K) / C(E', K). `route` chooses the nodes by their best
two scores, which spreads the K experts: 5 % more pairs for K = 8 of 64 experts on 16 ranks, 4 of 8 nodes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moecomm.errors import wrong_value
from moecomm.planner.model import Model


class Fullest(NamedTuple):
    """Of the pipeline stage that takes longest, relative to what uniform routing gives each rank. The mean over its layers."""

    rows: float  # expert rows of the fullest rank / of the mean rank
    reached: float  # the probability that a token goes to the fullest rank


def pairs(experts: int, k: int, ranks: int, nodes: int = 1, most_nodes: int | None = None) -> float:
    """The (token, rank) pairs expected of a token, under uniform routing to at most ``most_nodes`` of the nodes.

    >>> pairs(experts=64, k=1, ranks=16), pairs(experts=64, k=64, ranks=16)
    (1.0, 16.0)
    """
    reached = min(most_nodes or nodes, nodes)
    return ranks * reached / nodes * hit(experts * reached // nodes, k, experts // ranks)


def hit(experts: int, k: int, local: float) -> float:
    """The probability that some of K of E experts are among ``local`` of them, which need not be a whole number."""
    missed = 1.0
    for i in range(k):  # C(E - L, K) / C(E, K)
        missed *= max(0.0, (experts - local - i) / (experts - i))
    return 1.0 - missed


def check_loads(loads: ArrayLike, model: Model) -> NDArray[Any]:
    """The loads as [snapshots, layers, E], each layer's as shares of its slots.

    Raises:
        ValueError: not [layers, E] or [snapshots, layers, E] of the model's layers with experts, negative, or a layer without a slot.
    """
    given = np.asarray(loads, dtype=float)
    layers = model.layers - model.dense_layers
    if given.ndim not in (2, 3) or given.shape[-2:] != (layers, model.experts) or given.size == 0:
        wrong_value(
            "loads", f"of shape {list(given.shape)}", f"of shape [{layers}, {model.experts}] or [snapshots, {layers}, {model.experts}]"
        )
    if not np.isfinite(given).all() or (given < 0).any() or (given.sum(-1) <= 0).any():
        wrong_value("loads", "negative, not finite or all zero in a layer", "the slots of each expert, some in each layer")
    shares = given / given.sum(-1, keepdims=True)
    return shares.reshape(-1, layers, model.experts)


def fullest(model: Model, shares: NDArray[Any] | None, ep: int, pp: int) -> Fullest:
    """The fullest of ``ep`` ranks, which have consecutive experts. In every layer and snapshot, all ranks wait for that layer's fullest.

    >>> small = Model(layers=1, dim=64, hidden=32, experts=4, k=1, heads=4, kv_heads=4, head=16, vocabulary=256)
    >>> fullest(small, np.array([[[0.5, 0.25, 0.25, 0.0]]]), ep=2, pp=1)
    Fullest(rows=1.5, reached=0.75)
    """
    if shares is None:
        return Fullest(1.0, hit(model.experts, model.k, model.experts / ep))
    most = shares.reshape(*shares.shape[:2], ep, -1).sum(-1).max(-1).mean(0)  # [layers]: the mean over snapshots
    stage = math.ceil(len(most) / pp)
    slowest = max(range(0, len(most), stage), key=lambda first: most[first : first + stage].sum())
    share = float(most[slowest : slowest + stage].mean())
    return Fullest(share * ep, hit(model.experts, model.k, min(share, 1.0) * model.experts))
