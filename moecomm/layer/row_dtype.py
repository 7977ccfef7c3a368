"""The dtype in which `combine` sends rows: one that every rank knows without a message, whatever its own experts gave."""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.errors import LISTED, SUMMED, wrong_type
from moecomm.layer.plan import Plan


def check_dtype(dtype: object) -> None:
    """Raise unless ``dtype`` is None or a dtype in which rows can be summed."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        wrong_type("dtype", type(dtype).__name__, "a torch.dtype or None")
    if dtype not in SUMMED:
        wrong_type("dtype", dtype, f"{LISTED}, or None")


def in_one_dtype(leaves: list[Tensor], plan: Plan, dtype: torch.dtype | None) -> list[Tensor]:
    """The leaves of rows in the dtype in which every rank sends them.

    Each rank knows it: it is the argument of `combine`, or autocast's, or that of the plan's ``like``. A leaf that `combine`
    refuses stays as it is.
    """
    return [_cast(leaf, plan, dtype, len(leaves)) for leaf in leaves]


def _cast(leaf: Tensor, plan: Plan, dtype: torch.dtype | None, leaves: int) -> Tensor:
    if not isinstance(leaf, Tensor) or leaf.dtype not in SUMMED:
        return leaf
    if dtype is not None:
        return leaf.to(dtype) if dtype in SUMMED else leaf
    device = leaf.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # there torch raises; torch 2.11 cannot trace is_autocast_available
        # As torch.matmul does: autocast leaves float64 as it is.
        return leaf if leaf.dtype == torch.float64 else leaf.to(torch.get_autocast_dtype(device))
    return leaf if plan.dtype < 0 or leaves > 1 or leaf.dtype == SUMMED[plan.dtype] else leaf.to(SUMMED[plan.dtype])
