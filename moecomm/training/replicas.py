"""sync_replicas_ and sync_replica_grads_: the replicas of an expert stay alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moecomm.layer.placement import Placement, check_experts_of, checked_rows
from moecomm.ops.base.process_group import process_group
from moecomm.ops.exchange.collectives import start_all_to_all, wait
from moecomm.ops.exchange.sync_params import by_dtype
from moecomm.ops.routing.place_slots import upload
from moecomm.ops.rows.rank_sum import rank_sum
from moecomm.parallel.agree import check_same_kind, check_same_placement, tell_refusal
from moecomm.parallel.group import Group, GroupLike, resolve_group
from moecomm.training.params import Params, as_param, check_dense_gradient, check_device, local_gradient, local_part, named_tensors


def sync_replicas_(params: Params, placement: Placement, group: GroupLike = None) -> None:
    """Overwrite the weights of each replica with those of its expert's first rank, once, after initialisation.

    Args:
        params: the experts' weights, [L, ...] each, of any dtypes, alike on all ranks: an ``nn.Module``, all of whose parameters are
            meant, a mapping from names to tensors, or tensors. Row l is local expert l of ``placement``. Of a DTensor the local shard is
            meant.
        placement: what `plan` takes: [P, L], the experts of each rank.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group: that of `plan`.

    Costs two small exchanges, read by the host, and one exchange a dtype, of what all other ranks with the same experts hold.

    Backward: none; it is no part of any graph.

    Raises TypeError or ValueError for an argument that is wrong on this rank, before a weight is sent; `MoECommError`, alike on every
    rank, where the ranks' placements differ, or their weights in number, shape or dtype, and on all others where one raises its own error
    and has a tensor on a device of the group.

    >>> sync_replicas_(torch.ones(2, 3), placement=[[1, 0]])  # a single process has no replicas
    """
    ranks = resolve_group(group)
    tensors: list[Tensor] = []
    try:
        tensors = list(named_tensors(params).values())
        rows = checked_rows(placement, ranks)
        check_experts_of([local_part(tensor) for tensor in tensors], len(rows[0]))
        check_device(tensors)
    except (TypeError, ValueError):
        tell_refusal("sync_replicas_", (tensors, params), ranks)
        raise
    if ranks.size == 1 or not tensors:
        return
    with torch.no_grad():
        local = [local_part(tensor) for tensor in tensors]
        check_same_placement("sync_replicas_", rows, local[0].device, ranks)
        check_same_kind("sync_replicas_", local, ranks)
        buckets = [[local[i] for i in bucket] for bucket in by_dtype(local)]
        _exchange(buckets, rows, ranks, lambda parts: parts[0])


def sync_replica_grads_(params: Params, placement: Placement, group: GroupLike = None) -> None:
    """Replace the ``.grad`` of each replica by the sum over all replicas of its expert, between ``backward()`` and the optimizer's step.

    The replicas of an expert serve different tokens: the sum is the expert's gradient, and an optimizer that works element by element
    keeps replicas alike that were. To `clip_grad_norm_` between the two, name the placement as well: it then counts an expert once.

    Args:
        params: the experts' weights, as for `sync_replicas_`. Those that require no gradient are left alone. One without a gradient
            counts as zeros, and gets a gradient where a rank that shares experts with this one has one.
        placement: what `plan` takes: [P, L], the experts of each rank.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group: that of `plan`.

    The gradients are added up in the order of the ranks in float32 (float64 for float64), and rounded once: the same bits on all
    replicas, run after run. Experts that are on one rank keep their gradients, and nothing of them is sent or copied.

    Costs one exchange a dtype, all of them started before the first is waited for: the gradient of an expert with c replicas is sent
    c - 1 times from each. The host reads from the device only on a rank that lacks a gradient.

    Backward: none; it is no part of any graph.

    Raises TypeError or ValueError for an argument that is wrong on this rank, before anything is sent. That ranks differ in their
    placements or weights is not looked at here: `plan` and `sync_replicas_` do.

    >>> weight = torch.ones(2, 3, requires_grad=True)
    >>> weight.sum().backward()
    >>> sync_replica_grads_(weight, placement=[[1, 0]])  # a single process has no replicas
    """
    ranks = resolve_group(group)
    tensors = [param for param in named_tensors(params).values() if param.requires_grad]
    rows = checked_rows(placement, ranks)
    check_experts_of([local_part(tensor) for tensor in tensors], len(rows[0]))
    check_device(tensors)
    for param in tensors:
        check_dense_gradient(param)
    if ranks.size == 1 or not tensors:
        return
    with torch.no_grad():
        grads = [local_gradient(param) for param in tensors]
        # [L, 1], beside each gradient: whether there is one. Where a replica on another rank has one, the sum is not 0.
        flags = [grad.new_full((grad.shape[0], 1), param.grad is not None) for param, grad in zip(tensors, grads, strict=True)]
        buckets = [[tensor for i in bucket for tensor in (grads[i], flags[i])] for bucket in by_dtype(grads)]
        _exchange(buckets, rows, ranks, lambda parts: rank_sum(parts.flatten(1), 1, False).view(parts.shape[1:]))
        for param, grad, flag in zip(tensors, grads, flags, strict=True):
            if param.grad is None and flag.any():  # a host sync, on this rank only
                param.grad = as_param(param, grad)


class Replicas(NamedTuple):
    """What a rank exchanges with the others that hold some of its experts."""

    slots: list[int]  # the local experts that are elsewhere as well
    send: list[int]  # which of ``slots``, for rank 0, for rank 1, ...
    splits: list[int]  # [P]: how many to each rank, and as many from it
    alike: list[tuple[list[int], list[list[int]]]]  # for each number of replicas c: the n of ``slots`` that have so many, and [c, n], in
    # the order of the ranks, where their replicas are: at i is what slots[i] holds, at len(slots) + m the m-th that was received


def replicas_of(rows: list[list[int]], rank: int) -> Replicas:
    """What ``rank`` exchanges where rank p holds the experts rows[p]: with each other rank the experts that both hold, by their id."""
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
    return Replicas([rows[rank].index(expert) for expert in mine], send, [len(both) for both in shared], list(alike.values()))


def _exchange(buckets: list[list[Tensor]], rows: list[list[int]], group: Group, reduce: Callable[[Tensor], Tensor]) -> None:
    """Overwrite the replicas in the buckets' tensors, [L, ...] of one dtype each, with ``reduce`` of all of them, [c, n, W] -> [n, W]."""
    if len({expert for row in rows for expert in row}) == sum(map(len, rows)):
        return  # no replicas, on any rank
    replicas = replicas_of(rows, process_group(group.name).rank())
    device = buckets[0][0].device
    slots, send = _indices(replicas.slots, device), _indices(replicas.send, device)
    started = []
    for bucket in buckets:
        own = torch.cat([tensor.index_select(0, slots).reshape(len(slots), tensor[0].numel()) for tensor in bucket], 1)  # [slots, W]
        message = own.index_select(0, send).view(torch.uint8)  # gloo sends bytes, but not every dtype
        started.append((own, start_all_to_all(message, replicas.splits, group.name)))
    for bucket, (own, pending) in zip(buckets, started, strict=True):
        received = wait(pending).view(own.dtype)
        every = torch.cat((own, received))  # [slots + received, W]
        for which, parts in replicas.alike:
            index = _indices(sum(parts, []), device)  # [c * n]
            whole = reduce(every.index_select(0, index).view(len(parts), len(which), own.shape[1]))  # [n, W]
            targets = slots.index_select(0, _indices(which, device))  # [n]
            pieces = whole.split([tensor[0].numel() for tensor in bucket], 1)
            for tensor, piece in zip(bucket, pieces, strict=True):
                tensor.index_copy_(0, targets, piece.reshape(len(which), *tensor.shape[1:]))


def _indices(numbers: list[int], device: torch.device) -> Tensor:
    return upload(torch.tensor(numbers, dtype=torch.int64), device)
