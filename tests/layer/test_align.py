"""plan(align=): experts' rows that begin at multiples, against every expert computed densely in float64; nothing more is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import grouped_mm, pad, silu

import moecomm.functional as mf
from tests import reference
from tests.layer.test_layer import ROUTINGS, Case, Problem, loop, problem
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

TOKENS = {1: (13,), 2: (9, 4), 4: (5, 0, 11, 1)}
K, E = 2, 8


def layer(own: dict[str, Tensor], experts: Tensor, align: int, max_rows: int | None) -> Tensor:
    plan = mf.plan(experts, own["weights"], E, align=align, max_rows=max_rows)
    assert (plan.offsets % align == 0).all()
    rows = mf.dispatch(own["x"], plan)
    assert (rows.detach()[plan.row_order < 0] == 0).all()
    made = loop(rows, own["up"], own["down"], plan.offsets)  # the padding between experts' rows is computed as well
    made = pad(made, (0, 0, 0, rows.shape[0] - made.shape[0]))
    return mf.combine(made.masked_fill((plan.row_order < 0).unsqueeze(1), float("nan")), plan)  # whatever the experts make of padding


def here(case: Case, align: int, static: bool) -> tuple[list[Tensor], Tensor, list[list[int]]]:
    whole, ranks = problem(case), max(len(case.tokens), 1)
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine, local = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1])), slice(rank * E // ranks, (rank + 1) * E // ranks)
    own = {"x": whole.x[mine], "weights": whole.weights[mine], "up": whole.up[local], "down": whole.down[local]}
    own = {name: value.clone().requires_grad_() for name, value in own.items()}
    with Traffic() as traffic:
        y = layer(own, whole.experts[mine], align, max(case.tokens) if static else None)
    return list(torch.autograd.grad(y, list(own.values()), whole.grad[mine])), y.detach(), traffic.bytes


def assert_close(case: Case, whole: Problem, results: list[tuple[list[Tensor], Tensor, Any]]) -> None:
    want = reference.layer_and_gradients(*whole)
    torch.testing.assert_close(torch.cat([y for _, y, _ in results]), want["y"])
    for i, name in enumerate(("x", "weights", "up", "down")):
        torch.testing.assert_close(torch.cat([gradients[i] for gradients, _, _ in results]), want[name])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_a_layer_of_aligned_rows_is_the_dense_one_and_sends_no_more(ranks: int) -> None:
    for routing in ROUTINGS:
        for static in (False, True):
            case = Case(TOKENS[ranks], K, E, routing, torch.float64, "loop")
            sent = []
            for align in (1, 4, 16):
                results = [here(case, align, static)] if ranks == 1 else run_ranks(here, ranks, case, align, static)
                assert_close(case, problem(case), results)
                sent.append([traffic for _, _, traffic in results])
            assert sent[0] == sent[1] == sent[2]


def test_explain_counts_no_padding() -> None:
    experts = torch.tensor([[0, 2], [2, -1], [2, 3]])
    assert mf.explain(mf.plan(experts, torch.ones(3, 2), 4, align=8)).rows == [[1, 0, 3, 1]]


def grouped(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    plan = mf.plan(experts, weights, E, align=16)
    rows = grouped_mm(silu(grouped_mm(mf.dispatch(x, plan), up, offs=plan.offsets)), down, offs=plan.offsets)
    return mf.combine(rows, plan)


@pytest.mark.slow
def test_aligned_rows_compile_to_one_graph_that_no_routing_recompiles() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(grouped, fullgraph=True, backend=counter)
    for name in ROUTINGS:
        whole = problem(Case((13,), K, E, name, torch.bfloat16, "grouped_mm"))
        inputs = [value.clone().requires_grad_(value.is_floating_point()) for value in whole[:-1]]
        leaves = [value for value in inputs if value.requires_grad]
        y, same = grouped(*inputs), compiled(*inputs)
        assert torch.equal(y, same)
        for gradient, other in zip(torch.autograd.grad(y, leaves, whole.grad), torch.autograd.grad(same, leaves, whole.grad), strict=True):
            assert torch.equal(gradient, other)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("align", "error", "text"), [(0, ValueError, "align was 0; it must be at least 1"), (2.0, TypeError, "align was float")]
)
def test_a_wrong_align_is_named(align: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mf.plan(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), 2, align=align)
