"""sum_ranks and sum_gradient: the end and the beginning of a part of a model that the ranks of a group split."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from moecomm.errors import check_floating, check_tensor
from moecomm.ops.exchange import sum_ranks as ops
from moecomm.parallel.group import GroupLike, resolve_group
from moecomm.parallel.slices import redistribute


def sum_ranks(x: Tensor, group: GroupLike) -> Tensor:
    """Return the sum of the ranks' ``x`` on every rank of ``group``.

    Use it at the end of a part that the ranks split, such as tensor-parallel experts.

    Args:
        x: any shape, a floating dtype, the same shape on all ranks. A DTensor is Partial on the
            group's mesh dim; the result is then the DTensor with Replicate there.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the
            default group.

    Returns:
        A tensor like ``x``, with the same bits on all ranks: added in rank order in float32
        (float64 for float64) and rounded once. In a group of one it is ``x`` itself.

    Raises:
        TypeError: ``x`` is not a tensor of a floating dtype.
        ValueError: ``x`` is a DTensor that is not Partial over the group.

    Backward: the unchanged gradient. It sends nothing, because all ranks compute the same from the
    sum and have the same gradient of it. If they do not, use
    ``slice_gather(slice_reduce(x, group), group, grad="reduce")``.

    >>> sum_ranks(torch.ones(2), None)  # of a single process
    tensor([1., 1.])

    Costs an all-to-all and an all-gather.
    """
    check_tensor("x", x, "of any shape")
    check_floating("x", x)
    ranks = resolve_group(group)
    if isinstance(x, DTensor):
        return redistribute(x, ranks, Partial(), Replicate())
    return x if ranks.size == 1 else ops.sum_ranks(x, ranks.size, ranks.name)


def sum_gradient(x: Tensor, group: GroupLike) -> Tensor:
    """Return ``x`` unchanged; its gradient is the sum of the ranks' gradients.

    Use it at the beginning of a part that the ranks of ``group`` split. Every rank has ``x`` and
    computes another part of the result, up to `sum_ranks` or `slice_reduce`. So each rank has one
    part of the gradient of ``x``. ``sum_ranks(f(sum_gradient(x, group)), group)`` is a
    tensor-parallel layer, where ``f`` is this rank's part of the layer: arXiv 1909.08053.

    Args:
        x: any shape, a floating dtype, the same on all ranks. A DTensor comes back unchanged: its
            gradient tells itself whether it is a sum.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the
            default group.

    Returns:
        A tensor with the values and the memory of ``x``; in a group of one, and for a DTensor, ``x`` itself. If you change it
        in place, the memory of ``x`` changes as well: do not use ``x`` afterwards, as after `torch.Tensor.detach`.

    Raises:
        TypeError: ``x`` is not a tensor of a floating dtype.

    Backward: the sum of the ranks' gradients, as `sum_ranks` computes it.

    >>> sum_gradient(torch.ones(2), None)
    tensor([1., 1.])
    """
    check_tensor("x", x, "of any shape")
    check_floating("x", x)
    ranks = resolve_group(group)
    return x if ranks.size == 1 or isinstance(x, DTensor) else ops.sum_gradient(x, ranks.size, ranks.name)
