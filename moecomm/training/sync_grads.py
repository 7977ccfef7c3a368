"""sync_grads_: the gradients of a model's parameters added up over their groups, in place, after the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from moecomm.errors import wrong_type, wrong_value
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
    """Replace each parameter's ``.grad`` by the mean or the sum of the ranks', between ``backward()`` and the optimizer's step.

    Args:
        params: an ``nn.Module``, a mapping from names to tensors, or tensors, on one device; alike on all ranks but for which of them
            have a gradient. Those that require no gradient are left alone, one that is there twice is reduced once. Of a DTensor's
            gradient the local shard is meant. A parameter without a gradient on some ranks counts as zeros there and gets the result; one
            without a gradient on all ranks keeps None.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group. Or a mapping from patterns
            of names (as in `fnmatch`: "*" stands for any characters, dots too), or from parameters, to such groups, where they differ:
            ``{"*.experts.*": mesh["edp"], "*": None}``. A parameter's group is that of its first match. "", the group of each process
            alone, leaves gradients as they are.
        reduce: "mean" or "sum" of the ranks' gradients: of those of the parameter's own group. An expert has the gradients of all the
            tokens that came to it from its ep ranks already; so where groups differ, divide the loss by the number of all ranks and
            take the "sum".
        scale: for the mean, whether each rank's gradient is divided by P "before" they are added up, or their sum "after". They differ in
            rounding, and where the sum is too large for float32.
        bucket_bytes: how many bytes of gradients of a dtype are sent in one message; it does not change the result.

    The gradients are added up in the order of the ranks in float32 (float64 for float64), and rounded once: the same bits on all ranks,
    run after run.

    Costs an all-to-all and an all-gather for each bucket. All buckets' all-to-alls, of all groups, are started before the first is waited
    for. The host reads from the device only on a rank that lacks a gradient.

    Backward: none; it is no part of any graph.

    Raises TypeError where ``params`` holds anything but tensors, a gradient is sparse or ``bucket_bytes`` no int; ValueError where
    ``reduce`` or ``scale`` is not one of the two, ``bucket_bytes`` is below 1, the tensors are on several devices, a DTensor is
    sharded over its group, or in a mapping a parameter has no match, or a key is no parameter's first match.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> (3 * weight).sum().backward()
    >>> sync_grads_([weight], None)  # the mean over a single process
    >>> weight.grad
    tensor([3., 3.])
    >>> sync_grads_({"0.gate": weight}, {"*.experts.*": None, "*": None})
    Traceback (most recent call last):
    ValueError: group['*.experts.*'] was no parameter's first match; it must be that of at least one of '0.gate'
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
        members, sent = [], []  # of each message: its parameters and their gradients, and what is sent
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
    """Each group once, and the parameters that belong to it; in an order that is the same on all ranks."""
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
    """1 for each parameter that has a gradient, of the dtype of what they travel with: their sum tells whether any rank has one."""
    flags = like.new_ones(len(params))
    for i, param in enumerate(params):
        if param.grad is None:
            flags[i] = 0
    return flags


def _write_back(params: list[Tensor], grads: list[Tensor], flat: Tensor) -> None:
    """Give the parameters of a bucket the gradients that ``flat`` has for them."""
    *pieces, flags = flat.split([*(grad.numel() for grad in grads), len(params)])
    copy_(grads, pieces)  # the parameters' own gradients, and the zeros of those that had none
    missing = [i for i, param in enumerate(params) if param.grad is None]
    somewhere = read_list(flags) if missing else []  # on this rank only
    for i in missing:
        if somewhere[i]:
            params[i].grad = as_param(params[i], grads[i])
