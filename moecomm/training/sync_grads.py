"""sync_grads_: the mean or sum of the gradients over a group, in place, after the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from moecomm.errors import wrong_type, wrong_value
from moecomm.ops.base.signature import traced
from moecomm.ops.exchange.sync_params import Bucket, all_reduce_buckets
from moecomm.ops.routing.read_sizes import read_list
from moecomm.parallel.group import Group, GroupLike, resolve_group
from moecomm.training.params import (
    BUCKET_BYTES,
    Params,
    as_param,
    check_alike_over,
    check_dense_gradient,
    check_device,
    chosen_groups,
    copy_,
    in_buckets,
    local_gradient,
    named_tensors,
)


def sync_grads_(
    params: Params,
    group: GroupLike | Mapping[str | Tensor, GroupLike],
    reduce: Literal["mean", "sum"] = "mean",
    scale: Literal["before", "after"] = "after",
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Replace each parameter's ``.grad`` by the mean or the sum over the ranks, in place.

    Call it between ``backward()`` and the optimizer's step.

    =========================================  =====================================================
    a parameter that                           effect
    =========================================  =====================================================
    requires no gradient                       it stays unchanged
    occurs twice in ``params``                 its gradient is reduced once
    is a DTensor                               the local shard of its gradient is reduced
    has no gradient on some ranks              it counts as zeros there, and gets the result
    has no gradient on all ranks               its ``.grad`` stays None
    =========================================  =====================================================

    Args:
        params: an ``nn.Module``, a mapping from names to tensors, or tensors, on one device. They
            are the same on all ranks, except for which of them have a gradient.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the
            default group. If the parameters' groups differ: a mapping to such groups from patterns
            of names (as in `fnmatch`: "*" stands for any characters, also for dots) or from
            parameters. Example: ``{"*.experts.*": mesh["edp"], "*": None}``. The first match of a
            parameter gives its group. "", the group of each process alone, leaves gradients
            unchanged.
        reduce: "mean" or "sum" over the parameter's own group. An expert has the gradients of all
            tokens of its ep ranks already. So if groups differ, divide the loss by the number of
            all ranks and use "sum".
        scale: for the mean. "before" divides each rank's gradient by P and then adds; "after"
            divides the sum. They differ in rounding, and if the sum is too large for float32.
        bucket_bytes: bytes of gradients of one dtype per message. It does not change the result.

    Raises:
        TypeError: ``params`` holds something that is not a tensor, a gradient is sparse or neither
            float64, float32, bfloat16, float16 nor complex, or ``bucket_bytes`` is not an int.
        ValueError, in these cases:
            - ``reduce`` or ``scale`` is not one of the two
            - ``bucket_bytes`` is below 1
            - the tensors are on several devices, or on the meta device
            - a DTensor is sharded over its group
            - a parameter has no match in the mapping
            - a key of the mapping is no parameter's first match

    Backward: none. This function is not part of any graph.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> (3 * weight).sum().backward()
    >>> sync_grads_([weight], None)  # the mean over a single process
    >>> weight.grad
    tensor([3., 3.])
    >>> sync_grads_({"0.gate": weight}, {"*.experts.*": None, "*": None})
    Traceback (most recent call last):
    ValueError: group['*.experts.*'] was no parameter's first match; it must be that of at least one of '0.gate'

    Costs an all-to-all and an all-gather per bucket. The all-to-alls of all buckets of all groups
    start before the first wait. There is a host synchronization only on a rank that lacks a
    gradient.

    The gradients are added in rank order in float32 (float64 for float64) and rounded once: the
    same bits on all ranks, run after run.

    Under torch.compile the host reads nothing. So a parameter without a gradient always gets one: of zeros if no rank has one.
    """
    _check(reduce, scale, bucket_bytes)
    named = {name: param for name, param in named_tensors(params).items() if param.requires_grad}
    check_device(list(named.values()))
    parts = _by_group(named, group)
    for ranks, tensors in parts:
        for param in tensors:
            check_alike_over(param, ranks)
            check_dense_gradient(param)
    with torch.no_grad():
        members, sent = [], []  # per message: its parameters and their gradients; and what is sent
        for ranks, tensors in parts:
            if ranks.size == 1:
                continue
            grads = [local_gradient(param) for param in tensors]
            for bucket in in_buckets(grads, bucket_bytes):
                own, theirs = [tensors[i] for i in bucket], [grads[i] for i in bucket]
                divisor = ranks.size if reduce == "mean" else 1
                members.append((own, theirs))
                sent.append(Bucket([*theirs, _flags(own, theirs[0])], divisor, ranks.size, ranks.name))
        for (own, theirs), flat in zip(members, all_reduce_buckets(sent, scale == "before"), strict=True):
            _write_back(own, theirs, flat)


def _by_group(named: dict[str, Tensor], group: GroupLike | Mapping[str | Tensor, GroupLike]) -> list[tuple[Group, list[Tensor]]]:
    """Each group once, with its parameters; in an order that is the same on all ranks."""
    if not isinstance(group, Mapping):
        return [(resolve_group(group), list(named.values()))]
    parts: dict[Group, list[Tensor]] = {}
    for param, [ranks] in zip(named.values(), chosen_groups("group", named, group), strict=True):
        parts.setdefault(ranks, []).append(param)
    return list(parts.items())


def _check(reduce: str, scale: str, bucket_bytes: int) -> None:
    if reduce not in ("mean", "sum"):
        wrong_value("reduce", repr(reduce), '"mean" or "sum"')
    if scale not in ("before", "after"):
        wrong_value("scale", repr(scale), '"before" or "after"')
    if not isinstance(bucket_bytes, int):
        wrong_type("bucket_bytes", type(bucket_bytes).__name__, "an int")
    if bucket_bytes < 1:
        wrong_value("bucket_bytes", bucket_bytes, "at least 1")


def _flags(params: list[Tensor], like: Tensor) -> Tensor:
    """1 for each parameter with a gradient, else 0, in the dtype of the gradients that they travel with.

    Their sum over the ranks tells whether any rank has a gradient.
    """
    flags = like.new_ones(len(params))
    for i, param in enumerate(params):
        if param.grad is None:
            flags[i] = 0
    return flags


def _write_back(params: list[Tensor], grads: list[Tensor], flat: Tensor) -> None:
    """Give the parameters of a bucket their gradients from ``flat``."""
    *pieces, flags = flat.split([*(grad.numel() for grad in grads), len(params)])
    copy_(grads, pieces)  # into the parameters' gradients, or into the zeros where there was none
    missing = [i for i, param in enumerate(params) if param.grad is None]
    somewhere = read_list(flags) if missing and not traced() else []  # a host synchronization, on this rank only
    for i in missing:
        if traced() or somewhere[i]:
            params[i].grad = as_param(params[i], grads[i])
