"""sync_params and sync_params_: parameters alike on all ranks of a group."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from moecomm.errors import check_tensor, wrong_type, wrong_value
from moecomm.ops.exchange import sync_params as ops
from moecomm.ops.exchange.collectives import wait
from moecomm.parallel.agree import check_same_kind, tell_refusal
from moecomm.parallel.group import Group, GroupLike, resolve_group
from moecomm.training.params import (
    BUCKET_BYTES,
    Params,
    as_param,
    check_alike_over,
    check_device,
    copy_,
    in_buckets,
    local_part,
    named_tensors,
)

Tree = TypeVar("Tree")


def sync_params(params: Tree, group: GroupLike, src: int = 0, grad: Literal["mean", "sum"] | None = "mean") -> Tree:
    """The parameters as rank ``src`` has them, on every rank: with its backward, data parallelism as one function.

    ``torch.func.functional_call(model, sync_params(dict(model.named_parameters()), group), (x,))`` runs the model; after ``backward()``
    every rank has the mean gradient in ``.grad``, and the same optimizer step keeps the ranks alike. `torch.func.grad` works as well,
    in eager mode; compile the forward pass, and its ``backward()`` is compiled with it.

    Args:
        params: a tensor, or a pytree of tensors (a dict, list, NamedTuple, ...) of any shapes and dtypes, on one device; of the same
            shapes and dtypes, and each requiring a gradient or not, alike on all ranks. Of a DTensor the local shard is sent; the
            ranks of ``group`` hold the same shard of it.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.
        src: the rank, counted in the group, whose parameters all get.
        grad: what the backward makes of the ranks' gradients: their "mean", their "sum", or None, each rank keeps its own.

    Returns the same pytree of new tensors, none of them a Parameter, in a group of one ``params`` itself. One broadcast a dtype.

    Backward: "mean" or "sum" of the ranks' gradients, on every rank: one all-to-all and one all-gather a dtype for all parameters
    together, added up in the order of the ranks in float32 (float64 for float64) and rounded once, and so the same bits on all ranks,
    run after run. What gets no gradient on a rank counts as zeros. None: nothing is sent. In eager mode there
    is a second derivative, reduced alike.

    Raises TypeError where ``params`` holds anything but tensors or ``src`` is no int; ValueError where ``src`` is no rank of the group,
    ``grad`` not one of the three, the tensors are on several devices, or a DTensor is sharded over the group.

    >>> model = torch.nn.Linear(2, 1)
    >>> same = sync_params(dict(model.named_parameters()), None)
    >>> torch.func.functional_call(model, same, (torch.ones(3, 2),)).shape
    torch.Size([3, 1])
    """
    if grad not in ("mean", "sum", None):
        wrong_value("grad", repr(grad), '"mean", "sum" or None')
    ranks = resolve_group(group)
    _check_src(src, ranks)
    leaves, spec = tree_flatten(params)
    for i, leaf in enumerate(leaves):
        check_tensor(f"params' leaf {i}", leaf, "of any shape")
    _check_place(leaves, ranks)
    if ranks.size == 1 or not leaves:
        return params
    divisor = {"mean": ranks.size, "sum": 1, None: None}[grad]
    local = [local_part(leaf) for leaf in leaves]
    synced = ops.sync_params(local, src, divisor, ranks.size, ranks.name)
    return tree_unflatten([as_param(leaf, tensor) for leaf, tensor in zip(leaves, synced, strict=True)], spec)


def sync_params_(params: Params, group: GroupLike, src: int = 0) -> None:
    """Overwrite the parameters with those of rank ``src``, once, after initialisation.

    Args:
        params: an ``nn.Module``, all of whose parameters and buffers are meant, as in DDP; or a mapping from names to tensors, or
            tensors, of any shapes, strides and dtypes, on one device; the same on all ranks. A tensor that is there twice is sent once.
            Of a DTensor the local shard is meant.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.
        src: the rank, counted in the group, whose parameters all get.

    Costs one small exchange, read by the host, and one broadcast for each 25 MiB of a dtype.

    Backward: none; it is no part of any graph.

    Raises as `sync_params` does, before a tensor is sent; `MoECommError`, alike on every rank, where the ranks' tensors differ in
    number, shape or dtype, and on all others where one raises its own error and has a tensor on a device of the group.

    >>> sync_params_(torch.nn.Linear(2, 1), None)  # a single process has nothing to do
    """
    ranks = resolve_group(group)
    tensors: list[Tensor] = []
    try:
        tensors = list(named_tensors(params, buffers=True).values())
        _check_src(src, ranks)
        _check_place(tensors, ranks)
    except (TypeError, ValueError):
        tell_refusal("sync_params_", (tensors, params), ranks)
        raise
    if ranks.size == 1 or not tensors:
        return
    with torch.no_grad():
        local = [local_part(tensor) for tensor in tensors]
        check_same_kind("sync_params_", local, ranks)
        pending: tuple[list[Tensor], Tensor] | None = None
        for bucket in in_buckets(local, BUCKET_BYTES):
            mine = [local[i] for i in bucket]
            started = mine, ops.start_broadcast(mine, src, ranks.name)
            if pending is not None:
                _receive(*pending)  # while the next one is on its way
            pending = started
        if pending is not None:
            _receive(*pending)


def _receive(tensors: list[Tensor], started: Tensor) -> None:
    copy_(tensors, wait(started).split([tensor.numel() for tensor in tensors]))


def _check_place(tensors: list[Tensor], group: Group) -> None:
    check_device(tensors)
    for tensor in tensors:
        check_alike_over(tensor, group)


def _check_src(src: int, group: Group) -> None:
    if not isinstance(src, int) or isinstance(src, bool):
        wrong_type("src", type(src).__name__, "an int")
    if not 0 <= src < group.size:
        wrong_value("src", src, f"a rank of the group, 0 to {group.size - 1}")
