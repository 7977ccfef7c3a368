"""The links between ranks, measured: exchanges of two sizes in groups of a node, of pairs and across nodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moecomm.ops.exchange.collectives import start_all_gather, start_all_to_all, start_reduce_scatter, wait
from moecomm.planner.clock import Ranks, seconds
from moecomm.planner.cluster import Link, fit_link

EXCHANGES = 4  # timed one behind the other
SIZES = (1 << 10, 1 << 20)  # bytes to each rank


def links(ranks: Ranks, node: int) -> tuple[Link, Link]:
    """The links inside a node and between nodes, fitted to exchanges; of a group of one rank, links that take no time."""
    inside = between = Link(0.0, 0.0, float("inf"))
    if ranks.size == 1:
        return inside, between
    if ranks.size < dist.get_world_size():  # other ranks of the world do not come to make groups
        link = fit_link(*zip(*_exchanges(ranks, ranks.name, ranks.size), strict=True))
        return link, link
    first = range(0, ranks.size, node)
    if node > 1:
        groups = [[list(range(i, i + node)) for i in first]]
        if node > 2 and node % 2 == 0:
            groups.append([[i, i + 1] for i in range(0, ranks.size, 2)])
        inside = _fitted(ranks, groups)
    if ranks.size > node:
        between = _fitted(ranks, [[list(range(i, ranks.size, node)) for i in range(node)]])
    return inside, between


def _fitted(ranks: Ranks, divisions: list[list[list[int]]]) -> Link:
    """The link that explains the exchanges in the groups of each division of the world, which all groups make at the same time."""
    found: list[tuple[int, int, float]] = []
    for division in divisions:
        whole = len(division) == 1
        groups = [dist.group.WORLD if whole else dist.new_group(members) for members in division]
        own = next(group for group, members in zip(groups, division, strict=True) if dist.get_rank() in members)
        found += _exchanges(ranks, own.group_name, len(division[0]))  # type: ignore[union-attr]
        if not whole:
            dist.destroy_process_group(own)
    return fit_link(*zip(*found, strict=True))


def _exchanges(ranks: Ranks, group: str, size: int) -> list[tuple[int, int, float]]:
    """The messages, the bytes to each rank and the seconds of an exchange in ``group``, of two sizes."""
    found = []
    for bytes_to_each in SIZES:
        send = torch.zeros(size * bytes_to_each, dtype=torch.uint8, device=ranks.device)
        (taken,) = _each(ranks, partial(start_all_to_all, send, (bytes_to_each,) * size, group))
        found.append((size - 1, bytes_to_each, taken))
    return found


def _each(ranks: Ranks, *starts: Callable[[], Tensor]) -> list[float]:
    """Seconds of what each of ``starts`` starts, several one behind the other."""

    def some(start: Callable[[], Tensor]) -> None:
        for _ in range(EXCHANGES):
            wait(start())

    return [taken / EXCHANGES for taken in seconds(ranks, *(partial(some, start) for start in starts))]


def to_all_to_all(ranks: Ranks) -> tuple[float, float]:
    """The times of an all-gather and of a reduce-scatter to that of an all-to-all that sends as much; the mean of two sizes."""
    if ranks.size == 1:
        return 1.0, 1.0
    ratios = []
    for bytes_to_each in SIZES:
        every = torch.zeros(ranks.size, bytes_to_each // 4, device=ranks.device)
        exchange, gather, scatter = _each(
            ranks,
            partial(start_all_to_all, every, (1,) * ranks.size, ranks.name),
            partial(start_all_gather, every[0], ranks.size, ranks.name),
            partial(start_reduce_scatter, every, ranks.size, ranks.name),
        )
        ratios.append((gather / exchange, scatter / exchange))
    gathers, scatters = np.mean(ratios, 0)
    return float(gathers), float(scatters)
