"""Whatever names a group of ranks -> its name and its size."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moecomm.errors import wrong_type, wrong_value
from moecomm.ops.base.process_group import process_group

GroupLike: TypeAlias = dist.ProcessGroup | DeviceMesh | tuple[DeviceMesh, int] | str | None
"""What every function of moecomm takes as ``group``: None is the default group, or this process alone where none is initialised."""


class Group(NamedTuple):
    """A group of ranks, as the ops take it: rank numbers are looked up where the op runs and never enter a graph."""

    name: str  # "" is this process alone
    size: int


ALONE = Group("", 1)


def resolve_group(group: GroupLike) -> Group:
    """The name and size of ``group``.

    Raises TypeError for what names no group, ValueError for a mesh of several dims, and for a group this rank is not in.
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):  # Dynamo of torch 2.11 cannot compare dist.group.WORLD with None
            return ALONE
        return _named(dist.group.WORLD)  # type: ignore[arg-type]
    if isinstance(group, str):
        return Group(group, _size_by_name(group)) if group else ALONE
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            wrong_value("group", f"a DeviceMesh of {group.ndim} dims", 'a 1-D DeviceMesh, such as mesh["ep"], or (mesh, dim)')
        return _along(group, 0)
    if isinstance(group, tuple):
        if len(group) != 2 or not isinstance(group[0], DeviceMesh) or not isinstance(group[1], int):
            wrong_type("group", f"a tuple {group}", "(DeviceMesh, int)")
        return _along(*group)
    if isinstance(group, dist.ProcessGroup):
        return _named(group)
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        wrong_value("group", "a group that this rank is not in", "a group that contains the calling rank")
    wrong_type("group", type(group).__name__, "a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name or None")


@torch.compiler.assume_constant_result
def _size_by_name(name: str) -> int:
    """Traced as a constant: Dynamo cannot look into the registry of names, and a name's size does not change."""
    try:
        return process_group(name).size()
    except RuntimeError:
        wrong_value("group", repr(name), "the name of an initialised process group that contains the calling rank")


def _named(group: dist.ProcessGroup) -> Group:
    return Group(group.group_name, group.size())


def _along(mesh: DeviceMesh, dim: int) -> Group:
    """This rank's group along a dim of a mesh.

    A graph holds its name, and torch names the groups along one dim differently. With torch's own switch for graphs that serve all ranks,
    it is known by a name that they share.
    """
    group = _named(mesh.get_group(dim))
    if mesh.mesh_dim_names is None or not torch.distributed.config.compile_on_one_rank:
        return group
    return Group(_shared_name(group.name, mesh.mesh_dim_names[dim]), group.size)


@torch.compiler.assume_constant_result
def _shared_name(name: str, dim: str) -> str:
    """A second name of the group in torch's registry: its dim's, with a number where groups of several meshes have one dim's name.

    Ranks that name their groups in one order have the same names. Those of groups that were destroyed are given anew.
    """
    group, number = process_group(name), 0
    while True:
        shared = f"{dim} of mesh {number}"
        try:
            known = process_group(shared)
        except RuntimeError:  # nobody's, or that of a group that is no more
            known = None
        if known is None or known not in dist.distributed_c10d._world.pg_map:
            torch._C._distributed_c10d._unregister_process_group(shared)  # type: ignore[arg-type]
            torch._C._distributed_c10d._register_process_group(shared, group)  # type: ignore[arg-type]
            return shared
        if known is group:
            return shared
        number += 1
