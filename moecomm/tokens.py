"""dispatch and combine: tokens to their experts and back."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from moecomm.dtensor import check_rows, hidden_groups, placed, shard_of
from moecomm.errors import check_floating, check_reverse_mode, check_tensor, differ, wrong_type, wrong_value
from moecomm.ops import tokens as ops
from moecomm.ops.gather import gather
from moecomm.ops.sums import sum_gradient
from moecomm.ops.weighted_sum import weighted_sum
from moecomm.plan import Plan
from moecomm.profile import profiled

Tree = TypeVar("Tree")


@profiled
def dispatch(x: Tree, plan: Plan) -> Tree:
    """The tokens of all ranks that chose an expert of this rank, a row for each slot, grouped by local expert.

    Args:
        x: [T, ...], or a pytree of such tensors, of any dtypes: this rank's tokens, and what belongs to them. Of a DTensor the local
            shard is meant; it is placed as the DTensors that the plan was made of, Shard(0) or Replicate on each mesh dim, or as its
            ``like``, which may also be Shard over other dims than the tokens'.
        plan: of these tokens.

    Returns [N, ...] for each tensor, of its dtype: the rows of local expert e are ``rows[offsets[e - 1]:offsets[e]]``, in the
    order of the source rank, then of the token. Each tensor is one exchange. For a DTensor too it is a plain tensor, of this rank's
    slice of the hidden dims: how many rows each rank has is its own affair, which no DTensor can say.

    Backward: the unweighted combine: the gradient of a token is the sum of the gradients of its rows, in one exchange. That can be
    differentiated again, on all ranks alike. There is no forward mode.

    Raises TypeError where a leaf of ``x`` is no tensor or ``plan`` is no `Plan`, ValueError where one is not of the plan's T tokens or
    not on its device, or a DTensor that is placed otherwise than the plan's, NotImplementedError inside torch.func's transforms that
    differentiate and for dual tensors; before anything is sent.

    >>> a_plan = plan(torch.tensor([[1], [0], [1]]), torch.ones(3, 1), num_experts=2)
    >>> dispatch({"x": torch.tensor([[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]]), "position": torch.arange(3)}, a_plan)
    {'x': tensor([[2.0000, 2.5000],
            [1.0000, 1.5000],
            [3.0000, 3.5000]]), 'position': tensor([1, 0, 2])}
    """
    _check_plan(plan)
    check_reverse_mode("dispatch", tree_leaves(x))
    x = tree_map(lambda leaf: shard_of("x", leaf, plan.layout), x)
    for leaf in tree_leaves(x):  # all of them, before the first is sent
        _check_leaf("x", leaf, plan, plan.tokens, "T")
    return tree_map(lambda leaf: _dispatch(leaf, plan), x)


@profiled
def combine(rows: Tree, plan: Plan) -> Tree:
    """The experts' rows back at their tokens' ranks: each token's sum over its slots, weighted by the plan's weights.

    ``y[t] = sum over j of weights[t, j] * (the row of slot j)``, over the slots that are not dropped; zeros for a token without any. The
    sum over the experts of one rank is made there, and then the sum over the ranks in the order of the token's slots; in float32
    (float64 for float64), rounded to the rows' dtype after each of the two.

    Args:
        rows: [N, ...], or a pytree of such plain tensors, of floating dtypes: for each row that `dispatch` gave, what its expert made of
            it. Where x was in slices of the hidden dim, these are such slices; where it was Replicate, they are the same on those ranks.
        plan: the plan that the rows were dispatched with.

    Returns [T, ...] for each tensor, of its dtype. Each tensor is one exchange. Where the plan was made of DTensors, it is the DTensor
    that is placed as its ``like``, or as its experts.

    Backward: to the rows, the dispatch of the gradient, weighted; to the plan's weights, the dot product of the gradient and the row.
    One exchange; and where the rows are slices of the hidden dim, an all-to-all and an all-gather of R * K numbers, for the slices' sum.
    That can be differentiated again, on all ranks alike. There is no forward mode.

    Raises TypeError where a leaf of ``rows`` is no tensor or not of a floating dtype, or ``plan`` is no `Plan`; ValueError where one has
    not the plan's N rows, is not on its device or is a DTensor; NotImplementedError as `dispatch` does; before anything is sent.

    >>> weights = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    >>> a_plan = plan(torch.tensor([[0, 1], [1, -1]]), weights, num_experts=2)
    >>> combine(dispatch(torch.tensor([[4.0], [8.0]]), a_plan), a_plan)
    tensor([[3.],
            [8.]])
    """
    _check_plan(plan)
    check_reverse_mode("combine", [plan.weights, *tree_leaves(rows)])
    for leaf in tree_leaves(rows):  # all of them, before the first is sent
        _check_leaf("rows", leaf, plan, plan.row_order.shape[0], "N")
        check_floating("rows", leaf)
        check_rows("rows", leaf, plan.layout)
    weights = plan.weights
    for group in hidden_groups(plan.layout):  # the rows of a rank give only their slice's part of the weights' gradient
        weights = sum_gradient(weights, group.size, group.name)
    return tree_map(lambda leaf: placed(_combine(leaf, weights, plan), plan.layout), rows)


def _dispatch(x: Tensor, plan: Plan) -> Tensor:
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))  # [T, D]
    if plan.send_order is None or plan.send_position is None:
        rows = gather(flat, plan.row_order, plan.row_position)
    else:
        indices = (plan.send_order, plan.send_position, plan.row_order, plan.row_position, plan.splits)
        rows = ops.dispatch(flat, *indices, plan.group)  # [N, D]
    return rows.reshape(rows.shape[0], *x.shape[1:])


def _combine(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    flat = rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))  # [N, D]
    if plan.send_order is None or plan.send_position is None:
        y = weighted_sum(flat, weights, plan.row_order, plan.row_position)
    else:
        indices = (plan.send_order, plan.send_position, plan.row_order, plan.row_position, plan.splits)
        y = ops.combine(flat, weights, *indices, plan.group)  # [T, D]
    return y.reshape(y.shape[0], *rows.shape[1:])


def _check_plan(plan: Plan) -> None:
    if not isinstance(plan, Plan):
        wrong_type("plan", type(plan).__name__, "a Plan, as moecomm.functional.plan gives it")


def _check_leaf(argument: str, value: Tensor, plan: Plan, size: int, symbol: str) -> None:
    check_tensor(argument, value, f"[{symbol}, ...], or a pytree of them")
    if value.dim() == 0 or differ(value.shape[0], size):
        wrong_value(argument, f"of shape {list(value.shape)}", f"of shape [{size}, ...], the plan's {symbol} = {size}")
    if value.device != plan.row_order.device:
        wrong_value(argument, f"on {value.device}", f"on the plan's device, {plan.row_order.device}")
