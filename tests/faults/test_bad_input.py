"""Wrong arguments: the error names the argument, what it was and what it must be, on every rank that is wrong, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import moecomm.functional as mf
from moecomm.errors import MoECommError
from moecomm.ops.base.signature import LENGTH
from tests.spawn import run_ranks
from tests.traffic import Traffic

T, K, E, D = 3, 2, 4, 5


class Wrong(NamedTuple):
    """A call with one wrong argument, and the message that it must raise. What to write instead may follow: tests/test_mistakes.py."""

    call: Callable[[], Any]
    error: type[Exception]
    message: str


def routing(tokens: int = T, k: int = K) -> tuple[Tensor, Tensor]:
    return torch.arange(tokens * k).view(tokens, k) % E, torch.ones(tokens, k)


def wrong_plans() -> dict[str, Wrong]:
    experts, weights = routing()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return {
        "experts that are a list": Wrong(
            lambda: mf.plan(experts.tolist(), weights, E), TypeError, "experts was list; it must be a tensor [T, K]"
        ),
        "experts of one dimension": Wrong(
            lambda: mf.plan(experts[:, 0], weights, E), ValueError, "experts was of shape [3]; it must be of shape [T, K]"
        ),
        "float experts": Wrong(
            lambda: mf.plan(weights, weights, E),
            TypeError,
            "experts was of dtype torch.float32; it must be of dtype int8, int16, int32, int64 or uint8",
        ),
        "bool experts": Wrong(
            lambda: mf.plan(experts > 0, weights, E),
            TypeError,
            "experts was of dtype torch.bool; it must be of dtype int8, int16, int32, int64 or uint8",
        ),
        "experts of a dtype that torch hardly computes in": Wrong(
            lambda: mf.plan(experts.to(torch.uint16), weights, E),
            TypeError,
            "experts was of dtype torch.uint16; it must be of dtype int8, int16, int32, int64 or uint8",
        ),
        "weights that are None": Wrong(lambda: mf.plan(experts, None, E), TypeError, "weights was NoneType; it must be a tensor [T, K]"),
        "int weights": Wrong(
            lambda: mf.plan(experts, experts, E), TypeError, "weights was of dtype torch.int64; it must be of a floating dtype"
        ),
        "weights of another shape": Wrong(
            lambda: mf.plan(experts, weights[:2], E), ValueError, "weights was of shape [2, 2]; it must be of experts' shape [3, 2]"
        ),
        "weights on another device": Wrong(
            lambda: mf.plan(experts, weights.to("meta"), E), ValueError, "weights was on meta; it must be on experts' device, cpu"
        ),
        "num_experts that is a float": Wrong(lambda: mf.plan(experts, weights, 4.0), TypeError, "num_experts was float; it must be an int"),
        "num_experts that is a bool": Wrong(lambda: mf.plan(experts, weights, True), TypeError, "num_experts was bool; it must be an int"),
        "no experts": Wrong(
            lambda: mf.plan(experts, weights, 0),
            ValueError,
            f"num_experts was 0; it must be a positive multiple of the group's {ranks} ranks",
        ),
        "no slots": Wrong(
            lambda: mf.plan(experts[:, :0], weights[:, :0], E),
            ValueError,
            "experts was of shape [3, 0], K = 0; it must be of K >= 1",
        ),
        "like that is a shape": Wrong(
            lambda: mf.plan(experts, weights, E, like=(T, D)), TypeError, "like was int; it must be a tensor [T, ...], or a pytree of them"
        ),
        "like of other tokens": Wrong(
            lambda: mf.plan(experts, weights, E, like=torch.ones(4, D)),
            ValueError,
            "like was of shape [4, 5]; it must be of shape [3, ...], as experts has that many tokens",
        ),
        "like of no dimension": Wrong(
            lambda: mf.plan(experts, weights, E, like=torch.ones(())),
            ValueError,
            "like was of shape []; it must be of shape [3, ...], as experts has that many tokens",
        ),
        "more slots than int32 indices number": Wrong(
            lambda: mf.plan(experts[:1].expand(2**30, K), weights[:1].expand(2**30, K), E, max_rows=1),
            ValueError,
            "experts was of shape [1073741824, 2]; it must be of at most 2147483392 slots, as int32 indices number them",
        ),
        "room for more slots than int32 indices number": Wrong(
            lambda: mf.plan(experts, weights, E, max_rows=2**30),
            ValueError,
            f"max_rows was 1073741824; it must be at most {1073741696 // ranks}, as int32 indices number the slots of all {ranks} ranks",
        ),
        "padding that int32 indices cannot number": Wrong(
            lambda: mf.plan(experts, weights, E, align=2**31),
            ValueError,
            f"align was 2147483648; it must be at most {(2**31 - 256) // (E // ranks) + 1}, as int32 indices number the rows, "
            "L * (align - 1) more",
        ),
        "padding that int32 indices cannot number in static mode": Wrong(
            lambda: mf.plan(experts, weights, E, max_rows=2**29 // ranks, align=2**29),
            ValueError,
            f"align was 536870912; it must be at most {(2**31 - 256 - 2**29 * min(K, E // ranks)) // (E // ranks) + 1}, as int32 indices "
            "number the rows, L * (align - 1) more",
        ),
        "a group that is a number": Wrong(
            lambda: mf.plan(experts, weights, E, 2),
            TypeError,
            "group was int; it must be a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name or None",
        ),
        "the name of no group": Wrong(
            lambda: mf.plan(experts, weights, E, "nobody"),
            ValueError,
            "group was 'nobody'; it must be the name of an initialised process group that contains the calling rank",
        ),
    }


def wrong_moves(plan: mf.Plan) -> dict[str, Wrong]:
    """Of dispatch and combine."""
    n = plan.row_order.shape[0]
    return {
        "x of other tokens": Wrong(
            lambda: mf.dispatch(torch.ones(T + 1, D), plan),
            ValueError,
            "x was of shape [4, 5]; it must be of shape [3, ...], the plan's T = 3",
        ),
        "a leaf of other tokens": Wrong(
            lambda: mf.dispatch({"x": torch.ones(T, D), "position": torch.arange(2)}, plan),
            ValueError,
            "x was of shape [2]; it must be of shape [3, ...], the plan's T = 3",
        ),
        "x of no dimension": Wrong(
            lambda: mf.dispatch(torch.ones(()), plan), ValueError, "x was of shape []; it must be of shape [3, ...], the plan's T = 3"
        ),
        "x that is a number": Wrong(
            lambda: mf.dispatch(1.0, plan), TypeError, "x was float; it must be a tensor [T, ...], or a pytree of them"
        ),
        "x on another device": Wrong(
            lambda: mf.dispatch(torch.ones(T, D, device="meta"), plan), ValueError, "x was on meta; it must be on the plan's device, cpu"
        ),
        "dispatch without a plan": Wrong(
            lambda: mf.dispatch(torch.ones(T, D), None),
            TypeError,
            "plan was NoneType; it must be a Plan, as moecomm.functional.plan gives it",
        ),
        "a plan that is a plain tuple": Wrong(
            lambda: mf.dispatch(torch.ones(T, D), tuple(plan)),
            TypeError,
            "plan was tuple; it must be a Plan, as moecomm.functional.plan gives it",
        ),
        "rows that are not the plan's": Wrong(
            lambda: mf.combine(torch.ones(n + 1, D), plan),
            ValueError,
            f"rows was of shape [{n + 1}, 5]; it must be of shape [{n}, ...], the plan's N = {n}",
        ),
        "int rows": Wrong(
            lambda: mf.combine(torch.ones(n, D, dtype=torch.int64), plan),
            TypeError,
            "rows was of dtype torch.int64; it must be of a floating dtype",
        ),
        "rows on another device": Wrong(
            lambda: mf.combine(torch.ones(n, D, device="meta"), plan), ValueError, "rows was on meta; it must be on the plan's device, cpu"
        ),
        "combine without a plan": Wrong(
            lambda: mf.combine(torch.ones(n, D), 3), TypeError, "plan was int; it must be a Plan, as moecomm.functional.plan gives it"
        ),
    }


def wrong_slices() -> dict[str, Wrong]:
    x = torch.ones(T, D)
    return {
        "scatter of a list": Wrong(
            lambda: mf.slice_scatter([1], None), TypeError, "x was list; it must be a tensor with a dimension to slice"
        ),
        "scatter of a scalar": Wrong(
            lambda: mf.slice_scatter(torch.ones(()), None), ValueError, "dim was 0; it must be a dimension of x, which is of shape []"
        ),
        "a dimension too many": Wrong(
            lambda: mf.slice_scatter(x, None, 2), ValueError, "dim was 2; it must be a dimension of x, which is of shape [3, 5]"
        ),
        "a dimension too few": Wrong(
            lambda: mf.slice_gather(x, None, -3), ValueError, "dim was -3; it must be a dimension of x, which is of shape [3, 5]"
        ),
        "a dimension's name": Wrong(lambda: mf.slice_gather(x, None, "tokens"), TypeError, "dim was str; it must be an int"),
        "a gradient of another kind": Wrong(
            lambda: mf.slice_gather(x, None, grad="sum"), ValueError, 'grad was \'sum\'; it must be "slice" or "reduce"'
        ),
        "a negative size": Wrong(lambda: mf.slice_gather(x, None, size=-1), ValueError, "size was -1; it must be 0 or more"),
        "a size that is a float": Wrong(lambda: mf.slice_gather(x, None, size=3.0), TypeError, "size was float; it must be an int or None"),
        "a size that is a tensor": Wrong(
            lambda: mf.slice_gather(x, None, size=torch.tensor(3)), TypeError, "size was Tensor; it must be an int or None"
        ),
    }


def first_sentence(error: BaseException) -> str:
    return str(error).split(". ")[0]


def assert_each_raises_and_sends_nothing(wrong: dict[str, Wrong], but: list[list[int]] | None = None) -> None:
    """Nothing ``but`` messages of so many bytes to each rank."""
    for name, (call, error, message) in wrong.items():
        with Traffic() as traffic, pytest.raises(error) as raised:
            call()
        assert first_sentence(raised.value) == message, name
        assert type(raised.value) is error, name
        assert traffic.bytes == (but or []), name
        assert traffic.collectives == ["all_to_all_single", "alltoall_base_"] * len(traffic.bytes), name  # torch's function, and its op


REFUSAL = [[8 * LENGTH] * 2]  # the message that the other rank waits for
UNTOLD = {  # in static mode nobody waits for one, and without a group there is nobody
    "more slots than int32 indices number", "room for more slots than int32 indices number", "a group that is a number",
    "the name of no group", "padding that int32 indices cannot number in static mode",
}  # fmt: skip


def all_wrong_here() -> None:
    plan = mf.plan(*routing(), E)
    assert_each_raises_and_sends_nothing(wrong_moves(plan) | wrong_slices())
    plans = wrong_plans()
    assert_each_raises_and_sends_nothing({name: plans[name] for name in UNTOLD})
    assert_each_raises_and_sends_nothing({name: wrong for name, wrong in plans.items() if name not in UNTOLD}, REFUSAL)
    assert_the_group_still_works()


def assert_the_group_still_works() -> None:
    experts, weights = routing()
    plan = mf.plan(experts, weights, E)
    torch.testing.assert_close(mf.combine(mf.dispatch(torch.ones(T, D), plan), plan), torch.full((T, D), float(K)))


@pytest.mark.parametrize("name", wrong_plans() | wrong_slices())
def test_a_wrong_argument_is_named_with_what_it_must_be(name: str) -> None:
    assert_each_raises_and_sends_nothing({name: (wrong_plans() | wrong_slices())[name]})


@pytest.mark.parametrize("name", wrong_moves(mf.plan(*routing(), E)))
def test_what_does_not_belong_to_the_plan_is_named_with_what_it_must_be(name: str) -> None:
    assert_each_raises_and_sends_nothing({name: wrong_moves(mf.plan(*routing(), E))[name]})


def test_a_wrong_argument_is_named_before_anything_is_sent() -> None:
    run_ranks(all_wrong_here, 2)


def experts_that_do_not_divide_here() -> None:
    experts, weights = routing()
    message = "num_experts was 5; it must be a positive multiple of the group's 2 ranks"
    assert_each_raises_and_sends_nothing({"": Wrong(lambda: mf.plan(experts, weights, 5), ValueError, message)}, REFUSAL)


def test_experts_that_do_not_divide_over_the_ranks_are_refused() -> None:
    run_ranks(experts_that_do_not_divide_here, 2)


def outsiders_here() -> None:
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        call = lambda: mf.plan(*routing(), E, group)  # noqa: E731
        message = "group was a group that this rank is not in; it must be a group that contains the calling rank"
        assert_each_raises_and_sends_nothing({"": Wrong(call, ValueError, message)})


def test_a_group_that_this_rank_is_not_in_is_refused() -> None:
    run_ranks(outsiders_here, 4)


class Call(NamedTuple):
    """What one rank passes to plan."""

    k: int = K
    num_experts: int = E
    weights: torch.dtype = torch.float32
    like: tuple[tuple[int, ...], torch.dtype] | None = ((D,), torch.float32)
    lowest: int = 0
    highest: int = E - 1
    tokens: int = T


def raised_here(calls: list[Call]) -> tuple[type[Exception], bool, str]:
    call = calls[dist.get_rank()]
    experts = torch.zeros(call.tokens, call.k, dtype=torch.int64)
    if call.tokens:
        experts[0, 0], experts[-1, -1] = call.lowest, call.highest
    like = None if call.like is None else torch.ones(call.tokens, *call.like[0], dtype=call.like[1])
    with pytest.raises(MoECommError) as raised:
        mf.plan(experts, torch.ones(experts.shape, dtype=call.weights), call.num_experts, like=like)
    assert_the_group_still_works()
    return type(raised.value), isinstance(raised.value, ValueError), str(raised.value)


SAME = "; it must be the same on every rank"
DISAGREEMENTS = {
    "K": (Call(k=1), f"k was 2 on rank 0, 1 on rank 1 of the group{SAME}"),
    "E": (Call(num_experts=8), f"num_experts was 4 on rank 0, 8 on rank 1 of the group{SAME}"),
    "the weights' dtype": (
        Call(weights=torch.bfloat16),
        f"weights.dtype was torch.float32 on rank 0, torch.bfloat16 on rank 1 of the group{SAME}",
    ),
    "like's dtype": (
        Call(like=((D,), torch.float64)),
        f"like.dtype was torch.float32 on rank 0, torch.float64 on rank 1 of the group{SAME}",
    ),
    "like's width": (Call(like=((D, 2), torch.float32)), f"like's elements a token was 5 on rank 0, 10 on rank 1 of the group{SAME}"),
    "whether there is a like": (Call(like=None), f"like's elements a token was 5 on rank 0, not given on rank 1 of the group{SAME}"),
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_ranks_that_disagree_get_the_same_error_and_keep_their_group(what: str) -> None:
    other, message = DISAGREEMENTS[what]
    for error, is_value_error, text in run_ranks(raised_here, 2, [Call(), other]):
        assert (error, is_value_error, text) == (MoECommError, False, message)


@pytest.mark.parametrize(("lowest", "highest"), [(0, E), (-2, 0), (-(2**40), 2**40)])
def test_ids_out_of_range_on_one_rank_raise_alike_on_all(lowest: int, highest: int) -> None:
    calls = [Call(), Call(tokens=0), Call(lowest=lowest, highest=highest), Call()]
    message = f"experts was between {lowest} and {highest} on rank 2 of the group; ids must be in [-1, num_experts) = [-1, 4)"
    for error, is_value_error, text in run_ranks(raised_here, 4, calls):
        assert issubclass(error, MoECommError)
        assert is_value_error
        assert text.split(". ")[0] == message


def test_ids_out_of_range_are_refused_without_a_group() -> None:
    experts, weights = routing()
    with pytest.raises(
        ValueError, match=r"experts was between 0 and 3 on rank 0 of the group; ids must be in \[-1, num_experts\) = \[-1, 2\)"
    ):
        mf.plan(experts, weights, 2)


def wrong_dtensors_here() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    ep, dp = mesh["ep"], mesh["dp"]
    piece = DTensor.from_local(torch.ones(4, 2), ep, [Shard(0)])
    whole = DTensor.from_local(torch.ones(4, 2), ep, [Replicate()])

    def placed(is_now: Placement, must: Placement) -> str:
        return f"x was {is_now} on the group's mesh dim 0; it must be {must} there"

    no_dim = f"group was no dim of x's mesh {ep}; it must be one of its dims, where x is a DTensor"
    reduce = 'grad was "reduce" for a DTensor; it must be "slice": a DTensor\'s gradient is reduced where its placement is Partial'
    length = "size was 7; it must be 8, the length of x along dim"
    wrong = {
        "already a slice": Wrong(lambda: mf.slice_scatter(piece, ep), ValueError, placed(Shard(0), Replicate())),
        "not a slice": Wrong(lambda: mf.slice_gather(whole, ep), ValueError, placed(Replicate(), Shard(0))),
        "a slice of another dim": Wrong(lambda: mf.slice_gather(piece, ep, 1), ValueError, placed(Shard(0), Shard(1))),
        "a group that is not of the mesh": Wrong(lambda: mf.slice_gather(piece, dp), ValueError, no_dim),
        "reduce for a DTensor": Wrong(lambda: mf.slice_gather(piece, ep, grad="reduce"), ValueError, reduce),
        "a size that is not a DTensor's": Wrong(lambda: mf.slice_gather(piece, ep, size=7), ValueError, length),
    }
    assert_each_raises_and_sends_nothing(wrong)


def test_a_dtensor_that_is_not_as_the_slices_need_it_is_refused() -> None:
    run_ranks(wrong_dtensors_here, 4)


def wrong_slices_of_a_size_here() -> None:
    own = [2, 1][dist.get_rank()]
    x = torch.ones(own + 1, D)
    message = f"x was {own + 1} long in dim; it must be {own} long, the slice of rank {dist.get_rank()} of 2 where size is 3"
    assert_each_raises_and_sends_nothing({"": Wrong(lambda: mf.slice_gather(x, None, size=3), ValueError, message)})


def test_a_slice_that_is_not_of_the_size_is_refused() -> None:
    run_ranks(wrong_slices_of_a_size_here, 2)
