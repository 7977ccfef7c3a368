"""A call that one rank refuses: its own error there, and on the others one that names it, from the message that they wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

import moecomm.functional as mf
from moecomm.errors import MoECommError
from moecomm.ops.base.signature import LENGTH
from tests.faults.test_bad_input import assert_the_group_still_works
from tests.parallel.test_agreement import CALLS, PLACEMENT, SAME, E, K, T, inputs, plan
from tests.spawn import run_ranks
from tests.traffic import Traffic


def differentiated(**changed: Any) -> None:
    torch.func.grad(lambda weights: mf.plan(inputs()[1], weights, E, **changed).weights.sum())(torch.ones(T, K))


def dual(**changed: Any) -> None:
    with forward_ad.dual_level():
        plan(weights=forward_ad.make_dual(torch.ones(T, K), torch.ones(T, K)), **changed)


# What rank 1 calls, and its own error, where rank 0 makes the call that stands first.
REFUSED: dict[str, tuple[str, Callable[[], None], type[Exception], str]] = {
    "experts that are no tensor": ("plan", lambda: plan(experts=[[0, 1]]), TypeError, "experts was list"),
    "weights of integers": ("plan", lambda: plan(weights=inputs()[1]), TypeError, "weights was of dtype torch.int64"),
    "experts that do not divide": ("plan", lambda: plan(num_experts=5), ValueError, "num_experts was 5"),
    "a placement without some expert": (
        "plan", lambda: plan(placement=[[0, 1], [2, 1]]), ValueError, r"placement was without experts \[3\]",
    ),
    "a dual tensor": ("plan", dual, NotImplementedError, "plan was called with a dual tensor"),
    "a transform": ("plan", differentiated, NotImplementedError, "plan was called inside a Grad transform"),
    "a transform, with check": ("plan with check", lambda: differentiated(check=True), NotImplementedError, "plan was called inside"),
    "a dtype, with check": ("static", lambda: plan(weights=inputs()[1], max_rows=T, check=True), TypeError, "weights was of dtype"),
    "too much room, with check": ("static", lambda: plan(max_rows=2**30, check=True), ValueError, "max_rows was 1073741824"),
    "a rank that there is not": ("sync_params_", lambda: mf.sync_params_(torch.ones(3), None, 2), ValueError, "src was 2"),
    "params that are no tensor": ("sync_params_", lambda: mf.sync_params_([torch.ones(3), 3], None), TypeError, r"params\[1\] was int"),
    "params that do not fit": (
        "sync_replicas_", lambda: mf.sync_replicas_(torch.ones(3, 3), PLACEMENT), ValueError, r"params was a tensor of shape \[3, 3\]",
    ),
}  # fmt: skip


def refused_here() -> list[str]:
    """Rank 0's errors; rank 1's are looked at here."""
    texts = []
    for call, refused, error, text in REFUSED.values():
        with Traffic() as traffic:
            if dist.get_rank() == 1:
                with pytest.raises(error, match=text):
                    refused()
            else:
                with pytest.raises(MoECommError) as raised:
                    CALLS[call]()
                texts.append(str(raised.value))
        assert traffic.bytes == [[8 * LENGTH] * 2]
        assert_the_group_still_works()
    return texts


def test_where_one_rank_refuses_its_arguments_the_others_are_told_by_the_message_that_they_wait_for() -> None:
    texts, _ = run_ranks(refused_here, 2)
    functions = {"plan with check": "plan", "static": "plan with max_rows"}
    for text, (call, *_) in zip(texts, REFUSED.values(), strict=True):
        name = functions.get(call, call)
        assert text == f"function was {name} on rank 0, {name} with arguments that it refuses on rank 1 of the group; {SAME}"


def no_messages_here() -> None:
    """Where nobody waits, nothing is sent: in static mode without check, and where no tensor says from which device."""
    for changed in ({"weights": inputs()[1], "max_rows": T}, {"experts": None, "weights": None, "like": None}):
        with Traffic() as traffic, pytest.raises(TypeError):
            plan(**changed)
        assert traffic.collectives == []
    assert_the_group_still_works()


def test_a_refusal_that_nobody_waits_for_sends_nothing() -> None:
    run_ranks(no_messages_here, 2)
