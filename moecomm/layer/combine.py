"""combine: sum the experts' rows back to their tokens' ranks."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from moecomm.errors import check_floating, check_reverse_mode, wrong_type
from moecomm.inspect.profile import profiled
from moecomm.layer.plan import Plan
from moecomm.layer.row_dtype import check_dtype, in_one_dtype
from moecomm.layer.token_calls import check_leaf, check_plan, check_wires, checked, indices, leaves_of, tree_of
from moecomm.ops.base.library import call
from moecomm.ops.exchange import dispatch_combine as ops
from moecomm.ops.exchange.dispatch_combine_wire import combine_wire
from moecomm.ops.exchange.sum_ranks import sum_gradient
from moecomm.ops.rows.weighted_sum import weighted_sum
from moecomm.parallel.dtensor import check_rows, hidden_groups, placed

Tree = TypeVar("Tree")


@profiled
def combine(
    rows: Tree, plan: Plan, *, weighted: bool = True, dtype: torch.dtype | None = None, wire: str | None = None,
    backward_wire: str | None = None,
) -> Tree:  # fmt: skip
    """Bring the experts' rows back to their tokens' ranks: the weighted sum of each token over its slots.

    ``y[t] = sum over j of weights[t, j] * (the row of slot j)``, over the slots that are not dropped. A token without any slot
    gets zeros. The weights are those of the plan.

    Args:
        rows: [N, ...], or a pytree of such plain tensors, floating dtypes: the expert's output for each row of `dispatch`. If
            x was sharded over the hidden dim, the rows are such slices. If x was Replicate, the rows are the same on those
            ranks.
        plan: the plan that the rows were dispatched with.
        weighted: False for the plain sum, for experts that multiply `row_weights` in themselves. It keeps no rows for its
            backward. Pass the same on all ranks.
        dtype: None, or the dtype of the result, the same on all ranks: float64, float32, bfloat16 or float16. Rows of another
            dtype are cast to it before they are sent. None, in this order:
            - under autocast, autocast's dtype, as in `torch.matmul`; float64 rows stay as they are;
            - the dtype of the plan's ``like``, if ``rows`` is one tensor. If ``like`` is a pytree, its first leaf counts;
            - the rows' own.
        wire: None, or the 8-bit format in which each rank's sum for a token travels, as in `dispatch`. Each of the sums that
            are added up then has that error. Other libraries do not round these sums.
        backward_wire: the same for the gradient on its way to the experts.

    Returns:
        [T, ...] for each tensor, in the dtype that ``dtype`` describes. If the plan was made of DTensors: a DTensor with the
        placements of the plan's ``like``, or of its experts.

    Raises:
        TypeError: a leaf of ``rows`` is not a tensor, or not of one of the four dtypes; ``plan`` is not a `Plan`; ``weighted``
            is not a bool; ``dtype`` is not one of the four or None.
        ValueError: a leaf does not have the plan's N rows, is on another device, or is a DTensor.
        NotImplementedError, MoECommError, and errors of a wire: as `dispatch` does.
        All of these are raised before any token is sent.
        MoECommError: another rank's rows were narrower, without autocast, ``like`` and ``dtype``. See Alike on all ranks.

    Example:
        >>> weights = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
        >>> a_plan = plan(torch.tensor([[0, 1], [1, -1]]), weights, num_experts=2)
        >>> combine(dispatch(torch.tensor([[4.0], [8.0]]), a_plan), a_plan)
        tensor([[3.],
                [8.]])
        >>> combine(dispatch(torch.tensor([[4.0], [8.0]]), a_plan), a_plan, dtype=torch.bfloat16)
        tensor([[3.],
                [8.]], dtype=torch.bfloat16)

    Alike on all ranks: experts without rows may give another dtype than those with rows, as in ``h = r @ w if r.shape[0] else r``
    under autocast. That is right under autocast, or with ``like`` or ``dtype``. In other cases the rows have the same dtype on
    all ranks, and the same width in every case: where another rank's rows are narrower, this rank raises a MoECommError; where
    they are wider, gloo ends this process. The rows require a gradient alike, too, where neither x nor the plan's weights do:
    ``h = r @ w`` gives all of that without rows as well. docs/reliability.md has the details.

    Backward: ``rows`` get the dispatch of the gradient, weighted. The plan's weights get the dot product of the gradient and
    the row; without ``weighted`` they get nothing here. It is one exchange. If the rows are slices of the hidden dim, an
    all-to-all and an all-gather of R * K numbers add up the slices' parts. The backward can be differentiated again; all ranks
    must do so alike. There is no forward mode.

    Cost: one exchange per tensor.

    Precision: each rank first sums over its own experts. Then the token's rank sums over the ranks, in the order of the token's
    slots. Both sums are in float32 (float64 for float64), and each is rounded to the result's dtype. Weights keep their own
    precision, whatever their size: float16 rows with float32 weights of 1e-8 or 1e5 are as precise as others. On CPUs a weight
    counts with a relative error of at most 2^-16 where the rows are float16 or bfloat16.
    """
    check_plan(plan, "combine", "rows", rows)

    leaves, spec = leaves_of(rows)
    leaves = in_one_dtype(leaves, plan, dtype)

    def check() -> None:
        if not isinstance(weighted, bool):
            wrong_type("weighted", type(weighted).__name__, "a bool")
        check_dtype(dtype)
        check_reverse_mode("combine", [plan.weights, *leaves])
        for leaf in leaves:  # check all leaves before the first is sent
            check_leaf("rows", leaf, plan, plan.row_order.shape[0], "N")
            check_floating("rows", leaf)
            check_rows("rows", leaf, plan.layout)
            check_wires("rows", leaf, wire, backward_wire)

    passed = {"rows": leaves, "the plan's weights": plan.weights} if weighted else {"rows": leaves}
    checked("combine", plan, passed, {"weighted": weighted, "wire": wire, "backward_wire": backward_wire}, check)
    weights = slot_weights(plan) if weighted else None
    return tree_of([placed(_combine(leaf, weights, plan, wire, backward_wire), plan.layout) for leaf in leaves], spec)


def slot_weights(plan: Plan) -> Tensor:
    """[R, K]: the plan's weights. Where rows are slices of the hidden dim, each rank gives a part of their gradient: the backward sums."""
    weights = plan.weights
    for group in hidden_groups(plan.layout):
        weights = sum_gradient(weights, group.size, group.name)
    return weights


def _combine(rows: Tensor, weights: Tensor | None, plan: Plan, wire: str | None, backward_wire: str | None) -> Tensor:
    flat = rows if rows.dim() == 2 else rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))  # [N, D]
    if wire is not None or backward_wire is not None:
        y = call(combine_wire, flat, weights, *indices(plan), plan.group, wire, backward_wire)
    elif plan.send_order is None or plan.send_position is None:
        y = call(weighted_sum, flat, weights, plan.row_order, plan.row_position)
    else:
        y = call(ops.combine, flat, weights, *indices(plan), plan.group)  # [T, D]
    return y if rows.dim() == 2 else y.reshape(y.shape[0], *rows.shape[1:])  # no view: FSDP2 hangs hooks on results
