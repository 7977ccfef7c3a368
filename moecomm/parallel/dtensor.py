"""DTensors in and DTensors out: the allowed placements of routed tensors, their local shards, and the way back to a DTensor.

The ranks that hold the tokens route them. The functions take the local shard; they gather or reduce
nothing to change a placement. A placement that would need this raises an error that says what to do
instead. On each dim of the tensor's mesh:

=================  ==============================  ============================================  ================
placement          logits, experts, weights        x of `dispatch`, which is ``like`` of `plan`  y of `combine`
=================  ==============================  ============================================  ================
``Shard(0)``       each rank has its own tokens    each rank has its own tokens                  ``Shard(0)``
``Replicate()``    all ranks route the same        all ranks send the same and get the same      ``Replicate()``
                   tokens                          rows
``Shard(d > 0)``   error: E or K is sharded        each rank has its slice of the rows,          ``Shard(d)``
                                                   [N, D / tp]
``Partial()``      error                           error                                         never
=================  ==============================  ============================================  ================

A group spans a mesh dim if two of its ranks differ along it. The experts are then spread over these
ranks, or their tokens are counted together. So each rank must bring its own tokens: on a mesh dim
that the plan's group spans, only ``Shard(0)`` is allowed.

From `dispatch` to `combine` the rows are a plain tensor. Each rank has its own number of rows,
which a DTensor cannot express. A DTensor with a dynamic size also has no backward under
torch.compile (torch 2.13).

The plan's ``layout`` records how y is placed. It is a DTensor without elements, so that the plan
stays a pytree of tensors, ints and a name. The graph then gets each mesh from a tensor.

A loss is Replicate on the mesh dims along which all ranks have the same loss. On other dims it is
Partial, as DTensor's own means are: each rank has its addend of the mean.

Two limits of torch 2.13 under torch.compile hold here, and for DTensor's own ops as well:

- A graph with static sizes is used again when the whole size has changed but the local size has
  not. For example, 12 tokens on 2 ranks after 11 give the first rank a y of 11. If the whole T
  changes from call to call, compile with ``dynamic=True``.
- DTensor's own ops do not compile on a mesh that equals an earlier mesh of the process. Make each
  mesh once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moecomm.errors import wrong_value
from moecomm.ops.base.process_group import process_group
from moecomm.parallel.group import Group


def to_local(x: Tensor) -> Tensor:
    """The local shard of a DTensor; any other tensor unchanged.

    Backward: the gradient of the shard is the local shard of the DTensor's gradient.
    """
    return x.to_local() if isinstance(x, DTensor) else x


def check_whole(argument: str, x: DTensor) -> None:
    """Raise ValueError if ``x`` is Partial, or sharded along a dim other than the tokens'."""
    whole = "slots" if argument in ("experts", "weights") else "E"
    for i, placement in enumerate(x.placements):
        if not (placement.is_replicate() or _dim(placement) == 0):
            _wrong_placement(
                argument, placement, i, f"Shard(0) or Replicate() there, with each token's {whole} whole: redistribute it first"
            )


def routed_like(named: Mapping[str, Tensor | None], group: Group) -> DTensor | None:
    """The last DTensor among these arguments, or None. All of them hold the same tokens.

    Raises ValueError if a placement cannot be routed, or if two DTensors do not hold the same
    tokens.
    """
    given = {name: x for name, x in named.items() if isinstance(x, DTensor)}
    for name, x in given.items():
        if name.startswith("like"):
            _check_hidden(name, x)
        else:
            check_whole(name, x)
        _check_spanned(name, x, group)
        first_name, first = next(iter(given.items()))
        if not same_tokens(x, first):
            wrong_value(name, _described(x), f"sharded over tokens as {first_name} is, {_described(first)}")
    return list(given.values())[-1] if given else None


def make_layout(experts: Tensor, weights: Tensor, like: Sequence[Tensor], group: Group) -> Tensor | None:
    """The layout of a plan: how its y will be placed, as a DTensor [T of all ranks, 0, ...]; None without a DTensor.

    It is placed as the first DTensor of ``like``. If ``like`` has none, it is placed as
    ``weights``, or else as ``experts``.

    Raises ValueError if a placement cannot be routed, or if two DTensors do not hold the same
    tokens.
    """
    named = {f"like's leaf {i}" if i else "like": leaf for i, leaf in enumerate(like)}
    last = routed_like({"experts": experts, "weights": weights, **dict(reversed(named.items()))}, group)
    if last is None:
        return None
    empty = (0,) * (last.dim() - 1)
    here = to_local(last.detach())
    return _as_dtensor(here.new_empty(here.shape[0], *empty), last.device_mesh, last.placements, (last.shape[0], *empty))


def shard_of(argument: str, x: Tensor, layout: Tensor | None) -> Tensor:
    """The local shard of ``x``; a plain ``x`` unchanged.

    Raises ValueError if ``x`` is a DTensor that is not placed as ``layout``, or if ``layout`` is no
    DTensor.
    """
    if not isinstance(x, DTensor):
        return x
    if not isinstance(layout, DTensor):
        wrong_value(argument, _described(x), f"{argument}.to_local(), or the plan be made of DTensors: experts, weights or like")
    _check_hidden(argument, x)
    if x.device_mesh != layout.device_mesh or tuple(x.placements) != tuple(layout.placements):
        wrong_value(argument, _described(x), f"placed as what the plan was made of, {_described(layout)}; give it to plan as like")
    return x.to_local()


def check_rows(argument: str, rows: Tensor, layout: Tensor | None) -> None:
    """Raise ValueError if ``rows`` is a DTensor, or if it lacks a dim that ``layout`` shards."""
    if isinstance(rows, DTensor):
        wrong_value(argument, _described(rows), "a plain tensor, this rank's rows, as dispatch gives them")
    if not isinstance(layout, DTensor):
        return
    for placement in layout.placements:
        dim = _dim(placement)
        if dim is not None and dim >= rows.dim():
            wrong_value(
                argument, f"of shape {list(rows.shape)}", f"of {dim + 1} dims or more, as the plan was made of {_described(layout)}"
            )


def placed(y: Tensor, like: Tensor | None) -> Tensor:
    """This rank's ``y`` [T, ...] as a DTensor with the tokens and placements of ``like``; unchanged if ``like`` is no DTensor."""
    if not isinstance(like, DTensor):
        return y
    shape = [like.shape[0], *y.shape[1:]]
    for i, placement in enumerate(like.placements):
        if dim := _dim(placement):  # sharded, but not along the tokens
            shape[dim] = shape[dim] * like.device_mesh.size(i)
    return _as_dtensor(y, like.device_mesh, like.placements, shape)


def alike_over(x: DTensor, group: Group) -> tuple[bool, list[bool]]:
    """Whether the group covers mesh dims of ``x``, and for each mesh dim whether its ranks have the same result of the group.

    A group covers mesh dims of ``x`` if its ranks are all ranks of the mesh along these dims. It
    spans no dim on which ``x`` is Replicate: along such a dim, the groups beside it have the same
    tokens.
    """
    mesh = x.device_mesh
    covered = _covered(mesh, group.name) if group.size > 1 else [False] * mesh.ndim
    alike = [covered[i] or mesh.size(i) == 1 or _dim(placement) != 0 for i, placement in enumerate(x.placements)]
    return any(covered), alike


def check_replicated(argument: str, x: DTensor, tokens: DTensor | None, group: Group) -> None:
    """Raise ValueError unless ``x``, and the group's result for ``tokens``, are the same on all ranks of their meshes."""
    for i, placement in enumerate(x.placements):
        if not placement.is_replicate():
            _wrong_placement(argument, placement, i, "Replicate() there")
    if tokens is not None and not all(alike_over(tokens, group)[1]):
        wrong_value("group", f"of {group.size} ranks, with tokens {_described(tokens)}", "of all ranks that have different tokens")


def placed_mean(mine: Tensor, mesh: DeviceMesh, alike: Sequence[bool]) -> DTensor:
    """The mean of the ranks' values ``mine``, as a DTensor.

    It is Replicate on mesh dims along which the ranks have the same value. On other dims it is
    Partial: each rank has its addend of the sum.
    """
    ranks = math.prod([mesh.size(i) for i, same in enumerate(alike) if not same])
    return DTensor.from_local(mine / ranks, mesh, [Replicate() if same else Partial() for same in alike], run_check=False)


def token_groups(x: DTensor) -> list[Group]:
    """The groups whose ranks hold different tokens of ``x``, one per mesh dim."""
    mesh = x.device_mesh
    split = [i for i, placement in enumerate(x.placements) if _dim(placement) == 0 and mesh.size(i) > 1]
    return [Group(mesh.get_group(i).group_name, mesh.size(i)) for i in split]


def hidden_groups(layout: Tensor | None) -> list[Group]:
    """The groups whose ranks hold slices of the same rows, one per mesh dim."""
    if not isinstance(layout, DTensor):
        return []
    mesh = layout.device_mesh
    split = [i for i, placement in enumerate(layout.placements) if _dim(placement)]  # sharded, but not along the tokens
    return [Group(mesh.get_group(i).group_name, mesh.size(i)) for i in split]


def same_tokens(x: DTensor, other: DTensor) -> bool:
    """Whether two DTensors hold the same tokens on each rank."""
    if x.device_mesh != other.device_mesh or x.shape[0] != other.shape[0]:
        return False
    pairs = zip(x.placements, other.placements, strict=True)
    return all(a == b for a, b in pairs if _dim(a) == 0 or _dim(b) == 0)


def _dim(placement: Placement) -> int | None:
    """The dim that a placement shards, or None."""
    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def _check_hidden(argument: str, x: DTensor) -> None:
    """Raise ValueError if ``x`` is Partial on a mesh dim, or if its slices differ in length."""
    for i, placement in enumerate(x.placements):
        dim = _dim(placement)
        if placement.is_replicate() or dim == 0:
            continue
        if dim is None:
            _wrong_placement(argument, placement, i, "Shard or Replicate() there: redistribute it first, or each rank would send its part")
        size = x.shape[dim]
        if size % x.device_mesh.size(i):
            wrong_value(
                argument, f"{placement!r} of {size} on dim {i} of its mesh", f"a multiple of its {x.device_mesh.size(i)} ranks long there"
            )


def _check_spanned(argument: str, x: DTensor, group: Group) -> None:
    """Raise ValueError unless the ranks of ``group`` hold different tokens: Shard(0) on each mesh dim that it spans."""
    if group.size == 1:
        return
    for i, spanned in enumerate(_spanned(x.device_mesh, group.name)):
        placement = x.placements[i]
        if spanned and _dim(placement) != 0:
            how = "as slice_scatter over that mesh dim makes it, " if placement.is_replicate() else ""
            _wrong_placement(argument, placement, i, f"Shard(0) there, {how}since each rank of the group brings tokens of its own")


@torch.compiler.assume_constant_result
def _spanned(mesh: DeviceMesh, group: str) -> list[bool]:
    """For each mesh dim, whether two ranks of the group differ along it. It is the same on all ranks, and a constant of the graph."""
    ranks = dist.get_process_group_ranks(process_group(group))
    places = [np.argwhere(mesh.mesh.numpy() == rank).flatten().tolist() for rank in ranks]
    return [len({place[i] for place in places if place}) > 1 for i in range(mesh.ndim)]


@torch.compiler.assume_constant_result
def _covered(mesh: DeviceMesh, group: str) -> list[bool]:
    """For each mesh dim, whether the group spans it.

    All are False unless the group's ranks are all ranks of the mesh along the dims that it spans.
    """
    ranks = dist.get_process_group_ranks(process_group(group))
    spanned = _spanned(mesh, group)
    line = math.prod(mesh.size(i) for i in range(mesh.ndim) if spanned[i])
    within = set(ranks) <= set(mesh.mesh.numpy().flatten().tolist())
    return spanned if within and line == len(ranks) else [False] * mesh.ndim


def _as_dtensor(y: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return DTensor.from_local(y, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


def _described(x: DTensor) -> str:
    return f"a DTensor placed {tuple(x.placements)} on a mesh of {tuple(x.device_mesh.shape)}"


def _wrong_placement(argument: str, placement: Placement, i: int, must: str) -> NoReturn:
    wrong_value(argument, f"{placement!r} on dim {i} of its mesh", must)
