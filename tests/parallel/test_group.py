"""Whatever names a group of ranks, and what names none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moecomm.functional as mf
from moecomm.ops.base.process_group import process_group
from moecomm.parallel.group import ALONE, resolve_group
from tests.spawn import run_ranks


def named_here() -> None:
    assert resolve_group(None) == (dist.group.WORLD.group_name, 4)
    assert resolve_group(dist.group.WORLD) == resolve_group(None)
    assert resolve_group("") == ALONE

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    for dim, name in enumerate(("dp", "ep")):
        of_dim = mesh.get_group(name)
        for group in (mesh[name], (mesh, dim), of_dim, of_dim.group_name):
            assert resolve_group(group) == (of_dim.group_name, 2)

    some = dist.new_group([1, 2, 3])
    names: list[Any] = [None] * 4
    dist.all_gather_object(names, None if dist.get_rank() == 0 else some.group_name)
    if dist.get_rank() == 0:
        assert_raises(ValueError, "group was a group that this rank is not in; it must be", some)
        assert_raises(ValueError, f"group was '{names[1]}'; it must be the name of an initialised process group that contains", names[1])
    else:
        assert resolve_group(some) == resolve_group(some.group_name) == (names[1], 3)

    assert_raises(ValueError, "group was a DeviceMesh of 2 dims; it must be a 1-D DeviceMesh", mesh)
    assert_raises(ValueError, "group was 'nobody'; it must be the name of an initialised process group", "nobody")
    assert_raises(TypeError, "group was a tuple", (mesh, "ep", 1))
    assert_raises(TypeError, "group was int; it must be a ProcessGroup", 4)


def assert_raises(kind: type[Exception], message: str, group: Any) -> None:
    with pytest.raises(kind) as raised:
        resolve_group(group)
    assert str(raised.value).startswith(message)


def test_a_group_is_known_by_its_process_group_mesh_mesh_dim_and_name() -> None:
    run_ranks(named_here, 4)


def shared_here() -> list[str]:
    """The names of this rank's groups along the dims of two meshes, made anew once."""
    with torch.distributed.config.patch(compile_on_one_rank=True):
        for again in range(2):
            meshes = [init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep")) for _ in range(2)]
            named = [(resolve_group(mesh["ep"]), mesh.get_group("ep")) for mesh in (*meshes, meshes[0])]
            named += [(resolve_group((mesh, 0)), mesh.get_group(0)) for mesh in meshes]
            for group, of_dim in named:
                assert process_group(group.name) is of_dim
                everyone = mf.slice_gather(torch.tensor([dist.get_rank()]), group.name)
                assert everyone.tolist() == dist.get_process_group_ranks(of_dim)
            names = [group.name for group, _ in named]
            assert names[0] == names[2]
            assert len(set(names)) == 4
            if not again:
                dist.barrier()
                for mesh in meshes:
                    for dim in (0, 1):
                        dist.destroy_process_group(mesh.get_group(dim))
    return names


def test_groups_along_a_dim_have_one_name_on_all_ranks_where_torch_compiles_for_all_ranks() -> None:
    first, *others = run_ranks(shared_here, 4)
    assert others == [first] * 3


def test_a_process_without_a_group_is_alone() -> None:
    assert not dist.is_initialized()
    assert resolve_group(None) == resolve_group("") == ALONE == ("", 1)
    assert_raises(ValueError, "group was 'nobody'; it must be the name of an initialised process group", "nobody")
