"""slice_scatter, slice_gather and slice_reduce: from a tensor that every rank has to the ranks' slices of it or of the sum, and back."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from moecomm.errors import check_floating, check_tensor, differ, wrong_type, wrong_value
from moecomm.ops.exchange import slices as ops
from moecomm.parallel.group import Group, GroupLike, resolve_group


def slice_scatter(x: Tensor, group: GroupLike, dim: int = 0) -> Tensor:
    """This rank's slice along ``dim`` of an ``x`` that every rank of ``group`` has; sends nothing.

    The slices are those of `torch.chunk`, and so of DTensor's ``Shard(dim)``: ``ceil(n / P)`` long, where ``n = x.shape[dim]`` and P is
    the number of ranks; where P does not divide n, the last ranks' slices are shorter or empty.

    Args:
        x: of any shape with a ``dim``, and of any dtype; the same on all ranks. A DTensor is Replicate on the group's mesh dim, and the
            result is the DTensor with Shard(dim) there.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.
        dim: the dimension to slice.

    Returns a copy of the slice; ``x`` itself in a group of one. Under torch.compile its length along ``dim`` is a dynamic size where P
    does not divide n.

    Backward: the all-gather of the slices' gradients, so that every rank has the whole gradient of ``x``.

    Raises TypeError where ``x`` is no tensor, ValueError where it has no ``dim`` or is a DTensor that is not Replicate over the group.

    >>> slice_scatter(torch.arange(3), None)  # a single process has all of it
    tensor([0, 1, 2])
    """
    dim = _check(x, dim)
    ranks = resolve_group(group)
    if isinstance(x, DTensor):
        return redistribute(x, ranks, Replicate(), Shard(dim))
    if ranks.size == 1:
        return x
    return ops.slice_scatter(x, dim, None, ranks.size, ranks.name)


def slice_gather(
    x: Tensor, group: GroupLike, dim: int = 0, grad: Literal["slice", "reduce"] = "slice", size: int | None = None
) -> Tensor:  # fmt: skip
    """The ranks' slices ``x``, one behind the other along ``dim``, on every rank of ``group``.

    ``slice_gather(slice_scatter(x, group, dim), group, dim, size=x.shape[dim])`` is ``x``, exactly, whatever its size. No rank asks
    another for its slice's length: that would make the host wait.

    Args:
        x: this rank's slice, of any dtype; of the same shape on all ranks but for ``dim``. A DTensor is Shard(dim) on the group's mesh
            dim, and the result is the DTensor with Replicate there.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.
        dim: the dimension along which ``x`` is a slice.
        grad: what follows on the ranks. "slice": all of them go on alike, and have the same gradient of the result. "reduce": each does
            something else with the result, and has its own part of the gradient. A DTensor's gradient says itself which it is.
        size: the length of the result along ``dim``, where ``x`` is as `slice_scatter` makes it from that length. None: ``x`` is
            equally long on all ranks; if it is not, that cannot be seen here, and the exchange fails or hangs.

    Backward: with "slice", this rank's slice of its gradient, and nothing is sent; with "reduce", that slice of the sum of all ranks'
    gradients, added up in the order of the ranks, in float32 for lower precisions.

    Raises TypeError where ``x`` is no tensor or ``size`` no int, ValueError where ``x`` has no ``dim``, ``grad`` is not one of the two,
    ``x`` is not as long as this rank's slice of ``size``, or is a DTensor that is not Shard(dim) over the group.

    >>> slice_gather(torch.arange(3), None, size=3)
    tensor([0, 1, 2])
    """
    dim = _check(x, dim)
    if grad not in ("slice", "reduce"):
        wrong_value("grad", repr(grad), '"slice" or "reduce"')
    ranks = resolve_group(group)
    whole = isinstance(x, DTensor) or ranks.size == 1
    _check_size(size, x.shape[dim] if whole else None)
    if isinstance(x, DTensor):
        if grad == "reduce":
            wrong_value("grad", '"reduce" for a DTensor', '"slice": a DTensor\'s gradient is reduced where its placement is Partial')
        return redistribute(x, ranks, Shard(dim), Replicate())
    if ranks.size == 1:
        return x
    size = x.shape[dim] * ranks.size if size is None else size
    return ops.slice_gather(x, dim, size, ranks.size, ranks.name, grad == "reduce")


def slice_reduce(x: Tensor, group: GroupLike, dim: int = 0) -> Tensor:
    """This rank's slice along ``dim`` of the sum of the ranks' ``x``: `slice_scatter` of the sum, for half of what the whole sum costs.

    ``slice_reduce(f(slice_gather(x, group, grad="reduce")), group)`` is a tensor-parallel layer of which ``f`` is this rank's part, between
    slices of the tokens: arXiv 2205.05198.

    Args:
        x: of a floating dtype and any shape with a ``dim``, of the same shape on all ranks. A DTensor is Partial on the group's mesh dim,
            and the result is the DTensor with Shard(dim) there.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.
        dim: the dimension to slice, as `slice_scatter` does it.

    Returns the slice, added up in the order of the ranks in float32 (float64 for float64) and rounded once; ``x`` itself in a group of
    one. One all-to-all. Under torch.compile its length along ``dim`` is a dynamic size where P does not divide that of ``x``.

    Backward: the all-gather of the slices' gradients, so that every rank has the whole gradient of the sum.

    Raises TypeError where ``x`` is no tensor of a floating dtype, ValueError where it has no ``dim`` or is a DTensor that is not Partial
    over the group.

    >>> slice_reduce(torch.ones(3), None)  # of a single process
    tensor([1., 1., 1.])
    """
    dim = _check(x, dim)
    check_floating("x", x)
    ranks = resolve_group(group)
    if isinstance(x, DTensor):
        return redistribute(x, ranks, Partial(), Shard(dim))
    if ranks.size == 1:
        return x
    return ops.slice_reduce(x, dim, None, ranks.size, ranks.name)


def mesh_dim(x: DTensor, group: Group) -> int | None:
    """The dim of ``x``'s mesh whose ranks are ``group``; None where there is none."""
    for i in range(x.device_mesh.ndim):
        if x.device_mesh.get_group(i).group_name == group.name:
            return i
    return None


def _check(x: Tensor, dim: int) -> int:
    """``dim`` counted from the front."""
    check_tensor("x", x, "with a dimension to slice")
    if not isinstance(dim, int):
        wrong_type("dim", type(dim).__name__, "an int")
    if not -x.dim() <= dim < x.dim():
        wrong_value("dim", dim, f"a dimension of x, which is of shape {list(x.shape)}")
    return dim % x.dim()


def _check_size(size: int | None, length: int | None) -> None:
    """Raise unless ``size`` is None or a length, and this ``length`` where that is known."""
    if size is None:
        return
    if isinstance(size, Tensor | float | str):
        wrong_type("size", type(size).__name__, "an int or None")
    if size < 0:
        wrong_value("size", size, "0 or more")
    if length is not None and differ(size, length):
        wrong_value("size", size, f"{length}, the length of x along dim")


def redistribute(x: DTensor, group: Group, before: Placement, after: Placement) -> Tensor:
    """``x`` with ``after`` in place of ``before`` on the group's mesh dim."""
    i = mesh_dim(x, group)
    if i is None:
        wrong_value("group", f"no dim of x's mesh {x.device_mesh}", "one of its dims, where x is a DTensor")
    if x.placements[i] != before:
        wrong_value("x", f"{x.placements[i]} on the group's mesh dim {i}", f"{before} there")
    placements = list(x.placements)
    placements[i] = after
    return x.redistribute(placements=placements)
