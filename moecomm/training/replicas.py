"""sync_replicas_ and sync_replica_grads_: keep the replicas of an expert equal."""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.layer.placement import Placement, check_experts_of, checked_rows
from moecomm.ops.base.signature import traced
from moecomm.ops.exchange.collectives import wait
from moecomm.ops.exchange.replicas import put_replicas, replicas_exchange
from moecomm.ops.exchange.sync_params import by_dtype
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

    Under torch.compile ``placement`` is lists of ints, as no graph can hold the values of a tensor. The ranks' placements and
    weights are then not compared, because the host would have to read the comparison.
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
        if not traced():
            check_same_placement("sync_replicas_", rows, local[0].device, ranks)
            check_same_kind("sync_replicas_", local, ranks)
        buckets = [[local[i] for i in bucket] for bucket in by_dtype(local)]
        _exchange(buckets, rows, ranks, add=False)


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

    Under torch.compile ``placement`` is lists of ints, and the host reads nothing. So a parameter without a gradient always gets
    one: of zeros if no rank that shares experts with this rank has one.
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
        _exchange(buckets, rows, ranks, add=True)
        for param, grad, flag in zip(tensors, grads, flags, strict=True):
            if param.grad is None and (traced() or flag.any()):  # a host sync, on this rank only
                param.grad = as_param(param, grad)


def _exchange(buckets: list[list[Tensor]], rows: list[list[int]], group: Group, add: bool) -> None:
    """Overwrite the replicas with the first replica of their expert, or with the sum of all.

    ``buckets`` has a list of tensors [L, ...] per dtype.
    """
    placement = [expert for row in rows for expert in row]
    if len(set(placement)) == len(placement):
        return  # no replicas, on any rank
    started = [replicas_exchange(bucket, placement, group.size, group.name) for bucket in buckets]
    for bucket, pending in zip(buckets, started, strict=True):
        put_replicas(bucket, wait(pending), placement, group.size, add, group.name)
