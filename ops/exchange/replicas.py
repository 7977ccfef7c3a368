"""Replicas of experts: row l of each tensor = its expert's row on the first rank that has the expert, or the sum over all these ranks.

`replicas_exchange` sends each replica to the other ranks that hold its expert: W elements for each, with one all-to-all per dtype.
`put_replicas` then overwrites the replicas, in place. It neither reads nor writes rows without replicas. None has a backward.
`replica_shares`: 1 / c for a local expert with c replicas.

The placement is a flat list of P * L experts, the same on all ranks. An op looks up the rank when it runs, so that a graph holds
neither the rank nor its sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moecomm.ops.base.library import define
from moecomm.ops.base.process_group import process_group
from moecomm.ops.exchange.all_to_all import start
from moecomm.ops.exchange.start_op import define_start
from moecomm.ops.routing.place_slots import upload
from moecomm.ops.rows.rank_sum import rank_sum

START = "replicas_exchange(Tensor[] tensors, int[] placement, int ranks, str group) -> Tensor"
PUT = "put_replicas(Tensor(a!)[] tensors, Tensor received, int[] placement, int ranks, bool add, str group) -> ()"
SHARES = "replica_shares(Tensor like, int[] placement, int ranks, str group) -> Tensor"


class Replicas(NamedTuple):
    """What a rank exchanges with the other ranks that hold some of its experts."""

    slots: list[int]  # the local experts that other ranks hold as well
    send: list[int]  # the indices in ``slots`` to send to rank 0, then to rank 1, ...
    splits: list[int]  # [P]: experts sent to each rank, and as many received from it
    alike: list[tuple[list[int], list[list[int]]]]  # for each number of replicas c: the indices in ``slots`` of its n experts,
    # and [c, n], in rank order, the places of these replicas: i is slots[i] itself, len(slots) + m is the m-th one received


def replicas_of(rows: Sequence[Sequence[int]], rank: int) -> Replicas:
    """What ``rank`` exchanges if rank p holds the experts rows[p].

    With each other rank it exchanges the experts that both hold, ordered by id.
    """
    shared = [sorted(set(row).intersection(rows[rank])) if p != rank else [] for p, row in enumerate(rows)]
    elsewhere = set().union(*shared)
    mine = [expert for expert in rows[rank] if expert in elsewhere]
    received = {pair: len(mine) + m for m, pair in enumerate((p, expert) for p, both in enumerate(shared) for expert in both)}
    alike: dict[int, tuple[list[int], list[list[int]]]] = {}
    for i, expert in enumerate(mine):
        holders = [i if p == rank else received[p, expert] for p, row in enumerate(rows) if expert in row]
        which, parts = alike.setdefault(len(holders), ([], [[] for _ in holders]))
        which.append(i)
        for part, holder in zip(parts, holders, strict=True):
            part.append(holder)
    send = [mine.index(expert) for both in shared for expert in both]
    return Replicas([list(rows[rank]).index(expert) for expert in mine], send, [len(both) for both in shared], list(alike.values()))


def _rows(placement: Sequence[int], ranks: int) -> list[Sequence[int]]:
    local = len(placement) // ranks
    return [placement[p * local : (p + 1) * local] for p in range(ranks)]


def _own(placement: Sequence[int], ranks: int, group: str) -> Replicas:
    return replicas_of(_rows(placement, ranks), process_group(group).rank())


def _flat(tensors: Sequence[Tensor], experts: Tensor) -> Tensor:
    """The experts' rows of all tensors of one dtype, side by side: [experts, W]."""
    return torch.cat([tensor.index_select(0, experts).reshape(len(experts), tensor[0].numel()) for tensor in tensors], 1)


def _indices(numbers: list[int], device: torch.device) -> Tensor:
    return upload(torch.tensor(numbers, dtype=torch.int64), device)


def exchange_fake(tensors: Sequence[Tensor], placement: Sequence[int], ranks: int, group: str) -> Tensor:
    return tensors[0].new_empty(torch.library.get_ctx().new_dynamic_size(), sum(tensor[0].numel() for tensor in tensors))


def exchange_here(tensors: Sequence[Tensor], placement: Sequence[int], ranks: int, group: str) -> Tensor:
    """Start to send the replicas of tensors [L, ...] of one dtype; the caller waits for those of the other ranks, [received, W]."""
    own = _own(placement, ranks, group)
    sent = _flat(tensors, _indices([own.slots[i] for i in own.send], tensors[0].device))
    splits = torch.tensor([own.splits, own.splits])
    return start(sent, sum(own.splits), splits, 0, group, "the replicas of this rank's experts")


def put_fake(tensors: Sequence[Tensor], received: Tensor, placement: Sequence[int], ranks: int, add: bool, group: str) -> None:
    return None


def put_here(tensors: Sequence[Tensor], received: Tensor, placement: Sequence[int], ranks: int, add: bool, group: str) -> None:
    own = _own(placement, ranks, group)
    slots = _indices(own.slots, received.device)
    every = torch.cat((_flat(tensors, slots), received))  # [slots + received, W]
    for which, parts in own.alike:
        index = _indices(sum(parts, []), received.device)  # [c * n]
        replicas = every.index_select(0, index).view(len(parts), len(which), every.shape[1])  # [c, n, W]
        whole = rank_sum(replicas.flatten(1), 1, False).view(replicas.shape[1:]) if add else replicas[0]  # [n, W]
        targets = slots.index_select(0, _indices(which, received.device))  # [n]
        pieces = whole.split([tensor[0].numel() for tensor in tensors], 1)
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.index_copy_(0, targets, piece.reshape(len(which), *tensor.shape[1:]))


def shares_fake(like: Tensor, placement: Sequence[int], ranks: int, group: str) -> Tensor:
    return like.new_empty(len(placement) // ranks, dtype=torch.float64)


def shares_here(like: Tensor, placement: Sequence[int], ranks: int, group: str) -> Tensor:
    """How much each local expert counts, [L] on the device of ``like``: 1 / c, where c is the number of its replicas."""
    rows = _rows(placement, ranks)
    mine = rows[process_group(group).rank() if ranks > 1 else 0]
    return upload(torch.tensor([1 / sum(expert in row for row in rows) for expert in mine], dtype=torch.float64), like.device)


replicas_exchange = define_start(START, exchange_fake, exchange_here, exchange_here)
put_replicas = define(PUT, put_fake, put_here, put_here)
replica_shares = define(SHARES, shares_fake, shares_here, shares_here)
