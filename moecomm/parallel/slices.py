"""slice_scatter, slice_gather and slice_reduce: slice a tensor that all ranks have, gather the slices, or sum and slice.

Results may be changed in place. In a group of one they are ``x`` itself, which then changes, too.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from moecomm.errors import check_floating, check_gradient_summed, check_sent, check_tensor, differ, wrong_type, wrong_value
from moecomm.ops.exchange import slices as ops
from moecomm.parallel.group import Group, GroupLike, resolve_group


def slice_scatter(x: Tensor, group: GroupLike, dim: int = 0) -> Tensor:
    """Return this rank's slice along ``dim`` of a tensor ``x`` that every rank of ``group`` has. It sends nothing.

    The slices are those of `torch.chunk`, and so of DTensor's ``Shard(dim)``: ``ceil(n / P)`` long,
    with ``n = x.shape[dim]`` and P ranks. If P does not divide n, the last ranks' slices are
    shorter or empty.

    Args:
        x: any shape with a ``dim``, any dtype but quantized ones and integers of less than a byte;
            the same on all ranks. A DTensor is Replicate on the
            group's mesh dim; the result is then the DTensor with Shard(dim) there.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the
            default group.
        dim: the dimension to slice.

    Returns:
        A copy of the slice. In a group of one it is ``x`` itself. Under torch.compile its length
        along ``dim`` is a dynamic size if P does not divide n.

    Raises:
        TypeError: ``x`` is not a tensor, or not of such a dtype.
        ValueError: ``x`` has no ``dim``, or is a DTensor that is not Replicate over the group.

    Backward: the all-gather of the slices' gradients. Every rank gets the whole gradient of ``x``.

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
    """Return the concatenation along ``dim`` of the ranks' slices ``x``, on every rank of ``group``.

    ``slice_gather(slice_scatter(x, group, dim), group, dim, size=x.shape[dim])`` is exactly ``x``,
    for any size.

    Args:
        x: this rank's slice, of a dtype as in `slice_scatter`; of the same shape on all ranks except along ``dim``. A
            DTensor is Shard(dim) on the group's mesh dim; the result is then the DTensor with
            Replicate there.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the
            default group.
        dim: the dimension along which ``x`` is a slice.
        grad: how the ranks use the result. "slice": all of them compute the same from it, and have
            the same gradient. "reduce": each computes something else from it, and has its own part
            of the gradient. A DTensor's gradient tells itself which of the two it is.
        size: the length of the result along ``dim``, where ``x`` is the slice that `slice_scatter`
            makes of this length. None: ``x`` is equally long on all ranks. This function cannot
            check that: if the lengths differ, the exchange fails or hangs.

    Returns:
        The whole tensor. In a group of one it is ``x`` itself.

    Raises:
        TypeError: ``x`` is not a tensor, or not of such a dtype; ``size`` is not an int; with grad
            "reduce", ``x`` requires a gradient and is not float64, float32, bfloat16 or float16.
        ValueError, in these cases:
            - ``x`` has no ``dim``
            - ``grad`` is not one of the two, or not "slice" for a DTensor
            - ``x`` is not as long as this rank's slice of ``size``
            - ``x`` is a DTensor that is not Shard(dim) over the group

    Backward:
        "slice": this rank's slice of its gradient. It sends nothing.
        "reduce": this rank's slice of the sum of all ranks' gradients, added in rank order, in
            float32 for lower precisions.

    >>> slice_gather(torch.arange(3), None, size=3)
    tensor([0, 1, 2])

    The ranks do not ask each other for the lengths of their slices: that would be a host
    synchronization.
    """
    dim = _check(x, dim)
    if grad not in ("slice", "reduce"):
        wrong_value("grad", repr(grad), '"slice" or "reduce"')
    if grad == "reduce":
        check_gradient_summed("x", x, complex=False)
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
    """Return this rank's slice along ``dim`` of the sum of the ranks' ``x``, for half the cost of the whole sum.

    It is `slice_scatter` of the sum.
    ``slice_reduce(f(slice_gather(x, group, grad="reduce")), group)`` is a tensor-parallel layer
    between slices of the tokens, where ``f`` is this rank's part of the layer: arXiv 2205.05198.

    Args:
        x: any shape with a ``dim``, a floating dtype, the same shape on all ranks. A DTensor is
            Partial on the group's mesh dim; the result is then the DTensor with Shard(dim) there.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the
            default group.
        dim: the dimension to slice, as in `slice_scatter`.

    Returns:
        The slice, added in rank order in float32 (float64 for float64) and rounded once. In a group
        of one it is ``x`` itself. Under torch.compile its length along ``dim`` is a dynamic size if
        P does not divide that of ``x``.

    Raises:
        TypeError: ``x`` is not a tensor of a floating dtype.
        ValueError: ``x`` has no ``dim``, or is a DTensor that is not Partial over the group.

    Backward: the all-gather of the slices' gradients. Every rank gets the whole gradient of the
    sum.

    >>> slice_reduce(torch.ones(3), None)  # of a single process
    tensor([1., 1., 1.])

    Costs one all-to-all.
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
    """The dim of ``x``'s mesh whose ranks are ``group``, or None."""
    for i in range(x.device_mesh.ndim):
        if x.device_mesh.get_group(i).group_name == group.name:
            return i
    return None


def _check(x: Tensor, dim: int) -> int:
    """Check the arguments, and return ``dim`` counted from the front."""
    check_tensor("x", x, "with a dimension to slice")
    check_sent("x", x)
    if not isinstance(dim, int):
        wrong_type("dim", type(dim).__name__, "an int")
    if not -x.dim() <= dim < x.dim():
        wrong_value("dim", dim, f"a dimension of x, which is of shape {list(x.shape)}")
    return dim % x.dim()


def _check_size(size: int | None, length: int | None) -> None:
    """Raise unless ``size`` is None or a valid length. If ``length`` is given, ``size`` must equal it."""
    if size is None:
        return
    if isinstance(size, Tensor | float | str):
        wrong_type("size", type(size).__name__, "an int or None")
    if size < 0:
        wrong_value("size", size, "0 or more")
    if length is not None and differ(size, length):
        wrong_value("size", size, f"{length}, the length of x along dim")


def redistribute(x: DTensor, group: Group, before: Placement, after: Placement) -> Tensor:
    """``x`` with placement ``after`` instead of ``before`` on the group's mesh dim."""
    i = mesh_dim(x, group)
    if i is None:
        wrong_value("group", f"no dim of x's mesh {x.device_mesh}", "one of its dims, where x is a DTensor")
    if x.placements[i] != before:
        wrong_value("x", f"{x.placements[i]} on the group's mesh dim {i}", f"{before} there")
    placements = list(x.placements)
    placements[i] = after
    return x.redistribute(placements=placements)
