"""What dispatch and combine are called with: the checks on this rank and, with ``check=True``, against the others; and the ops' indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from moecomm.errors import check_tensor, differ, wrong_type, wrong_value
from moecomm.layer.plan import Plan
from moecomm.ops.base.signature import traced
from moecomm.ops.rows.wire_formats import DTYPES, WIRES
from moecomm.parallel.agree import check_same_call
from moecomm.parallel.dtensor import to_local
from moecomm.parallel.group import resolve_group

Result = TypeVar("Result")
PARTS = "mf.dispatch(x, plan).tensor_split(plan.offsets.tolist()[:-1])"  # rows of each local expert, in a message


def check_plan(plan: Plan, function: str = "", argument: str = "", value: object = None) -> None:
    """Raise unless ``plan`` is one. ``value`` is what ``function`` takes before it as ``argument``: the plan by mistake, perhaps."""
    if not isinstance(plan, Plan):
        instead = ""
        if isinstance(value, Plan):
            instead = f"The plan comes second: mf.{function}({argument}, plan)"
        elif isinstance(plan, tuple):
            instead = (
                "Make one: plan = mf.plan(experts, weights, num_experts)"
                if len(plan) < len(Plan._fields)
                else "Make it one: mf.Plan(*plan)"
            )
        wrong_type("plan", type(plan).__name__, "a Plan, as moecomm.functional.plan gives it", instead)


def checked(function: str, plan: Plan, passed: dict[str, Any], options: dict[str, Any], check: Callable[[], Result]) -> Result:
    """Run ``check`` and return its result.

    For a plan with check=True, in eager code, also compare this call with the other ranks' calls; raise on all ranks if they
    differ.
    """
    if not plan.ticket or traced():
        return check()
    described: dict[str, object] = {name: repr(value) for name, value in options.items()}
    for argument, tree in passed.items():
        described |= {f"{argument}'s leaf {i}" if i else argument: _kind(leaf) for i, leaf in enumerate(tree_leaves(tree))}
    return check_same_call(function, plan.ticket, described, check, plan.row_order.device, resolve_group(plan.group))


def _kind(leaf: object) -> str:
    """The properties of a leaf that the messages, and the rank's part in the backward pass, depend on."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return type(leaf).__name__
    gradient = ", requires_grad" if leaf.requires_grad and is_grad_enabled() else ""
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(to_local(leaf).shape[1:])} a row{gradient}"


def check_leaf(argument: str, value: Tensor, plan: Plan, size: int, symbol: str) -> None:
    check_tensor(argument, value, f"[{symbol}, ...], or a pytree of them")
    if value.dim() == 0 or differ(value.shape[0], size):
        must = f"of shape [{size}, ...], the plan's {symbol} = {size}"
        wrong_value(argument, f"of shape {list(value.shape)}", must, _fitting_instead(argument, value, plan, size))
    if value.device != plan.row_order.device:
        instead = f"Move it: {argument}.to(plan.offsets.device)"
        wrong_value(argument, f"on {value.device}", f"on the plan's device, {plan.row_order.device}", instead)


def _fitting_instead(argument: str, value: Tensor, plan: Plan, size: int) -> str:
    if value.dim() > 1 and guard_or_false(value.shape[0] * value.shape[1] == size):
        return f"Flatten the {'tokens' if argument == 'x' else 'rows'} first: {argument}.flatten(0, 1)"
    if argument == "x":
        return "Make the plan of the same tokens: plan = mf.plan(experts, weights, num_experts, like=x)"
    if value.dim() == 2 and guard_or_false(value.shape[1] == size):
        return "Transpose them: rows.T"
    if value.dim() > 0 and guard_or_false(value.shape[0] == plan.tokens):
        return "These may be tokens, of which the rows are made first: rows = mf.dispatch(x, plan)"
    return f"Give back all rows of this plan, one part an expert: torch.cat([f(part) for f, part in zip(my_experts, {PARTS})])"


def check_wires(argument: str, value: Tensor, wire: object, backward_wire: object) -> None:
    """Raise unless each wire is None, or a format in which rows of ``value`` can travel."""
    for name, given in (("wire", wire), ("backward_wire", backward_wire)):
        if given is None:
            continue
        if not isinstance(given, str):
            instead = f'Name the format: {name}="float8_e4m3"' if given is torch.float8_e4m3fn else ""
            wrong_type(name, type(given).__name__, f"None, {listed(WIRES)}", instead)
        if given not in WIRES:
            wrong_value(name, repr(given), f"None, {listed(WIRES)}")
        if value.dtype not in DTYPES:
            wrong_type(argument, f"of dtype {value.dtype}", f"of dtype float32, bfloat16 or float16, with {name} {given!r}")


def listed(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))


def leaves_of(tree: Any) -> tuple[list[Any], TreeSpec | None]:
    """The leaves of a pytree, and what `tree_of` needs to put leaves in their places."""
    return ([tree], None) if isinstance(tree, Tensor) else tree_flatten(tree)  # a tensor is its leaf: torch takes 4 us to say so


def tree_of(leaves: list[Any], spec: TreeSpec | None) -> Any:
    return leaves[0] if spec is None else tree_unflatten(leaves, spec)


def indices(plan: Plan) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:
    """The arguments of the ops that describe the pairs and the rows."""
    return plan.send_order, plan.send_position, plan.row_order, plan.row_position, plan.splits
