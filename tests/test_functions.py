"""What holds for every function in `mf.__all__`: it traces as one graph, and its results can be changed in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

import moecomm.functional as mf
from moecomm.parallel.group import GroupLike
from tests.functions import CALLS, DATA, EAGER_ONLY, Inputs, inputs
from tests.spawn import run_ranks

Change = Callable[[Tensor], Tensor]
Cases = list[tuple[str, int]]


def new_tensor(result: Tensor) -> Tensor:
    return result * 2 + result.shape.numel()


def in_place(result: Tensor) -> Tensor:
    result *= 2
    result += result.shape.numel()
    return result


def floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point]


def run(given: list[Inputs], cases: Cases, change: Change, group: GroupLike) -> list[list[Tensor]]:
    """The results of each call, changed. What it takes are activations, not leaves, which torch lets nobody change in place."""
    changed = []
    for own, (name, number) in zip(given, cases, strict=True):
        activations = own._replace(x=own.x.sin(), logits=own.logits.sin(), weights=own.weights.sin(), loss=own.loss.sin())
        changed.append([change(result) for result in floats(CALLS[name][number](activations, group))])
    return changed


def after(cases: Cases, change: Change, compiled: bool) -> dict[str, list[Tensor | None]]:
    """What each call left: its results, the gradients of what it took, and the parameters and their gradients."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    given = [inputs(rank, ranks) for _ in cases]
    function = run
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = function(given, cases, change, None)
    losses = [(result * torch.arange(1.0, 1 + result.numel()).view(result.shape)).sum() for each in results for result in each]
    torch.stack([loss for loss in losses if loss.requires_grad]).sum().backward()
    left: dict[str, list[Tensor | None]] = {}
    for (name, number), own, each in zip(cases, given, results, strict=True):
        leaves = [*own[:4], *own.params.values()]
        left[f"{name} {number}"] = [*each, *own.params.values(), *(leaf.grad for leaf in leaves)]
    return left


def check_here(compiled: bool) -> None:
    cases = [(name, number) for name in CALLS for number in range(len(CALLS[name]))]
    want, got = after(cases, new_tensor, compiled=False), after(cases, in_place, compiled)
    for name in want:
        for mine, its in zip(got[name], want[name], strict=True):
            torch.testing.assert_close(mine, its, msg=lambda text, name=name: f"{name}: {text}")


def test_every_function_has_a_call_here() -> None:
    assert sorted([*CALLS, *EAGER_ONLY, *DATA]) == sorted(mf.__all__)
    assert all(CALLS.values())


@pytest.mark.parametrize(
    ("ranks", "compiled"),
    [
        (1, False),
        (2, False),
        pytest.param(1, True, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
        pytest.param(2, True, marks=pytest.mark.slow),
    ],
)
def test_every_function_is_one_graph_and_its_results_can_be_changed_in_place(ranks: int, compiled: bool) -> None:
    run_ranks(check_here, ranks, compiled, timeout=300)
