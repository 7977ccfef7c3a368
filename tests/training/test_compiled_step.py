"""A whole optimizer step, with all the in-place functions, as one graph of Inductor."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from tests.functions import inputs
from tests.spawn import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]  # tests/test_functions.py traces each of these functions


def step(params: dict[str, Tensor], placement: list[list[int]]) -> Tensor:
    mf.sync_grads_(params, {"experts*": "", "*": None})
    mf.sync_replica_grads_(params["experts.w"], placement)
    spread = {"experts*": [None], "*": ""}
    norm = mf.clip_grad_norm_(params, 0.5, spread=spread, replicas={"experts*": (placement, None)})
    with torch.no_grad():
        for param in params.values():
            param.add_(param.grad, alpha=-0.1)
    mf.sync_replicas_(params["experts.w"], placement)
    return norm


def here() -> None:
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        torch._dynamo.reset()
        own = inputs(dist.get_rank(), dist.get_world_size())
        norm = function(own.params, own.placement)
        results.append([norm, *own.params.values(), *(param.grad for param in own.params.values())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compiled_step_is_the_eager_one(ranks: int) -> None:
    run_ranks(here, ranks, timeout=300)
