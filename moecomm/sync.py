"""sync_params, sync_params_ and sync_grads_: parameters alike on all ranks of a group, and their gradients added up."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from moecomm.errors import MoECommError, check_tensor, wrong_type, wrong_value
from moecomm.group import Group, GroupLike, process_group, resolve_group
from moecomm.ops import sync as ops
from moecomm.ops.exchange import wait
from moecomm.ops.slice import all_gathered, start_all_gather
from moecomm.slices import mesh_dim

Tree = TypeVar("Tree")
Params: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
"""What the in-place functions take: a module, a mapping such as ``dict(model.named_parameters())``, tensors, or one tensor."""

BUCKET_BYTES = 25 * 2**20  # of one message: what DDP's default is


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
    local = [leaf.to_local() if isinstance(leaf, DTensor) else leaf for leaf in leaves]
    synced = ops.sync_params(local, src, divisor, ranks.size, ranks.name)
    return tree_unflatten([_as(leaf, tensor) for leaf, tensor in zip(leaves, synced, strict=True)], spec)


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

    Raises as `sync_params` does, before anything is sent; `MoECommError`, alike on every rank, where the ranks' tensors differ in
    number, shape or dtype.

    >>> sync_params_(torch.nn.Linear(2, 1), None)  # a single process has nothing to do
    """
    ranks = resolve_group(group)
    _check_src(src, ranks)
    tensors = _tensors(params, buffers=True)
    _check_place(tensors, ranks)
    if ranks.size == 1 or not tensors:
        return
    with torch.no_grad():
        local = [_local(tensor) for tensor in tensors]
        _check_alike(local, ranks)
        pending: tuple[list[Tensor], Tensor] | None = None
        for bucket in _buckets(local, BUCKET_BYTES):
            mine = [local[i] for i in bucket]
            started = mine, ops.start_broadcast(mine, src, ranks.name)
            if pending is not None:
                _receive(*pending)  # while the next one is on its way
            pending = started
        if pending is not None:
            _receive(*pending)


def sync_grads_(
    params: Params,
    group: GroupLike,
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
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.
        reduce: "mean" or "sum" of the ranks' gradients.
        scale: for the mean, whether each rank's gradient is divided by P "before" they are added up, or their sum "after". They differ in
            rounding, and where the sum is too large for float32.
        bucket_bytes: how many bytes of gradients of a dtype are sent in one message; it does not change the result.

    The gradients are added up in the order of the ranks in float32 (float64 for float64), and rounded once: the same bits on all ranks,
    run after run.

    Costs an all-to-all and an all-gather for each bucket. All buckets' all-to-alls are started before the first is waited for. The host
    reads from the device only on a rank that lacks a gradient.

    Backward: none; it is no part of any graph.

    Raises TypeError where ``params`` holds anything but tensors, a gradient is sparse or ``bucket_bytes`` no int; ValueError where
    ``reduce`` or ``scale`` is not one of the two, ``bucket_bytes`` is below 1, the tensors are on several devices, or a DTensor is
    sharded over the group.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> (3 * weight).sum().backward()
    >>> sync_grads_([weight], None)  # the mean over a single process
    >>> weight.grad
    tensor([3., 3.])
    """
    if reduce not in ("mean", "sum"):
        wrong_value("reduce", repr(reduce), '"mean" or "sum"')
    if scale not in ("before", "after"):
        wrong_value("scale", repr(scale), '"before" or "after"')
    if not isinstance(bucket_bytes, int):
        wrong_type("bucket_bytes", type(bucket_bytes).__name__, "an int")
    if bucket_bytes < 1:
        wrong_value("bucket_bytes", bucket_bytes, "at least 1")
    ranks = resolve_group(group)
    tensors = [param for param in _tensors(params, buffers=False) if param.requires_grad]
    _check_place(tensors, ranks)
    for param in tensors:
        if param.grad is not None and param.grad.layout != torch.strided:
            wrong_type("params", f"a tensor with a gradient of layout {param.grad.layout}", "tensors with dense gradients")
    if ranks.size == 1:
        return
    with torch.no_grad():
        grads = [_gradient(param) for param in tensors]
        buckets = _buckets(grads, bucket_bytes)
        sent = [[*(grads[i] for i in bucket), _flags([tensors[i] for i in bucket], grads[bucket[0]])] for bucket in buckets]
        flats = ops.all_reduce(sent, ranks.size if reduce == "mean" else 1, ranks.size, ranks.name, scale == "before")
        for bucket, flat in zip(buckets, flats, strict=True):
            _write_back([tensors[i] for i in bucket], [grads[i] for i in bucket], flat)


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
    _copy(grads, pieces)  # the parameters' own gradients, and the zeros of those that had none
    missing = [i for i, param in enumerate(params) if param.grad is None]
    somewhere = flags.tolist() if missing else []  # a host sync, on this rank only
    for i in missing:
        if somewhere[i]:
            params[i].grad = _as(params[i], grads[i])


def _receive(tensors: list[Tensor], started: Tensor) -> None:
    _copy(tensors, wait(started).split([tensor.numel() for tensor in tensors]))


def _copy(tensors: list[Tensor], pieces: Sequence[Tensor]) -> None:
    torch._foreach_copy_(tensors, [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)])


def _buckets(tensors: Sequence[Tensor], most: int) -> list[list[int]]:
    """The indices of tensors of one dtype that go into one message of at most ``most`` bytes, or of one tensor."""
    buckets: list[list[int]] = []
    for indices in ops.by_dtype(tensors):
        room = -1
        for i in indices:
            if tensors[i].nbytes > room:
                buckets.append([])
                room = most
            buckets[-1].append(i)
            room -= tensors[i].nbytes
    return buckets


def _gradient(param: Tensor) -> Tensor:
    """The local part of the gradient; zeros in its place where there is none."""
    if param.grad is not None:
        return _local(param.grad)
    return torch.zeros_like(_local(param), dtype=param.grad_dtype or param.dtype)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as(param: Tensor, local: Tensor) -> Tensor:
    """``local`` as the DTensor that ``param`` is, if it is one."""
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride())


def _tensors(params: Params, buffers: bool) -> list[Tensor]:
    """The tensors that ``params`` stands for, each of them once."""
    if isinstance(params, nn.Module):
        named: Mapping[Any, Tensor] = {**dict(params.named_parameters()), **(dict(params.named_buffers()) if buffers else {})}
    elif isinstance(params, Mapping):
        named = params
    elif isinstance(params, Iterable) and not isinstance(params, str):
        named = dict(enumerate([params] if isinstance(params, Tensor) else params))
    else:
        wrong_type("params", type(params).__name__, "an nn.Module, a mapping to tensors, or tensors")
    for name, tensor in named.items():
        check_tensor(f"params[{name!r}]", tensor, "of any shape")
    return list({id(tensor): tensor for tensor in named.values()}.values())


def _check_place(tensors: Sequence[Tensor], group: Group) -> None:
    """Raise where tensors are on several devices, or the ranks of the group hold different shards of one."""
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            wrong_value("params", f"on {tensors[0].device} and on {tensor.device}", "on one device")
        if isinstance(tensor, DTensor) and (i := mesh_dim(tensor, group)) is not None and not tensor.placements[i].is_replicate():
            wrong_value("params", f"a DTensor with {tensor.placements[i]!r} on the group's mesh dim {i}", "one with Replicate() there")


def _check_src(src: int, group: Group) -> None:
    if not isinstance(src, int) or isinstance(src, bool):
        wrong_type("src", type(src).__name__, "an int")
    if not 0 <= src < group.size:
        wrong_value("src", src, f"a rank of the group, 0 to {group.size - 1}")


def _check_alike(tensors: list[Tensor], group: Group) -> None:
    """Raise, alike on every rank, where the ranks' tensors do not fit together; one small exchange, read by the host."""
    mine = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors]
    digest = torch.tensor([zlib.crc32(repr(mine).encode())], device=tensors[0].device)  # [1]
    digests = all_gathered(start_all_gather(digest, group.size, group.name), digest, group.size).tolist()  # [P]
    if len(set(digests)) > 1:
        ranks: list[Any] = [None] * group.size
        dist.all_gather_object(ranks, mine, process_group(group.name))
        at = next(i for i, what in enumerate(zip_longest(*ranks)) if len(set(what)) > 1)
        passed = ", ".join(f"{theirs[at] if at < len(theirs) else 'missing'} on rank {rank}" for rank, theirs in enumerate(ranks))
        raise MoECommError(f"params' tensor {at} was {passed} of the group; it must be of the same dtype and shape on every rank")
