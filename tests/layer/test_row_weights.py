"""Experts that multiply the weights in themselves: the same layer as with a weighted combine, and nothing of the size [N, D] is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

import moecomm.functional as mf
from tests import reference
from tests.spawn import FOUR, run_ranks

TOKENS, D, H, E, K = (5, 0, 7, 1), 12, 16, 8, 3
MODES: list[dict[str, Any]] = [{}, {"align": 4}, {"max_rows": max(TOKENS)}, {"max_rows": max(TOKENS), "align": 4}]


def problem(ranks: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The tokens of all ranks, one behind the other; slots of -1 are dropped."""
    generator = torch.Generator().manual_seed(ranks)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = sum(TOKENS[:ranks])
    experts = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)])
    experts[torch.rand(tokens, K, generator=generator) < 0.2] = -1
    weights = torch.rand(tokens, K, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    return {
        "x": normal(tokens, D), "experts": experts, "weights": weights, "up": normal(E, D, H) / D**0.5, "down": normal(E, H, D) / H**0.5,
        "grad": normal(tokens, D),
    }  # fmt: skip


def layer(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, lean: bool, **options: Any) -> Tensor:
    plan = mf.plan(experts, weights, E, like=x, **options)
    rows = mf.dispatch(x, plan)
    numbers = torch.arange(rows.shape[0], dtype=plan.offsets.dtype)
    expert = torch.searchsorted(plan.offsets, numbers, right=True).clamp(max=up.shape[0] - 1)  # [N]; rows of padding may be of any
    hidden = torch.einsum("nd,ndh->nh", rows, up[expert])
    weights = mf.row_weights(plan).unsqueeze(1) if lean else 1
    hidden = (silu(hidden.to(plan.weights.dtype)) * weights).to(rows.dtype)  # rounded once
    return mf.combine(torch.einsum("nh,nhd->nd", hidden, down[expert]), plan, weighted=not lean)


def mine(of: dict[str, Tensor], rank: int, ranks: int, placement: list[list[int]] | None = None) -> dict[str, Tensor]:
    """This rank's tokens and its experts."""
    first = sum(TOKENS[:rank])
    held = placement[rank] if placement else slice(rank * E // ranks, (rank + 1) * E // ranks)
    own = {name: value[held] if name in ("up", "down") else value[first : first + TOKENS[rank]] for name, value in of.items()}
    return {name: value.clone().requires_grad_(value.is_floating_point() and name != "grad") for name, value in own.items()}


def results(function: Any, given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    leaves = {name: given[name] for name in ("x", "weights", "up", "down")}
    y = function(leaves["x"], given["experts"], leaves["weights"], leaves["up"], leaves["down"], **options)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), given["grad"]), strict=True))}


def modes_here(placement: list[list[int]] | None) -> list[dict[str, Tensor]]:
    ranks = dist.get_world_size()
    given = mine(problem(ranks), dist.get_rank(), ranks, placement)
    return [results(layer, given, lean=True, placement=placement, **mode) for mode in MODES]


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_a_layer_whose_experts_multiply_the_weights_is_the_dense_layer(ranks: int) -> None:
    want = reference.layer_and_gradients(**problem(ranks))
    for mode, *parts in zip(MODES, *run_ranks(modes_here, ranks, None), strict=True):
        for name, value in want.items():
            got = torch.cat([part[name] for part in parts])
            torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-12, msg=lambda text, of=(mode, name): f"{of}: {text}")


def test_so_is_one_whose_experts_are_placed_anywhere() -> None:
    placement = [[6, 1, 4, 3], [0, 7, 2, 5]]
    want = reference.layer_and_gradients(**problem(2))
    held = [expert for row in placement for expert in row]
    for _, *parts in zip(MODES, *run_ranks(modes_here, 2, placement), strict=True):
        for name, value in want.items():
            got = torch.cat([part[name] for part in parts])
            torch.testing.assert_close(got, value[held] if name in ("up", "down") else value, rtol=1e-11, atol=1e-12)


def ones_here() -> None:
    """Without the weights the sum is that of a plan whose weights are all 1, bit for bit."""
    given = mine(problem(dist.get_world_size(), torch.float32), dist.get_rank(), dist.get_world_size())
    for mode in MODES:
        for wires in ({}, {"wire": "mxfp8"}, {"backward_wire": "float8_e4m3"}):
            answers = []
            for weighted in (True, False):
                weights = torch.ones_like(given["weights"]) if weighted else given["weights"]
                plan = mf.plan(given["experts"], weights, E, like=given["x"], **mode)
                rows = mf.dispatch(given["x"], plan).detach().requires_grad_()
                y = mf.combine(rows, plan, weighted=weighted, **wires)
                answers.append((y, *torch.autograd.grad(y, rows, given["grad"])))
            for one, other in zip(*answers, strict=True):
                assert torch.equal(one, other), (mode, wires)


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_the_weights_combine_is_the_plain_sum_with_any_wire(ranks: int) -> None:
    run_ranks(ones_here, ranks)


def quantized_here() -> None:
    """Experts that compute in 8 bits take the weights in the same way."""
    given = mine(problem(2, torch.float32), dist.get_rank(), 2)
    plan = mf.plan(given["experts"], given["weights"], E, like=given["x"])
    sent = mf.dispatch_quantized(given["x"], plan, "mxfp8")
    rows = mf.dispatch(given["x"], plan, wire="mxfp8")
    assert sent.data.shape[0] == mf.row_weights(plan).shape[0]
    y = mf.combine(rows * mf.row_weights(plan).unsqueeze(1), plan, weighted=False)
    torch.testing.assert_close(y, mf.combine(rows, plan), rtol=1e-6, atol=1e-6)
    got, want = (torch.autograd.grad(each, given["weights"], given["grad"], retain_graph=True)[0] for each in (y, mf.combine(rows, plan)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_rows_in_8_bits_have_weights_too() -> None:
    run_ranks(quantized_here, 2)


def slices_here() -> None:
    """On 2 x 2 ranks, tokens over the first dim of the mesh and the hidden dim over the second: each rank gives a part of the gradient."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(6, D, generator=generator, dtype=torch.float64) for _ in range(2))
    experts, weights = torch.randint(E, (6, K), generator=generator), torch.rand(6, K, generator=generator, dtype=torch.float64)
    placed = {
        name: distribute_tensor(value, mesh, [Shard(0), Shard(1) if value.shape[1] == D else Replicate()], src_data_rank=None)
        for name, value in {"x": x, "grad": grad, "experts": experts, "weights": weights}.items()
    }
    leaves = placed["x"].requires_grad_(), placed["weights"].requires_grad_()
    plan = mf.plan(placed["experts"], leaves[1], E, mesh["a"], like=leaves[0])
    y = mf.combine(mf.dispatch(leaves[0], plan).sin() * mf.row_weights(plan).unsqueeze(1), plan, weighted=False)
    got = [y, *torch.autograd.grad(y, leaves, placed["grad"])]
    x, weights = x.requires_grad_(), weights.requires_grad_()
    dense = weights.sum(1, keepdim=True) * x.sin()
    for one, want in zip(got, [dense, *torch.autograd.grad(dense, (x, weights), grad)], strict=True):
        torch.testing.assert_close(one.full_tensor(), want, rtol=1e-12, atol=1e-12)


def test_slices_of_the_hidden_dim_give_the_whole_gradient_of_the_weights() -> None:
    run_ranks(slices_here, 4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_first_and_second_derivatives(mode: dict[str, Any]) -> None:
    given = mine(problem(1), 0, 1)
    leaves = [given[name] for name in ("x", "weights")]

    def function(x: Tensor, weights: Tensor) -> Tensor:
        plan = mf.plan(given["experts"], weights, E, like=x, **mode)
        return mf.combine(mf.dispatch(x, plan).sin() * mf.row_weights(plan).unsqueeze(1).cos(), plan, weighted=False)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def compiled_here(mode: dict[str, Any]) -> None:
    torch._dynamo.reset()
    given = mine(problem(2), dist.get_rank(), 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want, got = (results(function, given, lean=True, **mode) for function in (layer, compiled))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/test_functions.py compiles them in every run
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_compiled_it_is_the_eager_layer(mode: dict[str, Any]) -> None:
    run_ranks(compiled_here, 2, mode, timeout=200)


def wide(dtype: torch.dtype) -> dict[str, Tensor]:
    """One rank's problem of many tokens, whose rounding errors have a mean."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(512, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    experts = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(512)])
    weights = torch.rand(512, K, generator=generator).requires_grad_()
    up, down = (torch.randn(E, *s, generator=generator, dtype=torch.float64).div(s[0] ** 0.5).to(dtype) for s in ((D, H), (H, D)))
    tensors = {"x": x, "up": up, "down": down}
    return {name: value.requires_grad_() for name, value in tensors.items()} | {"weights": weights, "experts": experts, "grad": grad}


def test_in_bfloat16_it_is_no_less_exact_than_a_weighted_combine() -> None:
    given = wide(torch.bfloat16)
    want = reference.layer_and_gradients(**{name: value.detach() for name, value in given.items()})
    errors = [
        {name: (value.double() - want[name]).square().mean().sqrt().item() for name, value in results(layer, given, lean=lean).items()}
        for lean in (False, True)
    ]
    for name, error in errors[0].items():
        assert errors[1][name] < 1.05 * error, f"{name}: {errors[1][name]} against {error}"


def test_nothing_of_the_size_of_the_rows_is_kept_for_combine() -> None:
    given, kept = wide(torch.bfloat16), {}
    for lean in (False, True):
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        plan = mf.plan(given["experts"], given["weights"], E)
        rows = torch.randn(plan.row_order.shape[0], D, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = mf.combine(rows, plan, weighted=not lean)
        kept[lean] = {tuple(tensor.shape) for tensor in saved.values()}
        y.sum().backward()
    assert tuple(rows.shape) in kept[False]
    assert kept[True] == {tuple(plan.row_order.shape), tuple(plan.row_position.shape)}


def test_what_is_no_plan_and_no_bool_is_refused() -> None:
    plan = mf.plan(torch.tensor([[0]]), torch.ones(1, 1), 1)
    with pytest.raises(TypeError, match="plan was Tensor; it must be a Plan"):
        mf.row_weights(torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weighted was int; it must be a bool"):
        mf.combine(torch.ones(1, 2), plan, weighted=0)  # type: ignore[call-overload]


def test_rows_of_padding_have_the_weight_0() -> None:
    plan = mf.plan(torch.tensor([[1], [-1], [0]]), torch.tensor([[2.0], [3.0], [4.0]]), 2, max_rows=3, align=4)
    weights = mf.row_weights(plan)
    assert weights.shape == plan.row_order.shape
    assert torch.equal(weights, torch.where(plan.row_order < 0, 0.0, torch.tensor([2.0, 3.0, 4.0])[plan.row_order.clamp(min=0)]))


def made_again_here() -> None:
    given = mine(problem(dist.get_world_size(), torch.float32), dist.get_rank(), dist.get_world_size())
    x, experts, weights, grad = (given[name] for name in ("x", "experts", "weights", "grad"))
    for weighted in (True, False):
        for wire in (None, "mxfp8"):

            def run(x: Tensor, weights: Tensor, weighted: bool = weighted, wire: str | None = wire) -> Tensor:
                plan = mf.plan(experts, weights, E, like=x)
                rows = mf.dispatch(x, plan, wire=wire).sin()
                rows = rows if weighted else rows * mf.row_weights(plan).unsqueeze(1)
                return mf.combine(rows, plan, weighted=weighted, wire=wire, backward_wire=wire)

            want = torch.autograd.grad(run(x, weights), (x, weights), grad)
            got = torch.autograd.grad(checkpoint(run, x, weights, use_reentrant=False), (x, weights), grad)
            assert all(map(torch.equal, got, want)), (weighted, wire)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_makes_a_layer_again_which_reads_what_is_saved_only_once(ranks: int) -> None:
    run_ranks(made_again_here, ranks)
