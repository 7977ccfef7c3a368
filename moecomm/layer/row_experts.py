"""row_experts: the local expert of each row, for experts that look their parameters up by row."""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.inspect.profile import profiled
from moecomm.layer.plan import Plan
from moecomm.layer.token_calls import check_plan


@profiled
def row_experts(plan: Plan) -> Tensor:
    """The local expert of each row that `dispatch` gives, such as to add a bias: ``rows + bias[row_experts(plan)]``.

    Args:
        plan: the plan of these tokens.

    Returns:
        [N] int32: an index in [0, L) into the experts of this rank, in ascending order. Padding rows, which static mode and
        ``align`` add, have -1. As an index of a tensor that is the last expert, so a lookup stays within the parameters, and
        `combine` ignores what a padding row gives. Before another grouped_mm give padding a row of its own, as in
        ``F.pad(bias, (0, 0, 0, 1))[row_experts(plan)]``: grouped_mm does not write the gradient of padding, which may be NaN.

    Raises:
        TypeError: ``plan`` is not a `Plan`.

    Example:
        >>> a_plan = plan(torch.tensor([[1, 0], [1, -1]]), torch.ones(2, 2), num_experts=2)
        >>> row_experts(a_plan)
        tensor([0, 1, 1], dtype=torch.int32)
        >>> bias = torch.tensor([[10.0], [20.0]])
        >>> combine(dispatch(torch.zeros(2, 1), a_plan) + bias[row_experts(a_plan)], a_plan)
        tensor([[30.],
                [20.]])

    Backward: none; the result is integer.

    Cost: a binary search among the L ends of the experts for each row. Nothing is sent.
    """
    check_plan(plan)
    rows = torch.arange(plan.row_order.shape[0], dtype=torch.int32, device=plan.offsets.device)
    experts = torch.searchsorted(plan.offsets, rows, right=True, out_int32=True)
    return experts.masked_fill(plan.row_order < 0, -1)
