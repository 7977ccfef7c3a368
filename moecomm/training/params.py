"""Shared by the functions on a model's parameters: which tensors ``params`` holds, their names, and the group of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecomm.errors import LISTED, SUMMED, check_tensor, wrong_type, wrong_value
from moecomm.ops.exchange.sync_params import by_dtype
from moecomm.parallel.group import Group, resolve_group
from moecomm.parallel.slices import mesh_dim

BUCKET_BYTES = 25 * 2**20  # per message; the same as DDP's default

Params: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
"""What the in-place functions take: a module, a mapping such as ``dict(model.named_parameters())``, tensors, or one tensor."""


def named_tensors(params: Params, buffers: bool = False) -> dict[str, Tensor]:
    """The tensors of ``params`` by name, each of them once. Tensors without a name are "0", "1", ..."""
    named: Mapping[Any, Tensor]
    if isinstance(params, nn.Module):
        named = {**dict(params.named_parameters()), **(dict(params.named_buffers()) if buffers else {})}
    elif isinstance(params, Mapping):
        named = params
    elif isinstance(params, Iterable) and not isinstance(params, str):
        named = dict(enumerate([params] if isinstance(params, Tensor) else params))
    else:
        wrong_type("params", type(params).__name__, "an nn.Module, a mapping to tensors, or tensors")
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in named.items():
        check_tensor(f"params[{name!r}]", tensor, "of any shape")
        once.setdefault(id(tensor), (str(name), tensor))
    return dict(once.values())


def named_groups(groups: Mapping[Any, Any], several: bool = False) -> list[list[Group]]:
    """The groups of each key. With ``several``, a value may also be a list of groups."""
    lists = [choice if several and isinstance(choice, list) else [choice] for choice in groups.values()]
    return [[resolve_group(group) for group in choice] for choice in lists]


def chosen_groups(argument: str, named: Mapping[str, Tensor], groups: Mapping[Any, Any], several: bool = False) -> list[list[Group]]:
    """For each tensor, the groups of its first matching key: the tensor itself, or a pattern that matches its name.

    Patterns are those of `fnmatch`: "*" stands for any characters, also for dots. Raises ValueError
    if a tensor has no match, or if a key is no tensor's first match.
    """
    resolved = named_groups(groups, several)
    chosen = []
    for name, first in zip(named, first_matches(argument, named, list(groups)), strict=True):
        if first is None:
            shown = ", ".join(map(_shown, groups))
            wrong_value(argument, f"a mapping of {shown}", f"one with a key that matches {name!r}, as every parameter needs one")
        chosen.append(resolved[first])
    return chosen


def first_matches(argument: str, named: Mapping[str, Tensor], keys: Sequence[str | Tensor]) -> list[int | None]:
    """For each tensor, the index of its first matching key: the tensor itself, or a pattern that matches its name; None without one.

    Raises ValueError if a key is no tensor's first match.
    """
    for key in keys:
        if not isinstance(key, str | Tensor):
            wrong_type(f"a key of {argument}", type(key).__name__, "a pattern of names, or a parameter")
    first = [next((i for i, key in enumerate(keys) if _matches(key, name, tensor)), None) for name, tensor in named.items()]
    for i, key in enumerate(keys):
        if i not in first:
            names = ", ".join(map(repr, list(named)[:3])) + (", ..." if len(named) > 3 else "")
            wrong_value(f"{argument}[{_shown(key)}]", "no parameter's first match", f"that of at least one of {names or 'no parameters'}")
    return first


def _matches(key: str | Tensor, name: str, tensor: Tensor) -> bool:
    return _fits(name, key) if isinstance(key, str) else key is tensor


@torch.compiler.assume_constant_result
def _fits(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern. To a compiler it is a constant: Dynamo cannot trace `fnmatch`."""
    return fnmatchcase(name, pattern)


def _shown(key: str | Tensor) -> str:
    return repr(key) if isinstance(key, str) else f"a tensor of shape {list(key.shape)}"


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(param: Tensor) -> Tensor:
    """The local part of the gradient; zeros if there is no gradient."""
    if param.grad is not None:
        return local_part(param.grad)
    return torch.zeros_like(local_part(param), dtype=_gradient_dtype(param))


@torch.compiler.assume_constant_result
def _gradient_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the gradient that ``param`` may get, traced as a constant: Dynamo cannot trace ``grad_dtype`` (torch 2.13)."""
    return param.grad_dtype or param.dtype


def check_dense_gradient(param: Tensor) -> None:
    """Raise TypeError if a parameter's gradient is sparse, or of a dtype that is not added up."""
    dtype = _gradient_dtype(param) if param.grad is None else param.grad.dtype
    if dtype not in SUMMED and not dtype.is_complex:
        wrong_type("params", f"a tensor with a gradient of dtype {dtype}", f"tensors with gradients of dtype {LISTED}, or complex")
    if param.grad is not None and param.grad.layout != torch.strided:
        wrong_type("params", f"a tensor with a gradient of layout {param.grad.layout}", "tensors with dense gradients")


def as_param(param: Tensor, local: Tensor) -> Tensor:
    """``local`` as a DTensor like ``param``; unchanged if ``param`` is not a DTensor."""
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride())


def check_device(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            wrong_value("params", f"on {tensors[0].device} and on {tensor.device}", "on one device")
    if tensors and tensors[0].is_meta:
        wrong_value("params", "on the meta device", "on a device that holds its values: call the module's to_empty first")


def check_alike_over(tensor: Tensor, group: Group) -> None:
    """Raise ValueError if the ranks of the group hold different shards of the tensor."""
    if group.size == 1 or not isinstance(tensor, DTensor):  # a group of one rank holds one shard, and may be the group of several mesh dims
        return
    if (i := mesh_dim(tensor, group)) is not None and not tensor.placements[i].is_replicate():
        wrong_value("params", f"a DTensor with {tensor.placements[i]!r} on the group's mesh dim {i}", "one with Replicate() there")


def in_buckets(tensors: Sequence[Tensor], most: int) -> list[list[int]]:
    """The indices of the tensors of each message: tensors of one dtype, of at most ``most`` bytes together.

    A tensor of more bytes has a message of its own.
    """
    buckets: list[list[int]] = []
    for indices in by_dtype(tensors):
        room = -1
        for i in indices:
            if tensors[i].nbytes > room:
                buckets.append([])
                room = most
            buckets[-1].append(i)
            room -= tensors[i].nbytes
    return buckets


def copy_(tensors: list[Tensor], pieces: Sequence[Tensor]) -> None:
    """Overwrite each tensor with a flat piece of as many elements."""
    torch._foreach_copy_(tensors, [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)])
