"""dispatch and combine: tokens to their experts and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, is_grad_enabled
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from moecomm.errors import check_floating, check_reverse_mode, check_tensor, differ, wrong_type, wrong_value
from moecomm.inspect.profile import profiled
from moecomm.layer.plan import Plan
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
    """Rows as `dispatch_quantized` gives them: value d of row n is data[n, d] * scales[n, d // 128], or of "mxfp8" scales[n, d // 32].

    >>> a_plan = plan(torch.tensor([[0]]), torch.ones(1, 1), num_experts=1)
    >>> data, scales, _ = dispatch_quantized(torch.tensor([[7.0, 0.5]]), a_plan, "mxfp8")
    >>> data.float(), scales.float()
    (tensor([[448.,  32.]]), tensor([[0.0156]]))
    """

    data: Tensor  # [N, D] float8_e4m3fn
    scales: Tensor  # [N, ceil(D / 128)] float32, or with wire "mxfp8" [N, ceil(D / 32)] float8_e8m0fnu
    rows: Tensor  # [N, D] of x's dtype, without values or memory of its own: what the rows' gradient is the gradient of


@profiled
def dispatch(x: Tree, plan: Plan, *, wire: str | None = None, backward_wire: str | None = None) -> Tree:
    """The tokens of all ranks that chose an expert of this rank, a row for each slot, grouped by local expert.

    Args:
        x: [T, ...], or a pytree of such tensors, of any dtypes: this rank's tokens, and what belongs to them. Of a DTensor the local
            shard is meant; it is placed as the DTensors that the plan was made of, Shard(0) or Replicate on each mesh dim, or as its
            ``like``, which may also be Shard over other dims than the tokens'.
        plan: of these tokens.
        wire: None, or what a row is rounded to for its way, where x is float32, bfloat16 or float16: "float8_e4m3" is 8 bits a value and
            a float32 scale for each 128 of a row, the last block being what is left; "mxfp8" is 8 bits and a power of two for each 32.
        backward_wire: the same for the gradient on its way back; None sends it as it is.

    Returns [N, ...] for each tensor, of its dtype: the rows of local expert e are ``rows[offsets[e - 1]:offsets[e]]``, in the
    order of the source rank, then of the token. Each tensor is one exchange. For a DTensor too it is a plain tensor, of this rank's
    slice of the hidden dims: how many rows each rank has is its own affair, which no DTensor can say.

    Backward: the unweighted combine: the gradient of a token is the sum of the gradients of its rows, in one exchange. That can be
    differentiated again, on all ranks alike. There is no forward mode. It is the same with a wire: the gradient passes the rounding as
    it is (a straight-through estimate).

    With a wire. A value v of a block whose largest magnitude is m, or 2^-100 if that is more, arrives with an error of at most
    max(2^-4 |v|, 2^-10 s), where the scale s is m / 448 or, for "mxfp8", the next power of two from there on; and what is rounded in
    float32, and to x's dtype, in which it arrives. (E4M3 has 3 bits of mantissa, and steps of 2^-9 below 2^-6: OCP 8-bit Floating Point
    Specification 1.0. The blocks are those of DeepSeek-V3, arXiv:2412.19437, which sends tokens and the gradients of `combine` in 8 bits
    and all sums in 16, and of the OCP Microscaling Formats Specification 1.0.) Zeros arrive as zeros, NaN and infinities as NaN. Rows for
    this rank, and those in a group of one, are rounded as well: the result does not depend on where an expert is. Of a DTensor's slice of
    the hidden dim the blocks start anew. All ranks must pass the same: a plan is made earlier and knows nothing of it, so that this is
    not compared; where they differ, messages have other lengths, and the exchange hangs, fails or brings garbage.

    Raises TypeError where a leaf of ``x`` is no tensor or ``plan`` is no `Plan`, ValueError where one is not of the plan's T tokens or
    not on its device, or a DTensor that is placed otherwise than the plan's, NotImplementedError inside torch.func's transforms that
    differentiate and for dual tensors; for another wire, or another dtype than those, ValueError and TypeError; before anything is sent.

    >>> a_plan = plan(torch.tensor([[1], [0], [1]]), torch.ones(3, 1), num_experts=2)
    >>> dispatch({"x": torch.tensor([[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]]), "position": torch.arange(3)}, a_plan)
    {'x': tensor([[2.0000, 2.5000],
            [1.0000, 1.5000],
            [3.0000, 3.5000]]), 'position': tensor([1, 0, 2])}
    >>> dispatch(torch.tensor([[4.0, 1.05], [1.0, 0.3], [0.0, 0.0]]), a_plan, wire="mxfp8")  # 1.05 is rounded to steps of 1 / 8
    tensor([[1.0000, 0.3125],
            [4.0000, 1.0000],
            [0.0000, 0.0000]])
    """
    _check_plan(plan)

    leaves, spec = tree_flatten(x)

    def shards() -> list[Tensor]:
        check_reverse_mode("dispatch", leaves)
        here = [shard_of("x", leaf, plan.layout) for leaf in leaves]
        for leaf in here:  # all of them, before the first is sent
            _check_leaf("x", leaf, plan, plan.tokens, "T")
            check_wires("x", leaf, wire, backward_wire)
        return here

    here = _checked("dispatch", plan, {"x": x}, (wire, backward_wire), shards)
    return tree_unflatten([_dispatch(leaf, plan, wire, backward_wire) for leaf in here], spec)


@profiled
def dispatch_quantized(x: Tensor, plan: Plan, wire: str, *, backward_wire: str | None = None) -> Quantized:
    """What `dispatch` with a ``wire`` brings, as it arrives: for experts that compute in 8 bits, and need no rounding of their own.

    Args:
        x: [T, D], float32, bfloat16 or float16: this rank's tokens, a DTensor too, as `dispatch` takes them.
        plan: of these tokens.
        wire: "float8_e4m3" or "mxfp8", the same on all ranks; `dispatch` says what each is.
        backward_wire: the gradient's, or None, which sends it as it is.

    Returns `Quantized`: ``data`` [N, D] float8_e4m3fn, and ``scales`` [N, ceil(D / 128)] float32 or, for "mxfp8", [N, ceil(D / 32)]
    float8_e8m0fnu, both contiguous; a kernel that takes scales in another order has them put in that. Padding of static mode is zeros.

    Backward: that of `dispatch`. A tensor of 8 bits can have no gradient but of 8 bits, so that these two have none: the gradient of
    the rows is given to ``rows``, [N, D] of x's dtype, which has no values and takes no memory. The experts, whose backward is their own
    affair, take it as one more argument and give it the gradient.

    Raises as `dispatch` does.

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
    return Quantized(*dispatch_quantized_op(x, *indices, plan.group, wire, backward_wire))


@profiled
def combine(rows: Tree, plan: Plan, *, wire: str | None = None, backward_wire: str | None = None) -> Tree:
    """The experts' rows back at their tokens' ranks: each token's sum over its slots, weighted by the plan's weights.

    ``y[t] = sum over j of weights[t, j] * (the row of slot j)``, over the slots that are not dropped; zeros for a token without any. The
    sum over the experts of one rank is made there, and then the sum over the ranks in the order of the token's slots; in float32
    (float64 for float64), rounded to the rows' dtype after each of the two.

    Args:
        rows: [N, ...], or a pytree of such plain tensors, of floating dtypes: for each row that `dispatch` gave, what its expert made of
            it. Where x was in slices of the hidden dim, these are such slices; where it was Replicate, they are the same on those ranks.
        plan: the plan that the rows were dispatched with.
        wire: None, or what each rank's sum for a token is rounded to for its way, as `dispatch` says it of a row: each of the sums that
            are added up then has that error. Other libraries leave it at None.
        backward_wire: the same for the gradient on its way to the experts.

    Returns [T, ...] for each tensor, of its dtype. Each tensor is one exchange. Where the plan was made of DTensors, it is the DTensor
    that is placed as its ``like``, or as its experts.

    Backward: to the rows, the dispatch of the gradient, weighted; to the plan's weights, the dot product of the gradient and the row.
    One exchange; and where the rows are slices of the hidden dim, an all-to-all and an all-gather of R * K numbers, for the slices' sum.
    That can be differentiated again, on all ranks alike. There is no forward mode.

    Raises TypeError where a leaf of ``rows`` is no tensor or not of a floating dtype, or ``plan`` is no `Plan`; ValueError where one has
    not the plan's N rows, is not on its device or is a DTensor; NotImplementedError, and for a wire, as `dispatch` does; before anything
    is sent.

    >>> weights = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    >>> a_plan = plan(torch.tensor([[0, 1], [1, -1]]), weights, num_experts=2)
    >>> combine(dispatch(torch.tensor([[4.0], [8.0]]), a_plan), a_plan)
    tensor([[3.],
            [8.]])
    """
    _check_plan(plan)

    leaves, spec = tree_flatten(rows)

    def check() -> None:
        check_reverse_mode("combine", [plan.weights, *leaves])
        for leaf in leaves:  # all of them, before the first is sent
            _check_leaf("rows", leaf, plan, plan.row_order.shape[0], "N")
            check_floating("rows", leaf)
            check_rows("rows", leaf, plan.layout)
            check_wires("rows", leaf, wire, backward_wire)

    _checked("combine", plan, {"rows": rows, "the plan's weights": plan.weights}, (wire, backward_wire), check)
    weights = plan.weights
    for group in hidden_groups(plan.layout):  # the rows of a rank give only their slice's part of the weights' gradient
        weights = sum_gradient(weights, group.size, group.name)
    return tree_unflatten([placed(_combine(leaf, weights, plan, wire, backward_wire), plan.layout) for leaf in leaves], spec)


def _dispatch(x: Tensor, plan: Plan, wire: str | None, backward_wire: str | None) -> Tensor:
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))  # [T, D]
    indices = (plan.send_order, plan.send_position, plan.row_order, plan.row_position, plan.splits)
    if wire is not None or backward_wire is not None:
        rows = dispatch_wire(flat, *indices, plan.group, wire, backward_wire)
    elif plan.send_order is None or plan.send_position is None:
        rows = gather(flat, plan.row_order, plan.row_position)
    else:
        rows = ops.dispatch(flat, *indices, plan.group)  # [N, D]
    return rows.reshape(rows.shape[0], *x.shape[1:])


def _combine(rows: Tensor, weights: Tensor, plan: Plan, wire: str | None, backward_wire: str | None) -> Tensor:
    flat = rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))  # [N, D]
    indices = (plan.send_order, plan.send_position, plan.row_order, plan.row_position, plan.splits)
    if wire is not None or backward_wire is not None:
        y = combine_wire(flat, weights, *indices, plan.group, wire, backward_wire)
    elif plan.send_order is None or plan.send_position is None:
        y = weighted_sum(flat, weights, plan.row_order, plan.row_position)
    else:
        y = ops.combine(flat, weights, *indices, plan.group)  # [T, D]
    return y.reshape(y.shape[0], *rows.shape[1:])


def _check_plan(plan: Plan) -> None:
    if not isinstance(plan, Plan):
        wrong_type("plan", type(plan).__name__, "a Plan, as moecomm.functional.plan gives it")


def _checked(function: str, plan: Plan, passed: dict[str, Any], wires: tuple[Any, Any], check: Callable[[], Result]) -> Result:
    """What ``check`` gives; of a plan that was made with check=True, where all ranks called this function alike."""
    if not plan.ticket or traced():
        return check()
    described: dict[str, object] = {"wire": repr(wires[0]), "backward_wire": repr(wires[1])}
    for argument, tree in passed.items():
        described |= {f"{argument}'s leaf {i}" if i else argument: _kind(leaf) for i, leaf in enumerate(tree_leaves(tree))}
    return check_same_call(function, plan.ticket, described, check, plan.row_order.device, resolve_group(plan.group))


def _kind(leaf: object) -> str:
    """What the ranks' messages, and their part in the backward pass, depend on."""
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
    """Raise unless each is None or a wire that rows of ``value`` can travel by."""
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
