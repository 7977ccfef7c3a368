"""A layer with SwiGLU experts by grouped_mm around any `peers.Layer`, and its check against a dense layer in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

import moecomm.functional as mf
from benchmarks.inputs import routed
from benchmarks.peers import Layer

Whole = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # x, experts, weights, into [E, 2 H, D], out [E, D, H] -> y


class Sizes(NamedTuple):
    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int


def matrices(size: Sizes, device: str) -> tuple[Tensor, Tensor]:
    seed = torch.Generator(device).manual_seed(0)
    shapes = (size.experts, 2 * size.hidden, size.dim), (size.experts, size.dim, size.hidden)
    made = [torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=shape[2] ** -0.5, generator=seed) for shape in shapes]
    return made[0].requires_grad_(), made[1].requires_grad_()


def swiglu(rows: Tensor, ends: Tensor, into: Tensor, out: Tensor) -> Tensor:
    gate, up = grouped_mm(rows, into.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return grouped_mm(silu(gate) * up, out.transpose(1, 2), offs=ends)


def with_experts(layer: Layer) -> Whole:
    """The layer around experts of grouped_mm."""

    def whole(x: Tensor, experts: Tensor, weights: Tensor, into: Tensor, out: Tensor) -> Tensor:
        return layer(x, experts, weights, into.shape[0], lambda rows, ends, _: swiglu(rows, ends, into, out))  # type: ignore[arg-type]

    return whole


def lean(x: Tensor, experts: Tensor, weights: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """moecomm's layer whose experts multiply the weights in before the last matmul."""
    plan = mf.plan(experts, weights, into.shape[0], like=x)
    gate, up = grouped_mm(mf.dispatch(x, plan), into.transpose(1, 2), offs=plan.offsets).to(plan.weights.dtype).chunk(2, dim=-1)
    hidden = silu(gate) * up * mf.row_weights(plan).unsqueeze(1)  # [N, H], rounded once
    return mf.combine(grouped_mm(hidden.to(x.dtype), out.transpose(1, 2), offs=plan.offsets), plan, weighted=False)


def check_whole(way: Whole, dtype: torch.dtype, device: str) -> None:
    """Raise unless it is the dense float64 layer, with its gradients."""
    size = Sizes(48, 64, 32, 8, 2)
    x, experts, weights, grad = routed(size.tokens, size.dim, size.experts, size.k, dtype, device)
    given = x, weights, *(matrix.detach().to(dtype).requires_grad_() for matrix in matrices(size, device))
    found = _checked(way, given, experts, grad)
    right = _checked(dense_layer, tuple(tensor.detach().double().requires_grad_() for tensor in given), experts, grad.double())
    tolerance = 4e-2 if dtype == torch.bfloat16 else 1e-4
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


def _checked(way: Whole, given: tuple[Tensor, ...], experts: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, weights, into, out = given
    y = way(x, experts, weights, into, out)
    return y.detach(), *torch.autograd.grad(y, given, grad)


def dense_layer(x: Tensor, experts: Tensor, weights: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """Every expert over every token."""
    gate, up = torch.einsum("td,ehd->eth", x, into).chunk(2, dim=-1)
    each = torch.einsum("eth,edh->etd", silu(gate) * up, out)
    mix = torch.zeros(x.shape[0], into.shape[0], dtype=x.dtype, device=x.device).scatter_add(1, experts, weights)  # [T, E]
    return torch.einsum("te,etd->td", mix, each)
