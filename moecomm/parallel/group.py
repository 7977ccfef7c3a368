"""resolve_group: the name and size of a group, which the caller may give in any form that torch has for it."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moecomm.errors import wrong_type, wrong_value
from moecomm.ops.base.process_group import process_group

GroupLike: TypeAlias = dist.ProcessGroup | DeviceMesh | tuple[DeviceMesh, int] | str | None
"""What every function of moecomm takes as ``group``. None is the default group, or this process alone if no group is initialized."""


class Group(NamedTuple):
    """A group of ranks, as the ops take it: its name and its size.

    An op looks up rank numbers when it runs, so that they never enter a graph.
    """

    name: str  # "" is this process alone
    size: int


ALONE = Group("", 1)


def resolve_group(group: GroupLike) -> Group:
    """The name and size of ``group``.

    Raises:
        TypeError: ``group`` does not name a group.
        ValueError: ``group`` is a mesh of several dims, or a group that this rank is not in.
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):  # Dynamo of torch 2.11 cannot compare dist.group.WORLD with None
            return ALONE
        return _named(dist.group.WORLD)  # type: ignore[arg-type]
    if isinstance(group, str):
        return Group(group, _size_by_name(group)) if group else ALONE
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            must = 'a 1-D DeviceMesh, such as mesh["ep"], or (mesh, dim)'
            wrong_value("group", f"a DeviceMesh of {group.ndim} dims", must, _dim_instead(group.mesh_dim_names))
        return _along(group, 0)
    if isinstance(group, tuple):
        if len(group) != 2 or not isinstance(group[0], DeviceMesh) or not isinstance(group[1], int):
            named = len(group) == 2 and isinstance(group[1], str)
            wrong_type(
                "group", f"a tuple {group}", "(DeviceMesh, int)", f'Take the dim by its name: group=mesh["{group[1]}"]' if named else ""
            )
        return _along(*group)
    if isinstance(group, dist.ProcessGroup):
        return _named(group)
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        wrong_value("group", "a group that this rank is not in", "a group that contains the calling rank")
    instead = "Make a group of these ranks first: group=torch.distributed.new_group(group)" if isinstance(group, list) else ""
    wrong_type("group", type(group).__name__, "a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name or None", instead)


def _dim_instead(names: tuple[str, ...] | None) -> str:
    if names is None:
        return "Choose the dim of the experts: group=(mesh, 1)"
    return f'Choose the dim of the experts: group=mesh["{"ep" if "ep" in names else names[-1]}"]'


@torch.compiler.assume_constant_result
def _size_by_name(name: str) -> int:
    """The size of the group of this name, traced as a constant.

    Dynamo cannot look into the registry of names, and the size of a name does not change.
    """
    try:
        return process_group(name).size()
    except RuntimeError:
        must = "the name of an initialised process group that contains the calling rank"
        wrong_value("group", repr(name), must, f'Take the dim of a mesh from the mesh: group=mesh["{name}"]')


def _named(group: dist.ProcessGroup) -> Group:
    return Group(group.group_name, group.size())


def _along(mesh: DeviceMesh, dim: int) -> Group:
    """This rank's group along one dim of a mesh.

    A graph holds the group's name, and torch gives the groups along one dim different names. With
    ``torch.distributed.config.compile_on_one_rank``, torch's own switch for graphs that serve all
    ranks, these groups get a name that they share. The mesh must have named dims for that.
    """
    group = _named(mesh.get_group(dim))
    if mesh.mesh_dim_names is None or not torch.distributed.config.compile_on_one_rank:
        return group
    return Group(_shared_name(group.name, mesh.mesh_dim_names[dim]), group.size)


@torch.compiler.assume_constant_result
def _shared_name(name: str, dim: str) -> str:
    """Register a second name of the group in torch's registry, and return it: the same name on all ranks along this dim.

    It is the name of the dim with a number. The number tells groups apart whose meshes have a dim
    of the same name. Ranks that name their groups in the same order get the same names. The names
    of destroyed groups are used again.
    """
    group, number = process_group(name), 0
    while True:
        shared = f"{dim} of mesh {number}"
        try:
            known = process_group(shared)
        except RuntimeError:  # no group has this name, or its group was destroyed
            known = None
        if known is None or known not in dist.distributed_c10d._world.pg_map:
            torch._C._distributed_c10d._unregister_process_group(shared)  # type: ignore[arg-type]
            torch._C._distributed_c10d._register_process_group(shared, group)  # type: ignore[arg-type]
            return shared
        if known is group:
            return shared
        number += 1
