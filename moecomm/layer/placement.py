"""Placement: which rank holds which expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from moecomm.errors import INTEGERS, wrong_type, wrong_value
from moecomm.ops.routing.place_slots import check_rows
from moecomm.parallel.group import Group

Placement: TypeAlias = Sequence[Sequence[int]] | Tensor
"""[P, L]: the experts of each rank in their local order, as lists, tuples, or an integer tensor on the CPU."""


def as_tensor(placement: Placement, ranks: int) -> Tensor:
    """``placement`` as a [P, L] tensor on the CPU.

    Raises where the shape or dtype is wrong. The ids are checked later, by the code that reads them.
    """
    if isinstance(placement, Tensor):
        if placement.dim() != 2:
            wrong_value("placement", f"of shape {list(placement.shape)}", "of shape [P, L]")
        if placement.dtype not in INTEGERS:
            wrong_type("placement", f"of dtype {placement.dtype}", "of dtype int8, int16, int32, int64 or uint8")
        if placement.device.type != "cpu":
            wrong_value("placement", f"on {placement.device}", "on the CPU")
    else:
        if not isinstance(placement, list | tuple) or not all(isinstance(row, list | tuple) for row in placement):
            wrong_type("placement", type(placement).__name__, "a list of lists of ints, [P, L], or an integer tensor on the CPU")
        for expert in (expert for row in placement for expert in row):
            if not isinstance(expert, int) or isinstance(expert, bool):
                wrong_type("placement", f"with {expert!r}", "of ints")
        lengths = [len(row) for row in placement]
        if len(set(lengths)) > 1:
            wrong_value("placement", f"of {lengths} experts", "of as many on each rank; a rank with room takes a replica")
        placement = torch.tensor(placement, dtype=torch.int64, device="cpu").view(len(lengths), -1 if sum(lengths) else 0)
    if placement.shape[0] != ranks or placement.shape[1] == 0:
        wrong_value(
            "placement", f"of shape {list(placement.shape)}", f"of shape [P, L], for the group's {ranks} ranks, 1 or more experts each"
        )
    return placement


def check_experts_of(tensors: Sequence[Tensor], local: int) -> None:
    """Raise unless every tensor is [L, ...], where L is the number of local experts in the placement."""
    for tensor in tensors:
        if tensor.dim() == 0 or tensor.shape[0] != local:
            wrong_value(
                "params", f"a tensor of shape {list(tensor.shape)}", f"of shape [{local}, ...], with the placement's L = {local} experts"
            )


def checked_rows(placement: Placement, group: Group) -> list[list[int]]:
    """The placement as a list of experts per rank, after all checks."""
    rows = as_tensor(placement, group.size).numpy().tolist()
    check_rows(rows, max(map(max, rows)) + 1)
    return rows
