"""Exchanges that do not depend on each other start in the traced graph's order, however much the ranks differ in size."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import moecomm.functional as mf
from tests.spawn import run_ranks


def layers(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Two, side by side."""
    y = torch.zeros_like(x)
    for i in range(2):
        plan = mf.plan(experts, weights * (i + 1), 8, like=x)
        y = y + mf.combine(mf.dispatch((x + i).sin(), plan).relu(), plan).cos()
    return y


def orders_here() -> list[list[str]]:
    """The starts of the compiled forward and backward, as they stand in Inductor's code."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = (3, 3000)[dist.get_rank()]
    x = torch.randn(tokens, 16, generator=generator, requires_grad=True)
    weights = torch.rand(tokens, 2, generator=generator, requires_grad=True)
    experts = torch.randint(0, 8, (tokens, 2), generator=generator)

    def step(function: object) -> list[Tensor]:
        y = function(x, experts, weights)  # type: ignore[operator]
        return [y, *torch.autograd.grad(y.sin().sum(), (x, weights))]

    compiled = torch.compile(layers, fullgraph=True, dynamic=False)  # each rank's own sizes are known to its compiler
    with torch._inductor.config.patch(fx_graph_cache=False):  # so that there is code, and not a graph that was made before
        got, codes = run_and_get_code(step, compiled)
    torch.testing.assert_close(got, step(layers))
    return [re.findall(r"= torch\.ops\.moecomm\.(\w+_exchange)\.default\(", code) for code in codes]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_ranks_of_very_different_sizes_start_their_exchanges_in_the_order_of_the_graph() -> None:
    first, second = run_ranks(orders_here, 2, timeout=300)
    assert first == second
    assert first == [
        ["messages_exchange", "slots_exchange", "dispatch_exchange", "combine_exchange"] * 2,
        ["dispatch_exchange", "combine_exchange", "return_exchange"] * 2,
    ]
