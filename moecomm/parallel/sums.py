"""sum_ranks and sum_gradient: into and out of a part of a model that the ranks of a group split among themselves."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from moecomm.errors import check_floating, check_tensor
from moecomm.ops.exchange import sum_ranks as ops
from moecomm.parallel.group import GroupLike, resolve_group
from moecomm.parallel.slices import redistribute


def sum_ranks(x: Tensor, group: GroupLike) -> Tensor:
    """The sum of the ranks' ``x``, on every rank of ``group``: the end of a part that they split, such as tensor-parallel experts.

    Args:
        x: of any shape and a floating dtype, of the same shape on all ranks. A DTensor is Partial on the group's mesh dim, and the
            result is the DTensor with Replicate there.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.

    Returns a tensor like ``x``, the same bits on all ranks: added up in the order of the ranks in float32 (float64 for float64), rounded
    once; ``x`` itself in a group of one. An all-to-all and an all-gather.

    Backward: the gradient as it is, and nothing is sent: all ranks go on alike from the sum, and have the same gradient of it. Where they
    do not, it is ``slice_gather(slice_reduce(x, group), group, grad="reduce")``.

    Raises TypeError where ``x`` is no tensor of a floating dtype, ValueError where it is a DTensor that is not Partial over the group.

    >>> sum_ranks(torch.ones(2), None)  # of a single process
    tensor([1., 1.])
    """
    check_tensor("x", x, "of any shape")
    check_floating("x", x)
    ranks = resolve_group(group)
    if isinstance(x, DTensor):
        return redistribute(x, ranks, Partial(), Replicate())
    return x if ranks.size == 1 else ops.sum_ranks(x, ranks.size, ranks.name)


def sum_gradient(x: Tensor, group: GroupLike) -> Tensor:
    """``x``, whose gradient is the sum of the ranks': the beginning of a part that the ranks of ``group`` split among themselves.

    Every rank has ``x``, computes another part of what follows from it, up to `sum_ranks` or `slice_reduce`, and so has a part of its
    gradient. ``sum_ranks(f(sum_gradient(x, group)), group)`` is a tensor-parallel layer, of which ``f`` is this rank's part: arXiv
    1909.08053.

    Args:
        x: of any shape and a floating dtype, the same on all ranks. A DTensor comes back as it is: its gradient says itself whether it is
            a sum.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.

    Backward: the sum of the ranks' gradients, as `sum_ranks` makes it.

    Raises TypeError where ``x`` is no tensor of a floating dtype.

    >>> sum_gradient(torch.ones(2), None)
    tensor([1., 1.])
    """
    check_tensor("x", x, "of any shape")
    check_floating("x", x)
    ranks = resolve_group(group)
    return x if ranks.size == 1 or isinstance(x, DTensor) else ops.sum_gradient(x, ranks.size, ranks.name)
