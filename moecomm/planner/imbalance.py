"""imbalance: how full the fullest rank is. And how loads and placements are read, for `place` too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from moecomm.errors import wrong_type, wrong_value
from moecomm.ops.routing.place_slots import check_rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def imbalance(loads: object, placement: Sequence[Sequence[int]] | torch.Tensor) -> float:
    """The load of the fullest rank, divided by the mean load of the ranks: 1.0 is balance.

    Args:
        loads: the rows of each expert, [E], or those of each rank's tokens, [P, E]: a tensor on
            the CPU, an array or a list, of finite numbers that are not negative.
        placement: [P, L], the experts of each rank, as `plan` takes it. The replicas of an expert
            have equal parts of its load, since `plan` spreads the tokens evenly over them.

    Returns:
        The ratio. It is 1.0 if all loads are 0.

    Raises:
        TypeError, ValueError: the loads are not such numbers, or the placement does not fit them.

    >>> imbalance([6, 2, 2, 2], [[0, 1], [2, 3]])
    1.3333333333333333
    >>> imbalance([6, 2, 2, 2], [[0, 1, 2], [0, 3, 2]])  # expert 0 on both
    1.0
    """
    load, _ = read_loads(loads)
    rows = read_placement(placement, "placement", len(load))
    if not load.any():
        return 1.0
    full = (load / np.bincount(rows.ravel(), minlength=len(load)))[rows].sum(1)  # [P]
    return float(full.max() / (load.sum() / len(rows)))


def read_loads(loads: object, argument: str = "loads") -> tuple[Floats, Floats | None]:
    """The load of each expert, [E], and of each rank's tokens, [P, E], if given so."""
    if isinstance(loads, torch.Tensor):
        if loads.device.type != "cpu":
            wrong_value(argument, f"on {loads.device}", "on the CPU")
        loads = loads.detach().numpy()
    try:
        found = np.asarray(loads, dtype=np.float64)
    except (TypeError, ValueError):
        wrong_type(argument, type(loads).__name__, "numbers of shape [E] or [P, E]")
    if found.ndim not in (1, 2) or found.size == 0:
        wrong_value(argument, f"of shape {list(found.shape)}", "of shape [E] or [P, E]")
    if not (np.isfinite(found).all() and (found >= 0).all()):
        wrong_value(argument, f"between {found.min()} and {found.max()}", "finite and not negative")
    return (found, None) if found.ndim == 1 else (np.array([math.fsum(column) for column in found.T.tolist()]), found)


def read_placement(placement: Sequence[Sequence[int]] | torch.Tensor, argument: str, experts: int) -> Ints:
    if isinstance(placement, torch.Tensor) and placement.device.type != "cpu":
        wrong_value(argument, f"on {placement.device}", "on the CPU")
    try:
        found = np.asarray(placement)
    except ValueError:
        found = np.empty(0)
    if found.ndim != 2 or found.size == 0 or found.dtype.kind not in "iu":
        wrong_value(argument, repr(placement)[:200], "[P, L] ints, 1 or more experts on each rank")
    check_rows(found.tolist(), experts, argument)
    return found.astype(np.int64)
