"""A profile of a layer names its steps."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import moecomm.functional as mf

RANGES = ("moecomm.plan", "moecomm.dispatch", "experts", "moecomm.combine")


def names(function: object, *args: torch.Tensor) -> list[str]:
    """What a profile of a step shows of it, in the order in which it began."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        function(*args).sum().backward()  # type: ignore[operator]
    events = sorted(profiled.events(), key=lambda event: (event.time_range.start, -event.time_range.end))
    return [event.name for event in events if event.name in RANGES or event.name.startswith("moecomm::")]


def layer(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    plan = mf.plan(experts, weights, 4, like=x)
    rows = mf.dispatch(x, plan)
    with record_function("experts"):
        rows = rows.relu()
    return mf.combine(rows, plan)


@pytest.mark.slow
def test_a_profile_names_the_steps_in_eager_mode_and_their_ops_in_compiled_code() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(6, 8, generator=generator, requires_grad=True), torch.rand(6, 2, generator=generator, requires_grad=True)
    given = x, torch.randint(0, 4, (6, 2), generator=generator), weights
    plan, others = ["moecomm::sort_counted", "moecomm::plan_sizes"], ["moecomm::gather", "moecomm::weighted_sum"]
    backward = ["moecomm::weighted_sum_backward", "moecomm::weighted_sum"]
    layer(*given)
    eager = names(layer, *given)
    assert [name for name in eager if name in RANGES] == list(RANGES)
    assert [name for name in eager if name not in RANGES] == plan + others + backward
    assert (
        eager.index("moecomm.plan")
        < eager.index("moecomm::sort_counted")
        < eager.index("moecomm.dispatch")
        < eager.index("moecomm::gather")
    )

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(*given)
    assert names(compiled, *given) == [*plan, "moecomm::first", *others, *backward]
