"""A compiled layer with its balance loss attached sends what the eager layer sends: nothing of the loss stands in both graphs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from tests.compile.graphs import exchanges, keeping
from tests.spawn import run_ranks


def layer(x: Tensor, gate: Tensor) -> Tensor:
    logits = x @ gate
    weights, experts = mf.route(logits, 2)
    balance = mf.load_balance_loss(logits.softmax(-1), experts, None)
    plan = mf.plan(experts, weights, gate.shape[1], like=x)
    y = mf.combine(mf.dispatch(x, plan).relu(), plan)
    return mf.attach_loss(y, balance, 0.5)


def graphs_here() -> tuple[list[str], list[str]]:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(6, 16, generator=generator, requires_grad=True)
    gate = torch.randn(16, 8, generator=torch.Generator().manual_seed(9), requires_grad=True)
    graphs: list[torch.fx.Graph] = []
    compiled = torch.compile(layer, fullgraph=True, backend=keeping(graphs))
    got, want = (torch.autograd.grad(function(x, gate).sin().sum(), (x, gate)) for function in (compiled, layer))
    torch.testing.assert_close(got, want)
    forward, backward = map(exchanges, graphs)
    return forward, backward


@pytest.mark.slow
def test_nothing_of_an_attached_loss_is_exchanged_twice() -> None:
    for forward, backward in run_ranks(graphs_here, 2, timeout=200):
        assert sorted(forward) == sorted(
            ["gather_exchange", "messages_exchange", "plan_sizes", "slots_exchange", "dispatch_exchange", "combine_exchange"]
        )
        assert sorted(backward) == sorted(["dispatch_exchange", "combine_exchange", "return_exchange", "all_to_all_single"])
