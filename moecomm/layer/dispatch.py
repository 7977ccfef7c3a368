"""dispatch: send tokens to their experts' ranks."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from moecomm.errors import check_gradient_summed, check_reverse_mode, check_sent, check_tensor, wrong_type
from moecomm.inspect.profile import profiled
from moecomm.layer.plan import Plan
from moecomm.layer.quantized import Quantized
from moecomm.layer.token_calls import check_leaf, check_plan, check_wires, checked, indices, leaves_of, listed, tree_of
from moecomm.ops.base.library import call
from moecomm.ops.exchange import dispatch_combine as ops
from moecomm.ops.exchange.dispatch_combine_wire import dispatch_quantized as dispatch_quantized_op
from moecomm.ops.exchange.dispatch_combine_wire import dispatch_wire
from moecomm.ops.rows.gather import gather
from moecomm.ops.rows.wire_formats import WIRES
from moecomm.parallel.dtensor import shard_of

Tree = TypeVar("Tree")


@profiled
def dispatch(x: Tree, plan: Plan, *, wire: str | None = None, backward_wire: str | None = None) -> Tree:
    """Send tokens to the ranks of their experts: one row per slot, grouped by local expert.

    Args:
        x: [T, ...], or a pytree of such tensors: this rank's tokens and the data that belongs to them. Any dtypes but quantized
            ones and integers of less than a byte. A tensor that requires a gradient is float64, float32, bfloat16, float16 or
            complex.
        plan: the plan of these tokens.
        wire: None, or the 8-bit format in which rows travel, for x of float32, bfloat16 or float16:
            - "float8_e4m3": 8 bits per value, and one float32 scale for each 128 values of a row;
            - "mxfp8": 8 bits per value, and one power of two as scale for each 32 values of a row.
            The last block of a row may be shorter. Pass the same wire on all ranks.
        backward_wire: the same for the gradient on its way back. None sends it unchanged.

    Returns:
        [N, ...] for each tensor, with its dtype. The rows of local expert e are ``rows[offsets[e - 1]:offsets[e]]``, ordered
        by source rank, then by token. For a DTensor too the result is a plain tensor.

    Raises:
        TypeError: a leaf of ``x`` is not a tensor, or not of such a dtype; ``plan`` is not a `Plan`; a wire is not a string;
            ``x`` has a dtype that the wire does not support.
        ValueError: a leaf does not have the plan's T tokens, is on another device, or is a DTensor with other placements
            than the plan's; a wire is unknown.
        NotImplementedError: inside a torch.func transform that differentiates, or for dual tensors.
        MoECommError: the plan has ``check=True``, and the ranks' calls differ in eager code. Raised on every rank.
        All of these are raised before any token is sent.

    Example:
        >>> a_plan = plan(torch.tensor([[1], [0], [1]]), torch.ones(3, 1), num_experts=2)
        >>> dispatch({"x": torch.tensor([[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]]), "position": torch.arange(3)}, a_plan)
        {'x': tensor([[2.0000, 2.5000],
                [1.0000, 1.5000],
                [3.0000, 3.5000]]), 'position': tensor([1, 0, 2])}
        >>> dispatch(torch.tensor([[4.0, 1.05], [1.0, 0.3], [0.0, 0.0]]), a_plan, wire="mxfp8")  # 1.05 is rounded to steps of 1 / 8
        tensor([[1.0000, 0.3125],
                [4.0000, 1.0000],
                [0.0000, 0.0000]])

    Backward: the combine without weights. The gradient of a token is the sum of the gradients of its rows, in one exchange.
    With a wire the gradient passes the rounding unchanged (a straight-through estimate). The backward can be differentiated
    again; all ranks must do so alike. There is no forward mode.

    Cost: one exchange per tensor.

    DTensors: the local shard of ``x`` is sent. ``x`` has the placements of the DTensors that the plan was made of: Shard(0) or
    Replicate on each mesh dim. Or it has the placements of the plan's ``like``, which may also be Shard over other dims than
    the tokens'. The rows are this rank's slice of the hidden dims. They are a plain tensor, because a DTensor cannot describe
    a number of rows that differs from rank to rank.

    Precision with a wire:

    - Let m be the largest magnitude in a block, or 2^-100 if that is more. The scale s is m / 448, or for "mxfp8" the
      smallest power of two that is at least m / 448.
    - A value v arrives with an error of at most max(2^-4 |v|, 2^-10 s), plus the rounding in float32 and to x's dtype.
    - Zeros arrive as zeros. NaN and infinities arrive as NaN.
    - Rows for this rank are rounded as well, also in a group of one: the result does not depend on where an expert is.
    - If the hidden dim is sharded, the blocks start at the beginning of each rank's slice.
    - If the ranks pass different wires, their messages differ in length: the exchange hangs, fails or delivers wrong data.
      The plan does not know the wire, so only a plan with ``check=True`` compares it.

    Sources: E4M3 has 3 bits of mantissa, and steps of 2^-9 below 2^-6 (OCP 8-bit Floating Point Specification 1.0). The blocks
    are those of DeepSeek-V3 (arXiv:2412.19437) and of the OCP Microscaling Formats Specification 1.0. DeepSeek-V3 sends tokens
    and the gradients of `combine` in 8 bits, and all sums in 16.
    """
    check_plan(plan, "dispatch", "x", x)

    leaves, spec = leaves_of(x)

    def shards() -> list[Tensor]:
        check_reverse_mode("dispatch", leaves)
        here = [shard_of("x", leaf, plan.layout) for leaf in leaves]
        for leaf in here:  # check all leaves before the first is sent
            check_leaf("x", leaf, plan, plan.tokens, "T")
            check_sent("x", leaf)
            check_gradient_summed("x", leaf)
            check_wires("x", leaf, wire, backward_wire)
        return here

    here = checked("dispatch", plan, {"x": x}, {"wire": wire, "backward_wire": backward_wire}, shards)
    return tree_of([_dispatch(leaf, plan, wire, backward_wire) for leaf in here], spec)


@profiled
def dispatch_quantized(x: Tensor, plan: Plan, wire: str, *, backward_wire: str | None = None) -> Quantized:
    """Dispatch tokens with a ``wire`` and return the rows still quantized, for experts that compute in 8 bits.

    It sends the same bytes as `dispatch` with this wire. The experts do not need to quantize the rows again.

    Args:
        x: [T, D], float32, bfloat16 or float16: this rank's tokens; a DTensor too, as in `dispatch`.
        plan: the plan of these tokens.
        wire: "float8_e4m3" or "mxfp8", the same on all ranks; `dispatch` describes them.
        backward_wire: the same for the gradient. None sends it unchanged.

    Returns:
        `Quantized`: ``data`` [N, D] float8_e4m3fn, and ``scales`` [N, ceil(D / 128)] float32 or, for "mxfp8",
        [N, ceil(D / 32)] float8_e8m0fnu. Both are contiguous; reorder the scales if your kernel needs another order. The
        padding of static mode is zeros. ``rows`` [N, D] has x's dtype; see Backward. `dequantize` gives the values.

    Raises:
        As `dispatch` does. None is not a valid ``wire``: TypeError.

    Example:
        >>> class Experts(torch.autograd.Function):  # one weight for all of them
        ...     @staticmethod
        ...     def forward(ctx, rows, data, scales, weight):
        ...         ctx.save_for_backward(weight)
        ...         return dequantize(Quantized(data, scales, rows)) * weight  # a scaled matmul of 8 bits, in your kernel
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         (weight,) = ctx.saved_tensors
        ...         return grad * weight, None, None, None
        >>> a_plan = plan(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
        >>> x = torch.tensor([[448.0, 1.05], [1.0, 0.3]], requires_grad=True)
        >>> sent = dispatch_quantized(x, a_plan, "float8_e4m3")
        >>> Experts.apply(sent.rows, sent.data, sent.scales, torch.tensor(2.0)).sum().backward()
        >>> sent.scales, x.grad
        (tensor([[0.0022],
                [1.0000]]), tensor([[2., 2.],
                [2., 2.]]))

    Backward: that of `dispatch`. An 8-bit tensor can only have an 8-bit gradient, so ``data`` and ``scales`` get none. The
    gradient goes to ``rows`` instead: [N, D] of x's dtype, without values and without memory. Your experts define their own
    backward: they take ``rows`` as one more argument, and return the rows' gradient for it. ``rows`` cannot be changed in place.
    """
    check_plan(plan, "dispatch_quantized", "x", x)

    def shard() -> Tensor:
        check_reverse_mode("dispatch_quantized", [x])
        here = shard_of("x", x, plan.layout)
        check_tensor("x", here, "[T, D]", dims=2)
        check_leaf("x", here, plan, plan.tokens, "T")
        if wire is None:
            wrong_type("wire", "None", listed(WIRES))
        check_wires("x", here, wire, backward_wire)
        return here

    x = checked("dispatch_quantized", plan, {"x": x}, {"wire": wire, "backward_wire": backward_wire}, shard)
    return Quantized(*call(dispatch_quantized_op, x, *indices(plan), plan.group, wire, backward_wire))


def _dispatch(x: Tensor, plan: Plan, wire: str | None, backward_wire: str | None) -> Tensor:
    if x.is_complex():  # as real and imaginary parts: the backward adds up real numbers
        parts = torch.view_as_real(x.resolve_conj())  # [T, ..., 2]
        return torch.view_as_complex(_dispatch(parts, plan, wire, backward_wire))
    flat = x if x.dim() == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:]))  # [T, D]
    if wire is not None or backward_wire is not None:
        rows = call(dispatch_wire, flat, *indices(plan), plan.group, wire, backward_wire)
    elif plan.send_order is None or plan.send_position is None:
        rows = call(gather, flat, plan.row_order, plan.row_position)
    else:
        rows = call(ops.dispatch, flat, *indices(plan), plan.group)  # [N, D]
    return rows if x.dim() == 2 else rows.reshape(rows.shape[0], *x.shape[1:])  # no view: FSDP2 hangs hooks on results
