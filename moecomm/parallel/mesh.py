"""moe_mesh: two device meshes of the same ranks, one for the dense part of a model and one for its experts."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple, NoReturn

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moecomm.errors import wrong_type, wrong_value

DENSE = ("pp", "dp", "cp", "tp")
EXPERT = ("pp", "edp", "ep", "etp")


class MoEMesh(NamedTuple):
    """The device meshes that `moe_mesh` makes of the same ranks. ``print`` shows the place of each rank in ``dense`` and in ``expert``."""

    dense: DeviceMesh  # (pp, dp, cp, tp)
    expert: DeviceMesh  # (pp, edp, ep, etp)
    stage: DeviceMesh  # 1-D: all ranks of this rank's pipeline stage

    def __str__(self) -> str:
        return layout(tuple(self.dense.shape), tuple(self.expert.shape))


def moe_mesh(device_type: str, *, pp: int = 1, dp: int | None = None, cp: int = 1, tp: int = 1, ep: int = 1, etp: int = 1) -> MoEMesh:
    """Make the device meshes of an MoE model over all ranks: one for its dense layers, one for its experts, one per pipeline stage.

    ==========  ====================  =====================================================================================
    mesh        dims                  use
    ==========  ====================  =====================================================================================
    ``dense``   (pp, dp, cp, tp)      attention and norms
    ``expert``  (pp, edp, ep, etp)    the experts: E is spread over ep, each expert's hidden dim over etp, and both are
                                      repeated over edp = dp * cp * tp / (ep * etp); ep can take ranks from dp, cp and tp
    ``stage``   1-D                   all ranks of a pipeline stage: a gate's gradients are synced over it, and its tokens
                                      are balanced over it
    ==========  ====================  =====================================================================================

    A pipeline stage has the same ranks in ``dense`` and in ``expert``. The last dim of each has
    neighboring ranks.

    Each dim is a group for the functions of moecomm: ``mesh.expert["ep"]`` for `plan`,
    ``mesh.dense["tp"]`` for `slice_scatter`, and so on. DTensor and FSDP2 take the dims of one mesh
    together.

    Args:
        device_type: as in `torch.distributed.device_mesh.init_device_mesh`.
        pp: pipeline stages.
        dp: data-parallel ranks. None: the rest of the world, world / (pp * cp * tp).
        cp: context-parallel ranks.
        tp: tensor-parallel ranks of the dense part.
        ep: ranks that the experts are spread over.
        etp: ranks that each expert's hidden dim is spread over.

    Returns:
        A `MoEMesh`.

    Raises, before a group is made:
        TypeError: a size is not an int.
        ValueError, in these cases:
            - a size is below 1
            - the sizes do not multiply to the world's size
            - ep * etp does not divide dp * cp * tp
            - there is no default group

    Example, which makes a default group without any launcher:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> print(moe_mesh("cpu"))
        rank |  pp  dp  cp  tp |  pp edp  ep etp
           0 |   0   0   0   0 |   0   0   0   0
        >>> dist.destroy_process_group()

    Every rank must call this function, because it makes process groups in the default group's
    world. A world of one rank needs a default group too, because a DeviceMesh does.

    A dim of all ranks is the default group. The meshes share no other process group, even where
    groups have the same ranks: FSDP2 requires that the parameters of a module know a group by one
    mesh only.
    """
    for name, size in {"pp": pp, "dp": 1 if dp is None else dp, "cp": cp, "tp": tp, "ep": ep, "etp": etp}.items():
        if not isinstance(size, int) or isinstance(size, bool):
            wrong_type(name, type(size).__name__, "an int")
        if size < 1:
            wrong_value(name, size, "at least 1")
    if not dist.is_initialized():
        wrong_value("the default process group", "missing", "made first, by torch.distributed.init_process_group")
    world = dist.get_world_size()
    if dp is None:
        if world % (pp * cp * tp):
            _no_divisor({"pp": pp, "cp": cp, "tp": tp}, world, f"the world's {world} ranks")
        dp = world // (pp * cp * tp)
    if pp * dp * cp * tp != world:
        wrong_value("pp * dp * cp * tp", f"{pp} * {dp} * {cp} * {tp} = {pp * dp * cp * tp}", f"the world's {world} ranks")
    stage = world // pp
    if stage % (ep * etp):
        _no_divisor({"ep": ep, "etp": etp}, stage, f"the {stage} ranks of a pipeline stage, dp * cp * tp")
    return MoEMesh(
        init_device_mesh(device_type, (pp, dp, cp, tp), mesh_dim_names=DENSE),
        init_device_mesh(device_type, (pp, stage // (ep * etp), ep, etp), mesh_dim_names=EXPERT),
        init_device_mesh(device_type, (pp, stage), mesh_dim_names=("pp", "stage"))["stage"],
    )


def layout(dense: tuple[int, ...], expert: tuple[int, ...]) -> str:
    """A table of the ranks' places in a dense and an expert mesh of these sizes, one line per rank.

    ``dense`` is (pp, dp, cp, tp), ``expert`` is (pp, edp, ep, etp).

    >>> print(layout(dense=(1, 2, 1, 2), expert=(1, 1, 4, 1)))
    rank |  pp  dp  cp  tp |  pp edp  ep etp
       0 |   0   0   0   0 |   0   0   0   0
       1 |   0   0   0   1 |   0   0   1   0
       2 |   0   1   0   0 |   0   0   2   0
       3 |   0   1   0   1 |   0   0   3   0
    """
    places = [itertools.product(*(range(size) for size in view)) for view in (dense, expert)]
    lines = [("rank", DENSE, EXPERT), *zip(range(math.prod(dense)), *places, strict=True)]
    return "\n".join(" |".join([f"{rank:>4}", *("".join(f"{i:>4}" for i in view) for view in views)]) for rank, *views in lines)


def divisors(ranks: int) -> list[int]:
    """All divisors of ``ranks``, in ascending order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [size for size in range(1, ranks + 1) if ranks % size == 0]


def _no_divisor(sizes: dict[str, int], ranks: int, whose: str) -> NoReturn:
    """Raise ValueError for sizes whose product does not divide ``ranks``."""
    product = math.prod(sizes.values())
    was = f"{' * '.join(str(size) for size in sizes.values())} = {product}"
    wrong_value(" * ".join(sizes), was, f"a divisor of {whose}: {', '.join(str(size) for size in divisors(ranks))}")
