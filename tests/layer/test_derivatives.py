"""A layer's second derivatives are those of all experts computed densely; what moecomm cannot differentiate it says, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

import moecomm.functional as mf
from tests import reference
from tests.spawn import FOUR, run_ranks

TOKENS = {1: (5,), 2: (4, 3), 4: (2, 0, 4, 1)}
E, K, D = 4, 2, 3


def problem(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, experts, weights, scales): an expert multiplies by its scale, and then squares."""
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.rand(tokens, E + 1, generator=generator).argsort(1)[:, :K] - 1  # in static mode a rank of one expert has one row
    x, weights, scales = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((tokens, D), (tokens, K), (E,)))
    return x, experts, weights, scales


def penalty(y: Tensor, leaves: list[Tensor]) -> Tensor:
    """The squares of the gradients, to be differentiated once more."""
    gradients = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
    return sum(((gradient**2).sum() for gradient in gradients), y.new_zeros(()))


def truth(tokens: int) -> list[Tensor]:
    x, experts, weights, scales = problem(tokens)
    leaves = [x.requires_grad_(), weights.requires_grad_(), scales.requires_grad_()]
    y = x + torch.einsum("te,etd->td", reference.mix(experts, weights, E), (x * scales.view(E, 1, 1)) ** 2)
    return list(torch.autograd.grad(penalty(y, leaves), leaves))


def second_here(max_rows: int | None) -> list[Tensor]:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, experts, weights, scales = problem(sum(TOKENS[ranks]))
    own = slice(sum(TOKENS[ranks][:rank]), sum(TOKENS[ranks][: rank + 1]))
    x, weights = x[own].clone().requires_grad_(), weights[own].clone().requires_grad_()
    scales = scales.chunk(ranks)[rank].clone().requires_grad_()
    plan = mf.plan(experts[own], weights, E, max_rows=max_rows)
    expert = torch.searchsorted(plan.offsets, torch.arange(plan.row_order.shape[0], dtype=torch.int32), right=True)
    factors = torch.cat((scales, scales.new_zeros(1)))[expert].unsqueeze(1)  # zeros for padding
    y = x + mf.combine((mf.dispatch(x, plan) * factors) ** 2, plan)  # x is used elsewhere, too: a part that is left out would not be missed
    leaves = [x, weights, scales]
    return list(torch.autograd.grad(penalty(y, leaves), leaves))


@pytest.mark.parametrize("max_rows", [None, 5])
@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_a_penalty_on_the_gradients_has_the_gradients_of_the_dense_layers(ranks: int, max_rows: int | None) -> None:
    """The scales' gradients enter the penalty as each rank has them, which is all of it: an expert is on one rank."""
    for got, want in zip(zip(*run_ranks(second_here, ranks, max_rows), strict=True), truth(sum(TOKENS[ranks])), strict=True):
        torch.testing.assert_close(torch.cat(got), want, rtol=1e-10, atol=1e-10)


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    plan = mf.plan(torch.tensor([[0, 1], [1, -1]]), weights, 2)
    return mf.combine(mf.dispatch(x, plan), plan)


def dual(layer: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor) -> None:
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, torch.ones_like(x)), weights)


def dual_weights(layer: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor) -> None:
    with forward_ad.dual_level():
        layer(x, forward_ad.make_dual(weights, torch.ones_like(weights)))


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "grad": (lambda layer, x, w: torch.func.grad(lambda x: layer(x, w).sum())(x), r"\w+ was called inside a Grad transform of torch.func"),
    "vjp": (lambda layer, x, w: torch.func.vjp(lambda x: layer(x, w), x), r"\w+ was called inside a Grad transform of torch.func"),
    "jvp": (lambda layer, x, w: torch.func.jvp(lambda x: layer(x, w), (x,), (x,)), r"\w+ was called inside a Jvp transform of torch.func"),
    "a dual x": (dual, "dispatch was called with a dual tensor of forward-mode differentiation"),
    "dual weights": (dual_weights, r"\w+ was called with a dual tensor of forward-mode differentiation"),
}


def refusals_here() -> list[str]:
    x, weights = torch.ones(2, 3), torch.ones(2, 2)
    messages = []
    for call, _ in REFUSED.values():
        with pytest.raises(NotImplementedError) as error:
            call(weighted, x, weights)
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("ranks", [1, 2])
def test_transforms_and_forward_mode_are_refused_by_name_and_not_silently_wrong(ranks: int) -> None:
    for messages in run_ranks(refusals_here, ranks):
        for message, (_, text) in zip(messages, REFUSED.values(), strict=True):
            assert re.match(text, message)
            assert message.endswith(
                "it must be called outside: torch.autograd.grad and backward differentiate it, as many times as you like"
            )


def modes_here() -> list[list[float]]:
    x, weights = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, 0.25], [2.0, 0.0]])
    results = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            y = weighted(x.clone().requires_grad_(), weights)
            assert y.requires_grad == (mode is torch.enable_grad)
            results.append(y.tolist())
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_runs_in_inference_mode_and_without_gradients(ranks: int) -> None:
    assert run_ranks(modes_here, ranks) == [[[[0.75], [4.0]]] * 3] * ranks
