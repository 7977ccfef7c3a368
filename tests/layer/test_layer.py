"""Whole layers, as users write them, against every expert computed densely in float64 on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import grouped_mm, silu

import moecomm.functional as mf
from tests import reference
from tests.spawn import FOUR, run_ranks

D, H = 16, 24

# What an error may be, in units of eps(dtype) times the tensor's largest magnitude, or times 1, the magnitude of what is added up, where
# sums cancel. Measured over all cases: at most 4.8 (float64), 4.0 (float32; a dot product that cancels: 5) and 1.4 (bfloat16, whose eps
# is 1/128). A token, row or weight in the wrong place errs by about 1 / eps.
UNITS = {torch.float64: 8.0, torch.float32: 8.0, torch.bfloat16: 3.0}

ROUTINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    # Each makes [T, K] ids from the T orders of the E experts, all random and without repetition.
    "random": lambda orders, k: orders[:, :k],
    "some dropped": lambda orders, k: torch.where(orders.flip(1)[:, :k] % 3 == 0, -1, orders[:, :k]),
    "repeated": lambda orders, k: orders[:, :k] // 2,
    "experts that get none": lambda orders, k: orders[:, :k] // 4 * 4,
    "all to one": lambda orders, k: torch.full_like(orders[:, :k], orders.shape[1] - 1),
    "all dropped": lambda orders, k: torch.full_like(orders[:, :k], -1),
}
TOKENS = {1: [(13,), (0,)], 2: [(9, 4), (0, 17)], 4: [(5, 0, 11, 1), (0, 0, 3, 0)]}
SIZES = [(1, 4), (2, 8), (8, 8), (8, 64)]  # K, E


class Case(NamedTuple):
    """One layer: how many tokens each rank has, and what becomes of them."""

    tokens: tuple[int, ...]
    k: int
    num_experts: int
    routing: str
    dtype: torch.dtype
    experts: str  # "loop" or "grouped_mm"


class Problem(NamedTuple):
    """The tensors of a case, for the whole group; every rank makes the same ones."""

    x: Tensor  # [T, D]
    experts: Tensor  # [T, K]
    weights: Tensor  # [T, K]
    up: Tensor  # [E, D, H]
    down: Tensor  # [E, H, D]
    grad: Tensor  # [T, D]


def problem(case: Case) -> Problem:
    seed = torch.Generator().manual_seed(hash((case.tokens, case.k, case.num_experts)) % 2**31)
    tokens, k, num_experts = sum(case.tokens), case.k, case.num_experts

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seed, dtype=torch.float64).to(case.dtype)

    orders = torch.rand(tokens, num_experts, generator=seed).argsort(1)
    up, down = normal(num_experts, D, H) / D**0.5, normal(num_experts, H, D) / H**0.5
    return Problem(normal(tokens, D), ROUTINGS[case.routing](orders, k), normal(tokens, k).abs(), up, down, normal(tokens, D))


def loop(rows: Tensor, up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    ends = offsets.tolist()
    parts = [silu(rows[i:j] @ up[e]) @ down[e] for e, (i, j) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat(parts)


def grouped(rows: Tensor, up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    return grouped_mm(silu(grouped_mm(rows, up, offs=offsets)), down, offs=offsets)


def layer(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, num_experts: int, kind: str, group: Any) -> Tensor:
    plan = mf.plan(experts, weights, num_experts, group, like=x)
    rows = mf.dispatch(x, plan)  # [N, D]
    rows = (loop if kind == "loop" else grouped)(rows, up, down, plan.offsets)
    return mf.combine(rows, plan)


def layer_and_gradients(case: Case, rank: int, group: Any) -> dict[str, Tensor]:
    """What this rank has of what `reference.layer_and_gradients` gives for the whole group."""
    all_of = problem(case)
    start, local = sum(case.tokens[:rank]), case.num_experts // len(case.tokens)
    tokens, mine = slice(start, start + case.tokens[rank]), slice(rank * local, (rank + 1) * local)
    own = {"x": all_of.x[tokens], "weights": all_of.weights[tokens], "up": all_of.up[mine], "down": all_of.down[mine]}
    leaves = {name: value.clone().requires_grad_() for name, value in own.items()}
    x, weights, up, down = leaves.values()
    y = layer(x, all_of.experts[tokens], weights, up, down, case.num_experts, case.experts, group)
    gradients = torch.autograd.grad(y, list(leaves.values()), all_of.grad[tokens])
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def layers_here(cases: list[Case]) -> list[dict[str, Tensor]]:
    return [layer_and_gradients(case, dist.get_rank(), None) for case in cases]


def errors(case: Case, parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """How far what the ranks have is from the reference, over what is tolerated."""
    wanted = reference.layer_and_gradients(*problem(case))
    far = {}
    for name, want in wanted.items():
        got = torch.cat([part[name] for part in parts])
        assert got.dtype == case.dtype
        assert got.shape == want.shape
        if not want.any():  # nothing to round: all slots dropped, or no tokens
            assert not got.any()
            continue
        tolerance = UNITS[case.dtype] * torch.finfo(case.dtype).eps * max(1.0, want.abs().max().item())
        far[name] = (got.double() - want).abs().max().item() / tolerance
    return far


def cases_of(ranks: int, dtype: torch.dtype) -> list[Case]:
    kinds = ["loop"] if dtype == torch.float64 else ["loop", "grouped_mm"]
    return [
        Case(tokens, k, e, routing, dtype, kind)
        for tokens in TOKENS[ranks]
        for k, e in SIZES
        for routing in ROUTINGS
        for kind in kinds
        if (tokens, (k, e)) in {(TOKENS[ranks][0], size) for size in SIZES} | {(TOKENS[ranks][1], SIZES[1])}
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_a_layer_and_its_gradients_agree_with_every_expert_computed_densely(ranks: int, dtype: torch.dtype) -> None:
    cases = cases_of(ranks, dtype)
    parts = run_ranks(layers_here, ranks, cases)
    for case, *here in zip(cases, *parts, strict=True):
        for name, error in errors(case, here).items():
            assert error <= 1, f"{name} is {error} times its tolerance off in {case}"


def surplus_here() -> None:
    """Each token's real slots are spread over more slots than there are experts."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(9, D, generator=generator).requires_grad_()
    experts = torch.rand(9, 4, generator=generator).argsort(1)[:, :2]
    weights = torch.rand(9, 2, generator=generator).requires_grad_()
    places = torch.rand(9, 7, generator=generator).argsort(1)[:, :2].sort(1).values
    wide = torch.full((9, 7), -1).scatter(1, places, experts)
    for max_rows in (None, 40, 5):
        answers = []
        for ids, factors in ((experts, weights), (wide, torch.zeros(9, 7).scatter(1, places, weights))):
            plan = mf.plan(ids, factors, 4, like=x, max_rows=max_rows)
            y = mf.combine(mf.dispatch(x, plan).sin(), plan)
            answers.append([y, *torch.autograd.grad(y.square().sum(), (x, weights))])
        for got, want in zip(*reversed(answers), strict=True):
            torch.testing.assert_close(got, want)


def test_a_token_may_have_more_slots_than_there_are_experts() -> None:
    run_ranks(surplus_here, 2)


def test_a_layer_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    for dtype in UNITS:
        for routing in ROUTINGS:
            case = Case((7,), 2, 8, routing, dtype, "loop")
            here = layer_and_gradients(case, 0, None)
            assert all(error <= 1 for error in errors(case, [here]).values())


def layers_on_the_ep_dim(cases: list[Case]) -> list[dict[str, Tensor]]:
    """Two pairs of ranks, each with a layer of its own, whatever it is that names the pair."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    pairs: list[Any] = [mesh["ep"], (mesh, 1), mesh.get_group("ep"), mesh.get_group("ep").group_name]
    pair, rank = mesh.get_local_rank("dp"), mesh.get_local_rank("ep")
    return [layer_and_gradients(cases[pair], rank, group) for group in pairs]


def test_groups_that_are_not_the_world_have_layers_of_their_own_by_any_name() -> None:
    cases = [Case(tokens, 2, 8, "some dropped", torch.float64, "loop") for tokens in ((5, 3), (0, 9))]
    parts = run_ranks(layers_on_the_ep_dim, 4, cases)
    for pair, case in enumerate(cases):
        for named in range(4):
            here = [parts[2 * pair + rank][named] for rank in range(2)]
            assert all(error <= 1 for error in errors(case, here).values())


def twice_the_same(cases: list[Case]) -> bool:
    for case in cases:
        first, second = (layer_and_gradients(case, dist.get_rank(), None) for _ in range(2))
        assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first), case
    return True


def test_the_same_call_gives_the_same_bits_forward_and_backward() -> None:
    cases = [Case(TOKENS[4][0], k, e, "random", dtype, "grouped_mm") for k, e in SIZES for dtype in (torch.float32, torch.bfloat16)]
    assert run_ranks(twice_the_same, 4, cases)


class Trees(NamedTuple):
    """What one rank dispatched and combined, as trees of tensors."""

    rows: dict[str, Any]
    sums: dict[str, Any]
    gradients: dict[str, Tensor]


def tree(tokens: int) -> dict[str, Any]:
    """What may belong to a token: tensors of several dtypes and ranks, in lists and dicts; each element says whose it is."""
    token = torch.arange(tokens)
    return {
        "position": token,  # int64
        "flags": (token % 3 == 0, token.to(torch.uint8).view(-1, 1)),
        "floats": [
            token.to(torch.float64).view(-1, 1, 1) + torch.arange(6, dtype=torch.float64).view(2, 3) / 8,
            token.to(torch.bfloat16).view(-1, 1).expand(-1, 4),
            token.to(torch.float32).view(-1, 1).repeat(1, 5).t().contiguous().t(),  # strides of a transpose
        ],
        "nothing": torch.empty(tokens, 0),
    }


def trees_here(tokens: tuple[int, ...], experts: Tensor, weights: Tensor, num_experts: int) -> Trees:
    rank = dist.get_rank()
    own = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    plan = mf.plan(experts[own], weights[own], num_experts)
    x = tree(sum(tokens))
    rows = mf.dispatch(torch.utils._pytree.tree_map(lambda leaf: leaf[own], x), plan)
    leaves = [leaf[own].clone().requires_grad_() for leaf in x["floats"]]
    sums = mf.combine(mf.dispatch({"floats": leaves}, plan), plan)
    gradients = torch.autograd.grad(sum(leaf.double().sum() for leaf in sums["floats"]), leaves)
    return Trees(rows, torch.utils._pytree.tree_map(torch.Tensor.detach, sums), {"floats": list(gradients)})


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_a_tree_of_tensors_of_any_dtype_and_rank_travels_as_its_tokens_do(ranks: int) -> None:
    case = Case(TOKENS[ranks][0], 3, 8, "some dropped", torch.float64, "loop")
    of = problem(case)
    x, local = tree(sum(case.tokens)), case.num_experts // ranks
    taken = reference.mix(of.experts, of.weights, case.num_experts).sum(1)  # [T]
    for rank, part in enumerate(run_ranks(trees_here, ranks, case.tokens, of.experts, of.weights, case.num_experts)):
        own = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
        tokens = [t for t, _ in reference.rows(of.experts, rank * local, (rank + 1) * local)]
        assert torch.utils._pytree.tree_structure(part.rows) == torch.utils._pytree.tree_structure(x)
        for got, sent in zip(*map(torch.utils._pytree.tree_leaves, (part.rows, x)), strict=True):
            torch.testing.assert_close(got, sent[tokens], rtol=0, atol=0)
        for got, grad, sent in zip(part.sums["floats"], part.gradients["floats"], x["floats"], strict=True):
            shape = [-1, *[1] * (sent.dim() - 1)]
            want = sent[own].double() * taken[own].view(shape)
            rounded = {"rtol": 4 * torch.finfo(sent.dtype).eps, "atol": 0.0}
            torch.testing.assert_close(got, want.to(sent.dtype), **rounded)
            torch.testing.assert_close(grad, taken[own].view(shape).expand_as(want).to(sent.dtype), **rounded)


def test_rows_and_results_are_no_views() -> None:
    """FSDP2 warns of a view: changed in place, it would lose the hook that gathers parameters for the backward."""
    weights, experts = mf.route(torch.randn(6, 4), 2)
    a_plan = mf.plan(experts, weights, 4)
    rows = mf.dispatch(torch.randn(6, 3, requires_grad=True), a_plan)
    assert not rows._is_view()
    assert not mf.combine(rows, a_plan)._is_view()
