"""Ranks that call different things, or one in different ways: the same error on all, before a token is sent, and a group that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import moecomm.functional as mf
from moecomm.errors import ExpertIdError, MoECommError
from moecomm.ops.base.signature import SIGNED, signature
from tests.faults.test_bad_input import assert_the_group_still_works
from tests.spawn import run_ranks
from tests.traffic import Traffic

T, D, K, E = 6, 5, 2, 4
PLACEMENT = [[1, 0], [3, 2]]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(T, D), torch.arange(T * K).view(T, K) % E, torch.ones(T, K)


def plan(**changed: Any) -> None:
    x, experts, weights = inputs()
    mf.plan(**{"experts": experts, "weights": weights, "num_experts": E, "like": x, **changed})


def without_gradients() -> None:
    with torch.no_grad():
        plan(weights=torch.ones(T, K, requires_grad=True))


def two_plans(first: int, then: int) -> None:
    for num_experts in (first, then):
        plan(num_experts=num_experts)


CALLS: dict[str, Callable[[], None]] = {
    "plan": plan,
    "plan with check": lambda: plan(check=True),
    "static": lambda: plan(max_rows=T, check=True),
    "static, shorter": lambda: plan(max_rows=T - 1, check=True),
    "plan of weights with a gradient": lambda: plan(weights=torch.ones(T, K, requires_grad=True)),
    "plan of like with a gradient": lambda: plan(like=torch.ones(T, D, requires_grad=True)),
    "plan under no_grad": without_gradients,
    "plan with a companion": lambda: plan(like=(torch.ones(T, D), torch.ones(T, 3))),
    "plan with a wider companion": lambda: plan(like=(torch.ones(T, D), torch.ones(T, 4))),
    "plan with a companion of integers": lambda: plan(like={"x": torch.ones(T, D), "y": torch.ones(T, 3, dtype=torch.int64)}),
    "sync_params_": lambda: mf.sync_params_(torch.ones(3), None),
    "sync_replicas_": lambda: mf.sync_replicas_(torch.ones(2, 3), PLACEMENT),
    "4 experts, then 8": lambda: two_plans(4, 8),
    "8 experts, then 4": lambda: two_plans(8, 4),
}
NO_EXPERT = "Ids count from 0, and a slot without an expert is -1: experts.masked_fill(experts == num_experts, -1)"
SAME = "it must be the same on every rank"
CASES = [
    ("plan", "static", "function was plan on rank 0, plan with max_rows on rank 1 of the group"),
    ("plan", "plan with check", "check was False on rank 0, True on rank 1 of the group"),
    ("plan", "sync_params_", "function was plan on rank 0, sync_params_ on rank 1 of the group"),
    ("sync_replicas_", "sync_params_", "function was sync_replicas_ on rank 0, sync_params_ on rank 1 of the group"),
    ("static", "sync_replicas_", "function was plan with max_rows on rank 0, sync_replicas_ on rank 1 of the group"),
    ("static", "static, shorter", "max_rows was 6 on rank 0, 5 on rank 1 of the group"),
    (
        "plan",
        "plan of weights with a gradient",
        "requires_grad was of neither weights nor like on rank 0, of weights on rank 1 of the group",
    ),
    ("plan of like with a gradient", "plan", "requires_grad was of like on rank 0, of neither weights nor like on rank 1 of the group"),
    (
        "plan under no_grad",
        "plan of weights with a gradient",
        "requires_grad was of neither weights nor like on rank 0, of weights on rank 1 of the group",
    ),
    ("plan", "plan with a companion", "like's other tensors was not given on rank 0, of checksum "),
    ("plan with a wider companion", "plan with a companion", "like's other tensors was of checksum "),
    ("plan with a companion", "plan with a companion of integers", "like's other tensors was of checksum "),
    ("4 experts, then 8", "8 experts, then 4", "num_experts was 4 on rank 0, 8 on rank 1 of the group"),
]


def raised_here(pairs: list[tuple[str, str]]) -> list[str]:
    texts = []
    for pair in pairs:
        with Traffic() as traffic, pytest.raises(MoECommError) as raised:
            CALLS[pair[dist.get_rank()]]()
        assert len(traffic.bytes) == 1, "the check is a message of its own"
        assert type(raised.value) is MoECommError
        assert_the_group_still_works()
        texts.append(str(raised.value))
    return texts


def test_ranks_that_call_different_things_get_the_same_error_from_the_one_message_that_is_sent_anyway() -> None:
    first, second = run_ranks(raised_here, 2, [case[:2] for case in CASES])
    assert first == second
    for text, (*_, begin) in zip(first, CASES, strict=True):
        assert text.startswith(begin)
        assert text.endswith(SAME)


def calls_here() -> None:
    """Each of them, made by all ranks, raises nothing."""
    for call in CALLS.values():
        call()


def test_ranks_that_agree_raise_nothing() -> None:
    run_ranks(calls_here, 2)


def test_the_checksum_of_companions_is_the_same_in_code_of_64_bits_that_does_not_know_their_sizes() -> None:
    """Inductor's C++ computes it in int64, eager code in Python's ints: no step of it may pass 2^63 - 1."""
    companions = [torch.ones(T, 2**20 + i, dtype=torch.uint8) for i in range(6)]
    names = SIGNED.index("like's other tensors")
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = [
            mode.from_tensor(leaf, symbolic_context=StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC]))
            for leaf in companions
        ]
        checksum = signature(*inputs()[1:], E, fakes)[names].node
    assert checksum.expr.free_symbols
    values = {symbol: int(mode.shape_env.backed_var_to_val[symbol]) for symbol in checksum.expr.free_symbols}
    for step in sympy.preorder_traversal(checksum.expr):
        assert abs(int(step.xreplace(values))) < 2**63
    assert int(checksum.expr.xreplace(values)) == signature(*inputs()[1:], E, companions)[names]


def checked(num_experts: int = E, **changed: Any) -> mf.Plan:
    _, experts, weights = inputs()
    return mf.plan(experts, weights, num_experts, check=True, **changed)


def then_combine(plan: mf.Plan, x: Tensor) -> Tensor:
    return mf.combine(mf.dispatch(x, plan), plan)


# What each of two ranks does with two plans that both made with check=True, and the error that both get.
LATER: dict[str, tuple[Callable[[mf.Plan, mf.Plan], object], Callable[[mf.Plan, mf.Plan], object], str]] = {
    "one more dispatch": (
        lambda first, second: (mf.dispatch(inputs()[0], first), plan()),
        lambda first, second: (mf.dispatch(inputs()[0], first), mf.dispatch(inputs()[0], first)),
        "function was plan on rank 0, dispatch on rank 1 of the group; it must be the same on every rank",
    ),
    "another function": (
        lambda first, second: mf.dispatch(torch.ones(T, D), first),
        lambda first, second: mf.combine(torch.ones(first.row_order.shape[0], D), first),
        "function was dispatch on rank 0, combine on rank 1 of the group; it must be the same on every rank",
    ),
    "a quantised one": (
        lambda first, second: mf.dispatch(torch.ones(T, D), first, wire="mxfp8"),
        lambda first, second: mf.dispatch_quantized(torch.ones(T, D), first, "mxfp8"),
        "function was dispatch on rank 0, dispatch_quantized on rank 1 of the group; it must be the same on every rank",
    ),
    "another order": (
        lambda first, second: (mf.dispatch(torch.ones(T, D), first), mf.dispatch(torch.ones(T, D), second)),
        lambda first, second: (mf.dispatch(torch.ones(T, D), second), mf.dispatch(torch.ones(T, D), first)),
        "plan was number FIRST on rank 0, number SECOND on rank 1 of the group; dispatch must be called alike on every rank",
    ),
    "another width": (
        lambda first, second: mf.dispatch(torch.ones(T, D), first),
        lambda first, second: mf.dispatch(torch.ones(T, D, 2), first),
        "x was float32 [5] a row on rank 0, float32 [5, 2] a row on rank 1 of the group; dispatch must be called alike on every rank",
    ),
    "a companion of another dtype": (
        lambda first, second: mf.dispatch([torch.ones(T, D), torch.ones(T)], first),
        lambda first, second: mf.dispatch([torch.ones(T, D), torch.ones(T, dtype=torch.int32)], first),
        "x's leaf 1 was float32 [] a row on rank 0, int32 [] a row on rank 1 of the group; dispatch must be called alike on every rank",
    ),
    "a companion that is missing": (
        lambda first, second: mf.dispatch([torch.ones(T, D), torch.ones(T)], first),
        lambda first, second: mf.dispatch([torch.ones(T, D)], first),
        "x's leaf 1 was float32 [] a row on rank 0, missing on rank 1 of the group; dispatch must be called alike on every rank",
    ),
    "a companion of another T": (
        lambda first, second: mf.dispatch([torch.ones(T, D), torch.ones(T)], first),
        lambda first, second: mf.dispatch([torch.ones(T, D), torch.ones(T + 1)], first),
        "what was passed was as it must be on rank 0, refused (x was of shape [7]; it must be of shape [6, ...], the plan's T = 6. "
        "Make the plan of the same tokens: plan = mf.plan(experts, weights, num_experts, like=x)) on rank 1 of the group; dispatch "
        "must be called alike on every rank",
    ),
    "gradients of x": (
        lambda first, second: mf.dispatch(torch.ones(T, D, requires_grad=True), first),
        lambda first, second: mf.dispatch(torch.ones(T, D), first),
        "x was float32 [5] a row, requires_grad on rank 0, float32 [5] a row on rank 1 of the group; dispatch must be called alike on "
        "every rank",
    ),
    "gradients of rows": (
        lambda first, second: then_combine(first, torch.ones(T, D)),
        lambda first, second: mf.combine(mf.dispatch(torch.ones(T, D), first).requires_grad_(), first),
        "rows was float32 [5] a row on rank 0, float32 [5] a row, requires_grad on rank 1 of the group; combine must be called alike on "
        "every rank",
    ),
    "another wire": (
        lambda first, second: mf.dispatch(torch.ones(T, D), first, wire="mxfp8"),
        lambda first, second: mf.dispatch(torch.ones(T, D), first),
        "wire was 'mxfp8' on rank 0, None on rank 1 of the group; dispatch must be called alike on every rank",
    ),
    "a transform of torch.func": (
        lambda first, second: mf.dispatch(torch.ones(T, D), first),
        lambda first, second: torch.func.grad(lambda x: mf.dispatch(x, first).sum())(torch.ones(T, D)),
        "what was passed was as it must be on rank 0, refused (dispatch was called inside a Grad transform of torch.func; it must be "
        "called outside: torch.autograd.grad and backward differentiate it, as many times as you like) on rank 1 of the group; dispatch "
        "must be called alike on every rank",
    ),
    "another backward wire": (
        lambda first, second: then_combine(first, torch.ones(T, D)),
        lambda first, second: mf.combine(mf.dispatch(torch.ones(T, D), first), first, backward_wire="mxfp8"),
        "backward_wire was None on rank 0, 'mxfp8' on rank 1 of the group; combine must be called alike on every rank",
    ),
}


def later_here(max_rows: int | None) -> list[tuple[str, str]]:
    texts = []
    for *calls, want in LATER.values():
        first, second = checked(max_rows=max_rows), checked(2 * E, max_rows=max_rows)
        with pytest.raises(MoECommError) as raised:
            calls[dist.get_rank()](first, second)
        assert_the_group_still_works()
        texts.append((str(raised.value), want.replace("FIRST", str(first.ticket)).replace("SECOND", str(second.ticket))))
    return texts


@pytest.mark.parametrize("max_rows", [None, T])
def test_after_a_plan_with_check_ranks_that_dispatch_and_combine_otherwise_get_the_same_error(max_rows: int | None) -> None:
    for texts in run_ranks(later_here, 2, max_rows):
        for text, want in texts:
            assert text == want


def alike_here() -> None:
    x, experts, weights = inputs()
    for max_rows in (None, T):
        made = mf.plan(experts, weights.requires_grad_(), E, check=True, max_rows=max_rows)
        y = then_combine(made, x.requires_grad_())
        y.sum().backward()
        torch.testing.assert_close(y, torch.full((T, D), float(K)))
        torch.testing.assert_close(x.grad, torch.full((T, D), float(K)))
        with pytest.raises(ValueError, match="x was of shape"):  # on both ranks alike: their own error
            mf.dispatch(torch.ones(T + 1, D), made)
        x.grad = None
    assert plan_without_check().ticket == 0


def plan_without_check() -> mf.Plan:
    _, experts, weights = inputs()
    return mf.plan(experts, weights, E)


def test_after_a_plan_with_check_ranks_that_agree_compute_as_ever() -> None:
    run_ranks(alike_here, 2)


def faulty(max_rows: int | None, weight: float, expert: int) -> tuple[type, str]:
    _, experts, weights = inputs()
    if dist.get_rank() == 1:
        weights[2, 1], weights[4, 0], experts[1, 1] = weight, weight, expert
    with pytest.raises(MoECommError) as raised:
        plan(experts=experts, weights=weights, max_rows=max_rows, check=True)
    assert_the_group_still_works()
    return type(raised.value), str(raised.value)


@pytest.mark.parametrize("max_rows", [None, T])
def test_check_finds_weights_that_are_not_finite_and_ids_out_of_range_on_every_rank(max_rows: int | None) -> None:
    for weight in (float("nan"), -float("inf")):
        for error, text in run_ranks(faulty, 2, max_rows, weight, 0):
            assert error is MoECommError
            assert text == "weights was NaN or infinite in 2 slots on rank 1 of the group; with check=True it must be finite"
    for error, text in run_ranks(faulty, 2, max_rows, 1.0, E):
        assert error is ExpertIdError
        assert text == f"experts was between 0 and {E} on rank 1 of the group; ids must be in [-1, num_experts) = [-1, {E}). {NO_EXPERT}"


@pytest.mark.parametrize("max_rows", [None, T])
def test_check_without_a_group(max_rows: int | None) -> None:
    _, experts, weights = inputs()
    weights[0, 0] = float("nan")
    with pytest.raises(MoECommError, match="weights was NaN or infinite in 1 slots on rank 0"):
        plan(experts=experts, weights=weights, max_rows=max_rows, check=True)
    with pytest.raises(ExpertIdError):
        plan(experts=experts + 1, max_rows=max_rows, check=True)
    plan(experts=experts, weights=weights, max_rows=max_rows)  # an option


def layer(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    made = mf.plan(experts, weights, E, check=True)
    return mf.combine(mf.dispatch(x, made), made)


TRACED: dict[str, Callable[..., Tensor]] = {
    "torch.compile": torch.compile(layer, fullgraph=True, backend="aot_eager"),
    "make_fx": lambda *given: make_fx(layer)(*given)(*given),
    "make_fx, symbolic": lambda *given: make_fx(layer, tracing_mode="symbolic")(*given)(*given),
}


def one_traced_here() -> list[str]:
    texts = []
    for traced in TRACED.values():
        assert torch.equal(traced(*inputs()), layer(*inputs()))
        with pytest.raises(MoECommError) as raised:
            (traced if dist.get_rank() else layer)(*inputs())
        assert_the_group_still_works()
        texts.append(str(raised.value))
    return texts


@pytest.mark.slow
def test_a_check_in_eager_code_on_one_rank_and_in_traced_code_on_another_is_the_same_error() -> None:
    for texts in run_ranks(one_traced_here, 2, timeout=120):
        assert texts == [f"check was True on rank 0, True in traced code on rank 1 of the group; {SAME}"] * len(TRACED)


def compiled_here() -> None:
    _, experts, weights = inputs()
    for max_rows in (None, T):
        made = torch.compile(
            lambda experts, weights, max_rows=max_rows: mf.plan(experts, weights, E, max_rows=max_rows, check=True).weights * 1,
            fullgraph=True,
            backend="aot_eager",
        )
        made(experts, weights)
        with pytest.raises(MoECommError, match="weights was NaN or infinite in 12 slots on rank 0"):
            made(experts, weights * float("nan"))


@pytest.mark.slow
def test_compiled_code_checks_alike() -> None:
    run_ranks(compiled_here, 2, timeout=120)
