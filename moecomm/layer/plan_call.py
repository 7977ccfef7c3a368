"""The checked arguments of `plan`, and the places of the experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from moecomm.errors import check_experts, check_floating, check_int, check_slots, check_tensor, differ, int_instead, wrong_type, wrong_value
from moecomm.layer.placement import Placement, as_tensor
from moecomm.ops.base.library import call
from moecomm.ops.base.signature import signature
from moecomm.ops.routing.counting_sort import MOST
from moecomm.ops.routing.place_slots import place, placement_table
from moecomm.parallel.group import Group


class Routing(NamedTuple):
    experts: Tensor  # [T, K]
    weights: Tensor  # [T, K]
    num_experts: int
    places: Tensor  # [T, K]: the expert's place among P * L; without a placement this is the expert's id
    placed: Tensor | None  # [T, K]: the rank of the slot; None without a placement
    local: int  # L
    signed: list[int]  # what the ranks must agree on
    check: bool
    align: int
    group: Group


def make_routing(
    experts: Tensor,
    weights: Tensor,
    num_experts: int,
    placement: Placement | None,
    like: list[Tensor],
    max_rows: int | None,
    check: bool,
    align: int,
    group: Group,
) -> Routing:
    """Check the arguments of `plan` and find the places of the experts.

    Raises where an argument is wrong.
    """
    _check(experts, weights, num_experts, group.size if placement is None else None, like, max_rows, align)
    local, checksum, places, placed = num_experts // group.size, -1, experts, None
    if placement is not None:
        where = as_tensor(placement, group.size)  # [P, L]
        local = where.shape[1]
        table, checksum = call(placement_table, where, num_experts, experts.device)
        places, placed = call(
            place, experts, table, num_experts, group.size, group.name
        )  # [T, K] each: the place among P * L, and the rank
    _check_numbers(experts, local, max_rows, align, group.size)
    signed = signature(experts, weights, num_experts, like, checksum, max_rows, check)
    return Routing(experts, weights, num_experts, places, placed, local, signed, check, align, group)


def _check(
    experts: Tensor, weights: Tensor, num_experts: int, divisor: int | None, like: list[Tensor], max_rows: int | None, align: int
) -> None:
    check_experts(experts, weights)
    check_tensor("weights", weights, "[T, K]", dims=2)
    check_floating("weights", weights)
    if differ(weights.shape[0], experts.shape[0]) or differ(weights.shape[1], experts.shape[1]):
        every = isinstance(num_experts, int) and guard_or_false(weights.shape[1] == num_experts)
        instead = "Take those of the chosen experts: weights.gather(1, experts)" if every else ""
        wrong_value("weights", f"of shape {list(weights.shape)}", f"of experts' shape {list(experts.shape)}", instead)
    if weights.device != experts.device:
        instead = "Move them: weights.to(experts.device)"
        wrong_value("weights", f"on {weights.device}", f"on experts' device, {experts.device}", instead)
    check_int("num_experts", num_experts)
    if num_experts < 1 or (divisor is not None and num_experts % divisor):
        must = "at least 1" if divisor is None else f"a positive multiple of the group's {divisor} ranks"
        wrong_value("num_experts", num_experts, must, _divisible_instead(num_experts, divisor))
    if experts.shape[1] < 1:
        wrong_value("experts", f"of shape {list(experts.shape)}, K = 0", "of K >= 1")
    for leaf in like:
        check_tensor("like", leaf, "[T, ...], or a pytree of them")
        if leaf.dim() == 0 or differ(leaf.shape[0], experts.shape[0]):
            wrong_value("like", f"of shape {list(leaf.shape)}", f"of shape [{experts.shape[0]}, ...], as experts has that many tokens")
    check_int("align", align)
    if align < 1:
        wrong_value("align", align, "at least 1")
    if max_rows is not None:
        if not isinstance(max_rows, int | torch.SymInt) or isinstance(max_rows, bool):
            share = "Of a share of the tokens make a number: math.ceil(max_rows * experts.shape[0])"
            wrong_type("max_rows", type(max_rows).__name__, "an int or None", int_instead("max_rows", max_rows, share))
        if guard_or_false(max_rows < 0):
            wrong_value("max_rows", max_rows, "0 or more")


def _divisible_instead(num_experts: int, ranks: int | None) -> str:
    if num_experts < 1 or ranks is None:
        return ""
    replicas = f"placement=moecomm.planner.place([1.0] * {num_experts}, {ranks}, {-(-num_experts // ranks)})"
    return f'Without group it is all ranks: pass group=mesh["ep"], or let a rank hold a replica: {replicas}'


def _check_numbers(experts: Tensor, local: int, max_rows: int | None, align: int, ranks: int) -> None:
    """Raise unless int32 indices can number the slots and the rows, as far as this rank knows their number."""
    k, rows = experts.shape[1], 0
    if max_rows is not None:
        check_slots(experts, MOST)
        if guard_or_false(ranks * max_rows * k > MOST):
            wrong_value("max_rows", max_rows, f"at most {MOST // (ranks * k)}, as int32 indices number the slots of all {ranks} ranks")
        rows = ranks * max_rows * min(k, local)
    if align > 1 and guard_or_false(rows + local * (align - 1) > MOST):
        wrong_value("align", align, f"at most {(MOST - rows) // local + 1}, as int32 indices number the rows, L * (align - 1) more")
