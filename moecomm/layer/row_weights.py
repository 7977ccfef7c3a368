"""row_weights: the weight of each expert row, for experts that multiply it in themselves."""

from __future__ import annotations

from torch import Tensor

from moecomm.errors import check_reverse_mode
from moecomm.inspect.profile import profiled
from moecomm.layer.combine import slot_weights
from moecomm.layer.plan import Plan
from moecomm.layer.token_calls import check_plan
from moecomm.ops.base.library import call
from moecomm.ops.rows.gather import gather


@profiled
def row_weights(plan: Plan) -> Tensor:
    """The weight of each row that `dispatch` gives, to multiply in before the experts' last matmul.

    A weighted `combine` keeps the experts' results [N, D] for its backward. An expert whose last layer is linear gives the
    same sum if the weights are multiplied into the activation [N, H] before that layer, and `combine` gets
    ``weighted=False``. The layer then keeps nothing of the size [N, D], and the product is part of the activation's kernel.

    Args:
        plan: the plan of these tokens.

    Returns:
        [N], of the dtype of the plan's weights: row n has the weight of its slot. Padding rows have 0. Where rows are of a
        lower precision, compute the activation in the weights' dtype, multiply, and round once: in bfloat16 the layer is then
        as exact as with a weighted `combine`, and torch.compile makes one kernel of it.

    Raises:
        TypeError: ``plan`` is not a `Plan`.
        NotImplementedError: inside a torch.func transform that differentiates, or for dual tensors.

    Example:
        >>> a_plan = plan(torch.tensor([[1, 0], [1, -1]]), torch.tensor([[0.5, 0.25], [1.0, 0.0]]), num_experts=2)
        >>> row_weights(a_plan)  # expert 0 has the second slot of token 0, expert 1 the first slots of both
        tensor([0.2500, 0.5000, 1.0000])
        >>> x = torch.tensor([[4.0], [8.0]])
        >>> combine(dispatch(x, a_plan) * row_weights(a_plan).unsqueeze(1), a_plan, weighted=False), combine(dispatch(x, a_plan), a_plan)
        (tensor([[3.],
                [8.]]), tensor([[3.],
                [8.]]))

    Backward: to the plan's weights, each from its own row, and from there to the tokens' ranks as for `combine`. If the rows
    are slices of the hidden dim, an all-to-all and an all-gather of R * K numbers add up the slices' parts. The backward can be
    differentiated again. There is no forward mode.

    Cost: a read and a write of N numbers. Nothing is sent in the forward pass.
    """
    check_plan(plan)
    check_reverse_mode("row_weights", [plan.weights])
    slots = slot_weights(plan).reshape(-1, 1)  # [R * K, 1]
    return call(gather, slots, plan.row_order, plan.row_position.reshape(-1, 1)).squeeze(1)
