"""dispatch and combine: send tokens to their experts' ranks, and sum the experts' rows back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, is_grad_enabled
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from moecomm.errors import check_floating, check_reverse_mode, check_tensor, differ, wrong_type, wrong_value
from moecomm.inspect.profile import profiled
from moecomm.layer.plan import Plan
from moecomm.ops.base.library import call
from moecomm.ops.base.signature import traced
from moecomm.ops.exchange import dispatch_combine as ops
from moecomm.ops.exchange.dispatch_combine_wire import combine_wire, dispatch_wire
from moecomm.ops.exchange.dispatch_combine_wire import dispatch_quantized as dispatch_quantized_op
from moecomm.ops.exchange.sum_ranks import sum_gradient
from moecomm.ops.rows.gather import gather
from moecomm.ops.rows.weighted_sum import weighted_sum
from moecomm.ops.rows.wire_formats import DTYPES, WIRES
from moecomm.parallel.agree import check_same_call
from moecomm.parallel.dtensor import check_rows, hidden_groups, placed, shard_of, to_local
from moecomm.parallel.group import resolve_group

Tree = TypeVar("Tree")
Result = TypeVar("Result")


class Quantized(NamedTuple):
    """The result of `dispatch_quantized`: 8-bit rows and their scales.

    Value d of row n is data[n, d] * scales[n, d // 128]; with wire "mxfp8" it is data[n, d] * scales[n, d // 32].

    Example:
        >>> a_plan = plan(torch.tensor([[0]]), torch.ones(1, 1), num_experts=1)
        >>> data, scales, _ = dispatch_quantized(torch.tensor([[7.0, 0.5]]), a_plan, "mxfp8")
        >>> data.float(), scales.float()
        (tensor([[448.,  32.]]), tensor([[0.0156]]))
    """

    data: Tensor  # [N, D] float8_e4m3fn
    scales: Tensor  # [N, ceil(D / 128)] float32, or with wire "mxfp8" [N, ceil(D / 32)] float8_e8m0fnu
    rows: Tensor  # [N, D] of x's dtype, without values or memory: it receives the gradient of the rows


@profiled
def dispatch(x: Tree, plan: Plan, *, wire: str | None = None, backward_wire: str | None = None) -> Tree:
    """Send tokens to the ranks of their experts: one row per slot, grouped by local expert.

    Args:
        x: [T, ...], or a pytree of such tensors, any dtypes: this rank's tokens and the data that belongs to them.
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
        TypeError: a leaf of ``x`` is not a tensor; ``plan`` is not a `Plan`; a wire is not a string; ``x`` has a dtype that
            the wire does not support.
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
    _check_plan(plan)

    leaves, spec = tree_flatten(x)

    def shards() -> list[Tensor]:
        check_reverse_mode("dispatch", leaves)
        here = [shard_of("x", leaf, plan.layout) for leaf in leaves]
        for leaf in here:  # check all leaves before the first is sent
            _check_leaf("x", leaf, plan, plan.tokens, "T")
            check_wires("x", leaf, wire, backward_wire)
        return here

    here = _checked("dispatch", plan, {"x": x}, (wire, backward_wire), shards)
    return tree_unflatten([_dispatch(leaf, plan, wire, backward_wire) for leaf in here], spec)


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
        padding of static mode is zeros. ``rows`` [N, D] has x's dtype; see Backward.

    Raises:
        As `dispatch` does. None is not a valid ``wire``: TypeError.

    Example:
        >>> class Experts(torch.autograd.Function):  # one weight for all of them
        ...     @staticmethod
        ...     def forward(ctx, rows, data, scales, weight):
        ...         ctx.save_for_backward(weight)
        ...         return data.float() * scales.repeat_interleave(128, 1)[:, :data.shape[1]] * weight
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
    backward: they take ``rows`` as one more argument, and return the rows' gradient for it.
    """
    _check_plan(plan)

    def shard() -> Tensor:
        check_reverse_mode("dispatch_quantized", [x])
        here = shard_of("x", x, plan.layout)
        check_tensor("x", here, "[T, D]", dims=2)
        _check_leaf("x", here, plan, plan.tokens, "T")
        if wire is None:
            wrong_type("wire", "None", _listed(WIRES))
        check_wires("x", here, wire, backward_wire)
        return here

    x = _checked("dispatch_quantized", plan, {"x": x}, (wire, backward_wire), shard)
    indices = (plan.send_order, plan.send_position, plan.row_order, plan.row_position, plan.splits)
    return Quantized(*call(dispatch_quantized_op, x, *indices, plan.group, wire, backward_wire))


@profiled
def combine(rows: Tree, plan: Plan, *, wire: str | None = None, backward_wire: str | None = None) -> Tree:
    """Bring the experts' rows back to their tokens' ranks: the weighted sum of each token over its slots.

    ``y[t] = sum over j of weights[t, j] * (the row of slot j)``, over the slots that are not dropped. A token without any slot
    gets zeros. The weights are those of the plan.

    Args:
        rows: [N, ...], or a pytree of such plain tensors, floating dtypes: the expert's output for each row of `dispatch`. If
            x was sharded over the hidden dim, the rows are such slices. If x was Replicate, the rows are the same on those
            ranks.
        plan: the plan that the rows were dispatched with.
        wire: None, or the 8-bit format in which each rank's sum for a token travels, as in `dispatch`. Each of the sums that
            are added up then has that error. Other libraries do not round these sums.
        backward_wire: the same for the gradient on its way to the experts.

    Returns:
        [T, ...] for each tensor, with its dtype. If the plan was made of DTensors: a DTensor with the placements of the plan's
        ``like``, or of its experts.

    Raises:
        TypeError: a leaf of ``rows`` is not a tensor or not of a floating dtype; ``plan`` is not a `Plan`.
        ValueError: a leaf does not have the plan's N rows, is on another device, or is a DTensor.
        NotImplementedError, MoECommError, and errors of a wire: as `dispatch` does.
        All of these are raised before any token is sent.

    Example:
        >>> weights = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
        >>> a_plan = plan(torch.tensor([[0, 1], [1, -1]]), weights, num_experts=2)
        >>> combine(dispatch(torch.tensor([[4.0], [8.0]]), a_plan), a_plan)
        tensor([[3.],
                [8.]])

    Backward: ``rows`` get the dispatch of the gradient, weighted. The plan's weights get the dot product of the gradient and
    the row. It is one exchange. If the rows are slices of the hidden dim, an all-to-all and an all-gather of R * K numbers add
    up the slices' parts. The backward can be differentiated again; all ranks must do so alike. There is no forward mode.

    Cost: one exchange per tensor.

    Precision: each rank first sums over its own experts. Then the token's rank sums over the ranks, in the order of the token's
    slots. Both sums are in float32 (float64 for float64), and each is rounded to the rows' dtype.
    """
    _check_plan(plan)

    leaves, spec = tree_flatten(rows)

    def check() -> None:
        check_reverse_mode("combine", [plan.weights, *leaves])
        for leaf in leaves:  # check all leaves before the first is sent
            _check_leaf("rows", leaf, plan, plan.row_order.shape[0], "N")
            check_floating("rows", leaf)
            check_rows("rows", leaf, plan.layout)
            check_wires("rows", leaf, wire, backward_wire)

    _checked("combine", plan, {"rows": rows, "the plan's weights": plan.weights}, (wire, backward_wire), check)
    weights = plan.weights
    for group in hidden_groups(plan.layout):  # each rank's rows give only their slice's part of the weights' gradient
        weights = sum_gradient(weights, group.size, group.name)
    return tree_unflatten([placed(_combine(leaf, weights, plan, wire, backward_wire), plan.layout) for leaf in leaves], spec)


def _dispatch(x: Tensor, plan: Plan, wire: str | None, backward_wire: str | None) -> Tensor:
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))  # [T, D]
    indices = (plan.send_order, plan.send_position, plan.row_order, plan.row_position, plan.splits)
    if wire is not None or backward_wire is not None:
        rows = call(dispatch_wire, flat, *indices, plan.group, wire, backward_wire)
    elif plan.send_order is None or plan.send_position is None:
        rows = call(gather, flat, plan.row_order, plan.row_position)
    else:
        rows = call(ops.dispatch, flat, *indices, plan.group)  # [N, D]
    return rows.reshape(rows.shape[0], *x.shape[1:])


def _combine(rows: Tensor, weights: Tensor, plan: Plan, wire: str | None, backward_wire: str | None) -> Tensor:
    flat = rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))  # [N, D]
    indices = (plan.send_order, plan.send_position, plan.row_order, plan.row_position, plan.splits)
    if wire is not None or backward_wire is not None:
        y = call(combine_wire, flat, weights, *indices, plan.group, wire, backward_wire)
    elif plan.send_order is None or plan.send_position is None:
        y = call(weighted_sum, flat, weights, plan.row_order, plan.row_position)
    else:
        y = call(ops.combine, flat, weights, *indices, plan.group)  # [T, D]
    return y.reshape(y.shape[0], *rows.shape[1:])


def _check_plan(plan: Plan) -> None:
    if not isinstance(plan, Plan):
        wrong_type("plan", type(plan).__name__, "a Plan, as moecomm.functional.plan gives it")


def _checked(function: str, plan: Plan, passed: dict[str, Any], wires: tuple[Any, Any], check: Callable[[], Result]) -> Result:
    """Run ``check`` and return its result.

    For a plan with check=True, in eager code, also compare this call with the other ranks' calls; raise on all ranks if they
    differ.
    """
    if not plan.ticket or traced():
        return check()
    described: dict[str, object] = {"wire": repr(wires[0]), "backward_wire": repr(wires[1])}
    for argument, tree in passed.items():
        described |= {f"{argument}'s leaf {i}" if i else argument: _kind(leaf) for i, leaf in enumerate(tree_leaves(tree))}
    return check_same_call(function, plan.ticket, described, check, plan.row_order.device, resolve_group(plan.group))


def _kind(leaf: object) -> str:
    """The properties of a leaf that the messages, and the rank's part in the backward pass, depend on."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return type(leaf).__name__
    gradient = ", requires_grad" if leaf.requires_grad and is_grad_enabled() else ""
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(to_local(leaf).shape[1:])} a row{gradient}"


def _check_leaf(argument: str, value: Tensor, plan: Plan, size: int, symbol: str) -> None:
    check_tensor(argument, value, f"[{symbol}, ...], or a pytree of them")
    if value.dim() == 0 or differ(value.shape[0], size):
        wrong_value(argument, f"of shape {list(value.shape)}", f"of shape [{size}, ...], the plan's {symbol} = {size}")
    if value.device != plan.row_order.device:
        wrong_value(argument, f"on {value.device}", f"on the plan's device, {plan.row_order.device}")


def check_wires(argument: str, value: Tensor, wire: object, backward_wire: object) -> None:
    """Raise unless each wire is None, or a format in which rows of ``value`` can travel."""
    for name, given in (("wire", wire), ("backward_wire", backward_wire)):
        if given is None:
            continue
        if not isinstance(given, str):
            wrong_type(name, type(given).__name__, f"None, {_listed(WIRES)}")
        if given not in WIRES:
            wrong_value(name, repr(given), f"None, {_listed(WIRES)}")
        if value.dtype not in DTYPES:
            wrong_type(argument, f"of dtype {value.dtype}", f"of dtype float32, bfloat16 or float16, with {name} {given!r}")


def _listed(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))
