"""DTensors in, DTensors out: which placements a routed tensor may have, its local shard, and the way back.

Tokens are routed by the ranks that hold them: what goes in is the local shard, and nothing is gathered or reduced to change a placement.
A placement that would need that is an error which says what to do instead. On each dim of the tensor's mesh:

=================  ============================  ============================================  =======================================
placement          logits, experts, weights      x of `dispatch`, as the plan's ``like``       the y of `combine`
=================  ============================  ============================================  =======================================
``Shard(0)``       each rank has its own tokens  the same                                      ``Shard(0)``
``Replicate()``    the ranks route alike; not    the ranks send alike, and have the same rows  ``Replicate()``
                   where the plan's group spans
``Shard(d > 0)``   error: E or K is in parts     each rank's slice of the rows, [N, D / tp];   ``Shard(d)``
                                                 not where the plan's group spans
``Partial()``      error                         error                                         never
=================  ============================  ============================================  =======================================

A group spans a mesh dim if two of its ranks differ along it: the experts are then spread over these ranks, or their tokens counted
together, so that each must bring tokens of its own. From `dispatch` to `combine` the rows are a plain tensor: how many each rank has is
its own affair, which no DTensor can say (and one with a dynamic size has no backward under torch.compile, torch 2.13). How y is placed
stands in the plan's ``layout``, a DTensor without elements, so that the plan stays a pytree of tensors, ints and a name, and the graph
needs to know no mesh but from a tensor. A loss is Replicate on the mesh dims along which all ranks have the same one; on others each has
its addend of the mean, which is Partial, as DTensor's own means are.

Under torch.compile two things of torch 2.13 are to know, which hold for DTensor's own ops as well. A graph whose sizes are static is
used again where the whole size has changed and the local one has not: 12 tokens on 2 ranks after 11 give the first rank a y of 11. Where
the whole T changes from call to call, compile with ``dynamic=True``. And DTensor's own ops do not compile on a mesh that equals an
earlier one of the process: make each mesh once.
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
    """The local shard of a DTensor, whose gradient is the shard of its gradient; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def check_whole(argument: str, x: DTensor) -> None:
    """Raise if ``x`` is not whole in all dims but the tokens'."""
    whole = "slots" if argument in ("experts", "weights") else "E"
    for i, placement in enumerate(x.placements):
        if not (placement.is_replicate() or _dim(placement) == 0):
            _wrong_placement(
                argument, placement, i, f"Shard(0) or Replicate() there, with each token's {whole} whole: redistribute it first"
            )


def routed_like(named: Mapping[str, Tensor | None], group: Group) -> DTensor | None:
    """The last DTensor of these arguments, which are of the same tokens; None where there is none.

    Raises ValueError where one has a placement that cannot be routed, or two of them do not hold the same tokens.
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
    """How a plan's y will be placed, as a DTensor [T of all ranks, 0, ...]: as the first of ``like``; None where none is a DTensor.

    Raises ValueError where one has a placement that cannot be routed, or two of them do not hold the same tokens.
    """
    named = {f"like's leaf {i}" if i else "like": leaf for i, leaf in enumerate(like)}
    last = routed_like({"experts": experts, "weights": weights, **dict(reversed(named.items()))}, group)
    if last is None:
        return None
    empty = (0,) * (last.dim() - 1)
    here = to_local(last.detach())
    return _as_dtensor(here.new_empty(here.shape[0], *empty), last.device_mesh, last.placements, (last.shape[0], *empty))


def shard_of(argument: str, x: Tensor, layout: Tensor | None) -> Tensor:
    """The local shard of ``x``, which is placed as ``layout``; a plain tensor is one already."""
    if not isinstance(x, DTensor):
        return x
    if not isinstance(layout, DTensor):
        wrong_value(argument, _described(x), f"{argument}.to_local(), or the plan be made of DTensors: experts, weights or like")
    _check_hidden(argument, x)
    if x.device_mesh != layout.device_mesh or tuple(x.placements) != tuple(layout.placements):
        wrong_value(argument, _described(x), f"placed as what the plan was made of, {_described(layout)}; give it to plan as like")
    return x.to_local()


def check_rows(argument: str, rows: Tensor, layout: Tensor | None) -> None:
    """Raise where ``rows`` is a DTensor, or has not all the dims that are in slices."""
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
    """``y`` [T, ...] of this rank as a DTensor of the tokens, and with the placements, of ``like``; a plain tensor where that is none."""
    if not isinstance(like, DTensor):
        return y
    shape = [like.shape[0], *y.shape[1:]]
    for i, placement in enumerate(like.placements):
        if dim := _dim(placement):  # neither None nor that of the tokens
            shape[dim] = shape[dim] * like.device_mesh.size(i)
    return _as_dtensor(y, like.device_mesh, like.placements, shape)


def alike_over(x: DTensor, group: Group) -> tuple[bool, list[bool]]:
    """Whether the group is all ranks of the mesh of ``x`` along some dims; and of each dim whether its ranks have the group's result alike.

    The group spans no dim on which ``x`` is Replicate: on these, each group has a like one beside it.
    """
    mesh = x.device_mesh
    covered = _covered(mesh, group.name) if group.size > 1 else [False] * mesh.ndim
    alike = [covered[i] or mesh.size(i) == 1 or _dim(placement) != 0 for i, placement in enumerate(x.placements)]
    return any(covered), alike


def check_replicated(argument: str, x: DTensor, tokens: DTensor | None, group: Group) -> None:
    """Raise unless ``x`` is the same on all ranks of its mesh, and what the group makes of ``tokens`` on all ranks of theirs."""
    for i, placement in enumerate(x.placements):
        if not placement.is_replicate():
            _wrong_placement(argument, placement, i, "Replicate() there")
    if tokens is not None and not all(alike_over(tokens, group)[1]):
        wrong_value("group", f"of {group.size} ranks, with tokens {_described(tokens)}", "of all ranks that have different tokens")


def placed_mean(mine: Tensor, mesh: DeviceMesh, alike: Sequence[bool]) -> DTensor:
    """The mean of what the ranks have: Replicate on the dims where they have the same, on others the addends of the sum, Partial."""
    ranks = math.prod([mesh.size(i) for i, same in enumerate(alike) if not same])
    return DTensor.from_local(mine / ranks, mesh, [Replicate() if same else Partial() for same in alike], run_check=False)


def token_groups(x: DTensor) -> list[Group]:
    """The groups whose ranks hold different tokens."""
    mesh = x.device_mesh
    split = [i for i, placement in enumerate(x.placements) if _dim(placement) == 0 and mesh.size(i) > 1]
    return [Group(mesh.get_group(i).group_name, mesh.size(i)) for i in split]


def hidden_groups(layout: Tensor | None) -> list[Group]:
    """The groups whose ranks hold slices of the same rows."""
    if not isinstance(layout, DTensor):
        return []
    mesh = layout.device_mesh
    split = [i for i, placement in enumerate(layout.placements) if _dim(placement)]  # neither None nor that of the tokens
    return [Group(mesh.get_group(i).group_name, mesh.size(i)) for i in split]


def same_tokens(x: DTensor, other: DTensor) -> bool:
    """Whether two DTensors hold the same tokens on each rank."""
    if x.device_mesh != other.device_mesh or x.shape[0] != other.shape[0]:
        return False
    pairs = zip(x.placements, other.placements, strict=True)
    return all(a == b for a, b in pairs if _dim(a) == 0 or _dim(b) == 0)


def _dim(placement: Placement) -> int | None:
    """The dim that a placement shards; None where it shards none."""
    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def _check_hidden(argument: str, x: DTensor) -> None:
    """Raise if ``x`` is Partial somewhere, or in slices of different length."""
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
    """Raise unless the ranks of ``group`` hold different tokens."""
    if group.size == 1:
        return
    for i, spanned in enumerate(_spanned(x.device_mesh, group.name)):
        placement = x.placements[i]
        if spanned and _dim(placement) != 0:
            how = "as slice_scatter over that mesh dim makes it, " if placement.is_replicate() else ""
            _wrong_placement(argument, placement, i, f"Shard(0) there, {how}since each rank of the group brings tokens of its own")


@torch.compiler.assume_constant_result
def _spanned(mesh: DeviceMesh, group: str) -> list[bool]:
    """For each mesh dim, whether two ranks of the group differ along it. The same on all ranks, and a constant of the graph."""
    ranks = dist.get_process_group_ranks(process_group(group))
    places = [np.argwhere(mesh.mesh.numpy() == rank).flatten().tolist() for rank in ranks]
    return [len({place[i] for place in places if place}) > 1 for i in range(mesh.ndim)]


@torch.compiler.assume_constant_result
def _covered(mesh: DeviceMesh, group: str) -> list[bool]:
    """The mesh dims that the group spans, where its ranks are all those of the mesh along these dims; else none."""
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
