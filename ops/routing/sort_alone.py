"""The sort of a plan on one rank, and what it says of the ids: (order, position, offsets) as in `counting_sort.py`, with ``padded``.

- `sort_alone`, for static mode, also gives ``dropped``: how many slots do not fit. A slot fits if its place is in [0, bins), and its token
  is among the first ``most`` tokens that have such a slot. Slots whose expert is -1 do not count as dropped.
- `sort_counted`, for plans whose sizes follow the routing, also gives the message [1, 6 + signature] of `count_pairs.py`, but for the
  pairs, which one rank does not have. Its order has room for all slots: the host does not yet know how many have an expert.

Each costs what `counting_sort` costs, and one read of experts [T, K]; on a GPU it is the same three launches, for `sort_alone` if ``most``
is at least T.
No backward: integers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moecomm.errors import check_slots
from moecomm.ops.base.library import define
from moecomm.ops.base.signature import NOT_FINITE, SIGNATURE
from moecomm.ops.routing.count_pairs import keys_triton, not_finite
from moecomm.ops.routing.counting_sort import MOST, bounded_triton, check_rows, launch, sort_cpu, sort_fake, sort_triton
from moecomm.ops.routing.drop_overflow import fit_triton

SCHEMA = "sort_alone(Tensor experts, Tensor places, int bins, SymInt most, SymInt size, int align=1) -> (Tensor, Tensor, Tensor, Tensor)"
COUNTED = (
    "sort_counted(Tensor experts, Tensor places, int bins, SymInt[] signature, int align=1, Tensor? weights=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
Sorted = tuple[Tensor, Tensor, Tensor, Tensor]


def alone_fake(experts: Tensor, places: Tensor, bins: int, most: int, size: int, align: int = 1) -> Sorted:
    return *sort_fake(experts, bins, size), torch.empty((), dtype=torch.int32, device=experts.device)


def alone_cpu(experts: Tensor, places: Tensor, bins: int, most: int, size: int, align: int = 1) -> Sorted:
    wide, fits = _fitting(places, bins)
    if most < experts.shape[0]:
        some = fits.any(1)
        fits &= (some.cumsum() <= most)[:, None]
    keys = torch.from_numpy(np.where(fits, wide, -1).astype(np.int32))
    lost = np.count_nonzero((experts.numpy().astype(np.int64) != -1) & ~fits)
    return *sort_cpu(keys, bins, size, True, align), torch.tensor(lost, dtype=torch.int32)


def _fitting(places: Tensor, bins: int) -> tuple[np.ndarray, np.ndarray]:
    wide = places.numpy().astype(np.int64)  # as int64, ids of any dtype can be compared with bins
    return wide, (wide >= 0) & (wide < bins)


def alone_triton(experts: Tensor, places: Tensor, bins: int, most: int, size: int, align: int = 1) -> Sorted:
    check_rows(size, align)
    if most < experts.shape[0]:
        _, position = bounded_triton(keys_triton(places, bins, 1), 1, most)
        fits, dropped = fit_triton(experts, places, position, bins)
        return *sort_triton(fits, bins, size, True, align), dropped
    order, position, offsets, dropped = alone_fake(experts, places, bins, most, size)
    launch(places, order, position, offsets, bins, padded=True, align=align, named=experts, dropped=dropped)
    return order, position, offsets, dropped


def counted_fake(
    experts: Tensor, places: Tensor, bins: int, signature: Sequence[int], align: int = 1, weights: Tensor | None = None
) -> Sorted:
    message = torch.empty(1, SIGNATURE + len(signature), dtype=torch.int64, device=experts.device)
    return *sort_fake(experts, bins, experts.numel() + bins * (align - 1)), message


def counted_cpu(
    experts: Tensor, places: Tensor, bins: int, signature: Sequence[int], align: int = 1, weights: Tensor | None = None
) -> Sorted:
    check_slots(experts, MOST)
    wide, fits = _fitting(places, bins)
    ids = wide if places is experts else experts.numpy()
    lowest, highest = (int(ids.min()), max(-1, int(ids.max()))) if ids.size else (-1, -1)
    slots, keys = np.count_nonzero(fits), wide.astype(np.int32)
    if slots < fits.size:
        keys[~fits] = -1
    infinite = 0 if weights is None else int(not_finite(weights))
    message = torch.tensor([[0, slots, lowest, highest, experts.shape[0], infinite, *signature]])
    return *sort_cpu(torch.from_numpy(keys), bins, experts.numel() + bins * (align - 1), True, align), message


def counted_triton(
    experts: Tensor, places: Tensor, bins: int, signature: Sequence[int], align: int = 1, weights: Tensor | None = None
) -> Sorted:
    check_slots(experts, MOST)
    order, position, offsets, message = counted_fake(experts, places, bins, signature, align)
    check_rows(order.shape[0], align)
    signed = tuple(signature)  # passed as kernel arguments: a copy from the host would wait for the device
    launch(places, order, position, offsets, bins, padded=True, align=align, named=experts, message=message, signature=signed)
    if weights is not None:
        message[:, NOT_FINITE] = not_finite(weights)
    return order, position, offsets, message


sort_alone = define(SCHEMA, alone_fake, alone_cpu, alone_triton)
sort_counted = define(COUNTED, counted_fake, counted_cpu, counted_triton)
