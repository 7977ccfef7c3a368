"""sync_params and sync_params_: the same parameters on all ranks of a group."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from moecomm.errors import check_gradient_summed, check_sent, check_tensor, wrong_type, wrong_value
from moecomm.ops.base.signature import traced
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
    """Return the parameters of rank ``src`` on every rank, differentiable: data parallelism as one function.

    ``torch.func.functional_call(model, sync_params(dict(model.named_parameters()), group), (x,))``
    runs the model. After ``backward()`` every rank has the mean gradient in ``.grad``, and the same
    optimizer step keeps the ranks equal.

    Args:
        params: a tensor, or a pytree of tensors (a dict, list, NamedTuple, ...), of any shapes, on
            one device. Any dtypes but quantized ones and integers of less than a byte. Where
            ``grad`` is not None and a tensor requires a gradient, it is float64, float32, bfloat16,
            float16 or complex. Shapes, dtypes and requires_grad are the same on all ranks. For a
            DTensor the local shard is sent; the ranks of ``group`` hold the same shard of it.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the
            default group.
        src: the rank whose parameters all ranks get, counted in the group.
        grad: what the backward computes of the ranks' gradients: "mean", "sum", or None, where each
            rank keeps its own.

    Returns:
        The same pytree of new tensors, which are not Parameters. In a group of one it is ``params``
        itself.

    Raises:
        TypeError: ``params`` holds something that is not a tensor or not of such a dtype, or
            ``src`` is not an int.
        ValueError: ``src`` is not a rank of the group, ``grad`` is not one of the three, the
            tensors are on several devices or on the meta device, or a DTensor is sharded over the
            group.

    Backward:
        "mean", "sum": of the ranks' gradients, on every rank. A tensor without a gradient on a rank
            counts as zeros there. The gradients are added in rank order in float32 (float64 for
            float64) and rounded once: the same bits on all ranks, run after run. In eager mode
            there is a second derivative, reduced in the same way.
        None: sends nothing.

    >>> model = torch.nn.Linear(2, 1)
    >>> same = sync_params(dict(model.named_parameters()), None)
    >>> torch.func.functional_call(model, same, (torch.ones(3, 2),)).shape
    torch.Size([3, 1])

    Costs one broadcast per dtype. The backward costs one all-to-all and one all-gather per dtype,
    for all parameters together.

    You may change the new tensors in place. In a group of one they are the parameters themselves, so that would change these.

    `torch.func.grad` works as well, in eager mode. Under torch.compile, compile the forward pass;
    its ``backward()`` is compiled with it.
    """
    if grad not in ("mean", "sum", None):
        wrong_value("grad", repr(grad), '"mean", "sum" or None')
    ranks = resolve_group(group)
    _check_src(src, ranks)
    leaves, spec = tree_flatten(params)
    for i, leaf in enumerate(leaves):
        check_tensor(f"params' leaf {i}", leaf, "of any shape")
        if grad is not None:
            check_gradient_summed(f"params' leaf {i}", leaf)
    _check_place(leaves, ranks)
    if ranks.size == 1 or not leaves:
        return params
    divisor = {"mean": ranks.size, "sum": 1, None: None}[grad]
    local = [local_part(leaf) for leaf in leaves]
    synced = ops.sync_params(local, src, divisor, ranks.size, ranks.name)
    return tree_unflatten([as_param(leaf, tensor) for leaf, tensor in zip(leaves, synced, strict=True)], spec)


def sync_params_(params: Params, group: GroupLike, src: int = 0) -> None:
    """Overwrite the parameters with those of rank ``src``, in place: once, after initialization.

    Args:
        params: an ``nn.Module`` (all its parameters and buffers, as in DDP), a mapping from names
            to tensors, or tensors; of any shapes, strides and dtypes, on one device; the same on
            all ranks. A tensor that occurs twice is sent once. For a DTensor, its local shard is
            synced.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the
            default group.
        src: the rank whose parameters all ranks get, counted in the group.

    Raises:
        TypeError, ValueError: as `sync_params` does; raised before a tensor is sent.
        MoECommError: the ranks' tensors differ in number, shape or dtype. It is the same on every
            rank. If one rank raises its own error and has a tensor on a device of the group, all
            other ranks raise a MoECommError, too.

    Backward: none. This function is not part of any graph.

    >>> sync_params_(torch.nn.Linear(2, 1), None)  # a single process has nothing to do

    Costs one small exchange that the host reads, and one broadcast for each 25 MiB of a dtype.

    Under torch.compile the ranks' tensors are not compared, because the host would have to read the comparison. If they differ,
    a broadcast hangs, fails or delivers wrong data.
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
        if not traced():
            check_same_kind("sync_params_", local, ranks)
        pending: tuple[list[Tensor], Tensor] | None = None
        for bucket in in_buckets(local, BUCKET_BYTES):
            mine = [local[i] for i in bucket]
            started = mine, ops.start_broadcast(mine, src, ranks.name)
            if pending is not None:
                _receive(*pending)  # while the next broadcast runs
            pending = started
        if pending is not None:
            _receive(*pending)


def _receive(tensors: list[Tensor], started: Tensor) -> None:
    copy_(tensors, wait(started).split([tensor.numel() for tensor in tensors]))


def _check_place(tensors: list[Tensor], group: Group) -> None:
    check_device(tensors)
    for tensor in tensors:
        check_sent("params", tensor)
        check_alike_over(tensor, group)


def _check_src(src: int, group: Group) -> None:
    if not isinstance(src, int) or isinstance(src, bool):
        wrong_type("src", type(src).__name__, "an int")
    if not 0 <= src < group.size:
        wrong_value("src", src, f"a rank of the group, 0 to {group.size - 1}")
