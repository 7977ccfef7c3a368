"""(order, position, offsets, dropped): the sort of a plan in static mode on one rank, of the slots that fit, and how many do not.

A slot fits if its place is in [0, bins), and its token is among the first ``most`` tokens that have such a slot. Slots whose expert is -1
do not count as dropped. The rest is as in `counting_sort.py`, with ``padded``.
Costs what `counting_sort` costs, and one read of experts [T, K]; on a GPU it is the same three launches, if ``most`` is at least T.
No backward: integers only.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moecomm.ops.base.library import define
from moecomm.ops.routing.count_pairs import keys_triton
from moecomm.ops.routing.counting_sort import bounded_triton, check_rows, launch, sort_cpu, sort_fake, sort_triton
from moecomm.ops.routing.drop_overflow import fit_triton

SCHEMA = "sort_alone(Tensor experts, Tensor places, int bins, SymInt most, SymInt size, int align=1) -> (Tensor, Tensor, Tensor, Tensor)"
Sorted = tuple[Tensor, Tensor, Tensor, Tensor]


def alone_fake(experts: Tensor, places: Tensor, bins: int, most: int, size: int, align: int = 1) -> Sorted:
    return *sort_fake(experts, bins, size), torch.empty((), dtype=torch.int32, device=experts.device)


def alone_cpu(experts: Tensor, places: Tensor, bins: int, most: int, size: int, align: int = 1) -> Sorted:
    wide = places.numpy().astype(np.int64)  # as int64, ids of any dtype can be compared with bins
    fits = (wide >= 0) & (wide < bins)
    if most < experts.shape[0]:
        some = fits.any(1)
        fits &= (some.cumsum() <= most)[:, None]
    keys = torch.from_numpy(np.where(fits, wide, -1).astype(np.int32))
    lost = np.count_nonzero((experts.numpy().astype(np.int64) != -1) & ~fits)
    return *sort_cpu(keys, bins, size, True, align), torch.tensor(lost, dtype=torch.int32)


def alone_triton(experts: Tensor, places: Tensor, bins: int, most: int, size: int, align: int = 1) -> Sorted:
    check_rows(size, align)
    if most < experts.shape[0]:
        _, position = bounded_triton(keys_triton(places, bins, 1), 1, most)
        fits, dropped = fit_triton(experts, places, position, bins)
        return *sort_triton(fits, bins, size, True, align), dropped
    order, position, offsets, dropped = alone_fake(experts, places, bins, most, size)
    launch(places, order, position, offsets, bins, padded=True, align=align, named=experts, dropped=dropped)
    return order, position, offsets, dropped


sort_alone = define(SCHEMA, alone_fake, alone_cpu, alone_triton)
