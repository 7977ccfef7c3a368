"""sync_replicas_ and sync_replica_grads_: keep the replicas of an expert equal."""

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
    """Overwrite the weights of each replica with those on the first rank of its expert, in place: once, after initialization.

    Args:
        params: the experts' weights, [L, ...] each, of any dtypes, the same shapes and dtypes on
            all ranks. An ``nn.Module`` (all its parameters), a mapping from names to tensors, or
            tensors. Row l is local expert l of ``placement``. For a DTensor, its local shard is
            synced.
        placement: as `plan` takes it: [P, L], the experts of each rank.
        group: that of `plan`. A ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or
            None for the default group.

    Raises:
        TypeError, ValueError: an argument is wrong on this rank; raised before a weight is sent.
        MoECommError: the ranks differ in their placements, or in the number, shape or dtype of
            their weights. It is the same on every rank. If one rank raises its own error and has a
            tensor on a device of the group, all other ranks raise a MoECommError, too.

    Backward: none. This function is not part of any graph.

    >>> sync_replicas_(torch.ones(2, 3), placement=[[1, 0]])  # a single process has no replicas

    Costs two small exchanges that the host reads, and one exchange per dtype. In the latter a rank
    receives, for each of its replicated experts, the weights of all other ranks that hold the
    expert.
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
    """Replace the ``.grad`` of each replica by the sum over all replicas of its expert, in place.

    Call it between ``backward()`` and the optimizer's step. The replicas of an expert serve
    different tokens, so the sum is the expert's gradient. Replicas that were equal stay equal under
    an optimizer that works element by element. If `clip_grad_norm_` runs between the two, give it
    the placement as well: it then counts each expert once.

    Args:
        params: the experts' weights, as for `sync_replicas_`. Parameters that require no gradient
            stay unchanged. A parameter without a gradient counts as zeros. It gets a gradient if a
            rank that shares experts with this rank has one.
        placement: as `plan` takes it: [P, L], the experts of each rank.
        group: that of `plan`. A ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or
            None for the default group.

    Raises:
        TypeError, ValueError: an argument is wrong on this rank; raised before anything is sent.
            This function does not compare the ranks' placements or weights: `plan` and
            `sync_replicas_` do.

    Backward: none. This function is not part of any graph.

    >>> weight = torch.ones(2, 3, requires_grad=True)
    >>> weight.sum().backward()
    >>> sync_replica_grads_(weight, placement=[[1, 0]])  # a single process has no replicas

    Costs one exchange per dtype. All of them start before the first wait. Each replica of an expert
    with c replicas sends its gradient c - 1 times. There is a host synchronization only on a rank
    that lacks a gradient. Experts that are on one rank keep their gradients, which are not sent or
    copied.

    The gradients are added in rank order in float32 (float64 for float64) and rounded once: the
    same bits on all replicas, run after run.
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
        # [L, 1] beside each gradient: 1 if this rank has the gradient. Their sum is not 0 if any replica has one.
        flags = [grad.new_full((grad.shape[0], 1), param.grad is not None) for param, grad in zip(tensors, grads, strict=True)]
        buckets = [[tensor for i in bucket for tensor in (grads[i], flags[i])] for bucket in by_dtype(grads)]
        _exchange(buckets, rows, ranks, lambda parts: rank_sum(parts.flatten(1), 1, False).view(parts.shape[1:]))
        for param, grad, flag in zip(tensors, grads, flags, strict=True):
            if param.grad is None and flag.any():  # a host sync, on this rank only
                param.grad = as_param(param, grad)


class Replicas(NamedTuple):
    """What a rank exchanges with the other ranks that hold some of its experts."""

    slots: list[int]  # the local experts that other ranks hold as well
    send: list[int]  # the indices in ``slots`` to send to rank 0, then to rank 1, ...
    splits: list[int]  # [P]: experts sent to each rank, and as many received from it
    alike: list[tuple[list[int], list[list[int]]]]  # for each number of replicas c: the indices in ``slots`` of its n experts,
    # and [c, n], in rank order, the places of these replicas: i is slots[i] itself, len(slots) + m is the m-th one received


def replicas_of(rows: list[list[int]], rank: int) -> Replicas:
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
    return Replicas([rows[rank].index(expert) for expert in mine], send, [len(both) for both in shared], list(alike.values()))


def _exchange(buckets: list[list[Tensor]], rows: list[list[int]], group: Group, reduce: Callable[[Tensor], Tensor]) -> None:
    """Overwrite the replicas with ``reduce`` of all replicas of their expert: [c, n, W] -> [n, W].

    ``buckets`` has a list of tensors [L, ...] per dtype.
    """
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
