"""Placement: which rank holds which expert."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TypeAlias

import torch
from torch import Tensor

from moecomm.errors import INTEGERS, wrong_type, wrong_value
from moecomm.ops.routing.place_slots import check_rows
from moecomm.parallel.group import Group

Placement: TypeAlias = Sequence[Sequence[int]] | Tensor
"""[P, L]: the experts of each rank in their local order, as lists, tuples, or an integer tensor on the CPU."""


def as_tensor(placement: Placement, ranks: int, argument: str = "placement") -> Tensor:
    """``placement`` as a [P, L] tensor on the CPU.

    Raises where the shape or dtype is wrong. The ids are checked later, by the code that reads them.
    """
    if isinstance(placement, Tensor):
        if placement.dim() != 2:
            wrong_value(argument, f"of shape {list(placement.shape)}", "of shape [P, L]")
        if placement.dtype not in INTEGERS:
            wrong_type(argument, f"of dtype {placement.dtype}", "of dtype int8, int16, int32, int64 or uint8")
        if placement.device.type != "cpu":
            wrong_value(argument, f"on {placement.device}", "on the CPU")
    else:
        rows = _as_lists(placement, argument)
        placement = torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(rows), len(rows[0]) if rows else 0)
    _check_shape(list(placement.shape), ranks, argument)
    return placement


def _as_lists(placement: Sequence[Sequence[int]], argument: str) -> list[list[int]]:
    """The lists or tuples of ``placement``, which are equally long, as lists."""
    if not isinstance(placement, list | tuple) or not all(isinstance(row, list | tuple) for row in placement):
        flat = isinstance(placement, list | tuple) and all(isinstance(expert, int) for expert in placement)
        instead = f"Give each rank a list of its own: torch.tensor({argument}).view(ranks, -1)" if flat else ""
        wrong_type(argument, type(placement).__name__, "a list of lists of ints, [P, L], or an integer tensor on the CPU", instead)
    for row in placement:
        for expert in row:
            if not isinstance(expert, int) or isinstance(expert, bool):
                wrong_type(argument, f"with {expert!r}", "of ints")
    lengths = [len(row) for row in placement]
    if len(set(lengths)) > 1:
        wrong_value(argument, f"of {lengths} experts", "of as many on each rank; a rank with room takes a replica")
    return [[index(expert) for expert in row] for row in placement]  # to a compiler too each id is a number, not a symbol


def _check_shape(shape: list[int], ranks: int, argument: str) -> None:
    if shape[0] != ranks or shape[1] == 0:
        wrong_value(argument, f"of shape {shape}", f"of shape [P, L], for the group's {ranks} ranks, 1 or more experts each")


def check_experts_of(tensors: Sequence[Tensor], local: int) -> None:
    """Raise unless every tensor is [L, ...], where L is the number of local experts in the placement."""
    for tensor in tensors:
        if tensor.dim() == 0 or tensor.shape[0] != local:
            wrong_value(
                "params", f"a tensor of shape {list(tensor.shape)}", f"of shape [{local}, ...], with the placement's L = {local} experts"
            )


def checked_rows(placement: Placement, group: Group, argument: str = "placement") -> list[list[int]]:
    """The placement as a list of experts per rank, after all checks.

    Lists are constants to a compiler, which cannot read a tensor's values.
    """
    if isinstance(placement, Tensor):
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg="placement was a tensor, whose values no graph can hold; it must be lists under fullgraph=True")
        rows = as_tensor(placement, group.size, argument).numpy().tolist()
    else:
        rows = _as_lists(placement, argument)
        _check_shape([len(rows), len(rows[0]) if rows else 0], group.size, argument)
    check_rows(rows, max(map(max, rows)) + 1, argument)
    return rows
