"""Layers on random meshes with random sizes, routings, dtypes, placements and bounds: each is that of all experts computed densely."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moecomm.functional as mf
from tests import reference
from tests.fuzz.cases import INTEGERS, fuzzed, layout, layouts, placements, routings
from tests.layer.test_layer import loop
from tests.ops.bounds import by_kernels
from tests.ops.routing.test_drop_overflow import expected as fits_by_loop
from tests.ops.routing.test_place_slots import expected as places_by_loop
from tests.spawn import run_ranks

H = 4
NAN = float("nan")
# What an error may be, in units of eps(dtype) times the tensor's largest magnitude, or times 1, as in tests/layer/test_layer.py: the
# largest of 2,000 cases was 3.7 (float64), 3.3 (float32), 2.3 (bfloat16) and 1.5 (float16).
UNITS = {torch.float64: 8.0, torch.float32: 8.0, torch.bfloat16: 4.0, torch.float16: 4.0}


class Case(NamedTuple):
    tokens: tuple[int, ...]  # of each rank
    k: int
    num_experts: int
    ep: int  # ranks of a group that the experts are spread over
    first: bool  # whether these are the mesh's first dim, and so not neighbours
    named: str  # what the group is named by
    placement: list[list[int]] | None
    experts: list[Tensor]  # [T, K] of each rank, int64
    ids: torch.dtype  # that they are passed in
    max_rows: int | None
    align: int
    d: int
    dtype: torch.dtype
    weights: torch.dtype
    like: bool
    layouts: tuple[int, int, int]  # of x, experts and weights
    seed: int  # of the values


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks = draw(st.sampled_from((1, 2, 4)))
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if ranks % n == 0]))
    named = draw(st.sampled_from(("mesh", "mesh and dim", "group", "name", *(["none", "world"] if ep == ranks else []))))
    if draw(st.booleans()):
        num_experts, placement = ep * draw(st.integers(1, 4)), None
    else:
        num_experts = draw(st.integers(1, 7))
        placement = draw(placements(num_experts, ep))
    k = draw(st.integers(1, min(num_experts, 6)))
    tokens = draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks))
    ids = draw(st.sampled_from(INTEGERS))
    experts = [draw(routings(t, k, num_experts, 0 if ids == torch.uint8 else -1)) for t in tokens]
    max_rows = draw(st.one_of(st.none(), st.integers(1, 10)))
    dtype, weights = draw(st.sampled_from(list(UNITS))), draw(st.sampled_from(list(UNITS)))
    if torch.float64 in (dtype, weights):
        weights = dtype  # else the float64 of one is not what limits the error
    how = (draw(layouts), draw(layouts), draw(layouts))
    rest = draw(st.booleans()), how, draw(st.integers(0, 999))
    align = draw(st.one_of(st.just(1), st.integers(1, 9)))
    shape = tuple(tokens), k, num_experts, ep, draw(st.booleans()), named, placement
    return Case(*shape, experts, ids, max_rows, align, draw(st.integers(1, 9)), dtype, weights, *rest)


class Values(NamedTuple):
    """The tensors of all ranks together; every rank makes the same ones."""

    x: Tensor  # [T, D]
    weights: Tensor  # [T, K]
    up: Tensor  # [E, D, H]
    down: Tensor  # [E, H, D]
    grad: Tensor  # [T, D]


def values(case: Case) -> Values:
    generator, tokens = torch.Generator().manual_seed(case.seed), sum(case.tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    up, down = normal(case.num_experts, case.d, H) / case.d**0.5, normal(case.num_experts, H, case.d) / H**0.5
    x, weights, grad = normal(tokens, case.d), normal(tokens, case.k).abs(), normal(tokens, case.d)
    return Values(x.to(case.dtype), weights.to(case.weights), up.to(case.dtype), down.to(case.dtype), grad.to(case.dtype))


@functools.cache
def mesh_of(ranks: int, ep: int, first: bool) -> DeviceMesh:
    shape, names = ((ep, ranks // ep), ("ep", "dp")) if first else ((ranks // ep, ep), ("dp", "ep"))
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def group_of(case: Case) -> Any:
    if case.named in ("none", "world"):
        return None if case.named == "none" else dist.group.WORLD
    mesh = mesh_of(len(case.tokens), case.ep, case.first)
    if case.named == "mesh and dim":
        return mesh, 0 if case.first else 1
    group = mesh.get_group("ep")
    return {"mesh": mesh["ep"], "group": group, "name": group.group_name}[case.named]


def place_of(case: Case, rank: int) -> int:
    """The rank's number in its group."""
    return rank // (len(case.tokens) // case.ep) if case.first else rank % case.ep


def held(case: Case, rank: int) -> list[int]:
    """The experts of a rank."""
    local, place = case.num_experts // case.ep, place_of(case, rank)
    return list(range(place * local, (place + 1) * local)) if case.placement is None else case.placement[place]


def layer(case: Case, rank: int, group: Any) -> dict[str, Tensor]:
    """y, the gradients and what was dropped of one rank; NaN in all padding of what the experts made."""
    of, own = values(case), slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
    x, weights, up, down = (part.clone() for part in (of.x[own], of.weights[own], of.up[held(case, rank)], of.down[held(case, rank)]))
    leaves = [layout(x, case.layouts[0]), layout(weights, case.layouts[2]), up, down]
    x, weights, up, down = (leaf.requires_grad_() for leaf in leaves)
    experts = layout(case.experts[rank].to(case.ids), case.layouts[1])
    how = {"placement": case.placement, "like": x if case.like else None, "max_rows": case.max_rows, "align": case.align}
    plan = mf.plan(experts, weights, case.num_experts, group, **how)
    rows = mf.dispatch(x, plan)
    here = int(plan.offsets[-1])
    computed = loop(rows[:here], up, down, plan.offsets)
    computed = torch.cat((computed, computed.new_zeros(rows.shape[0] - here, case.d)))
    y = mf.combine(computed.masked_fill((plan.row_order < 0).unsqueeze(1), NAN), plan)
    gradients = torch.autograd.grad(y, leaves, of.grad[own])
    dropped = torch.tensor(0) if plan.dropped is None else plan.dropped
    return {"y": y.detach(), **dict(zip(("x", "weights", "up", "down"), gradients, strict=True)), "dropped": dropped}


def layer_here(case: Case) -> dict[str, Tensor]:
    """The layer of this rank; a second call gives the same bits."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    first, second = (layer(case, rank, group_of(case)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value.view(-1).view(torch.uint8), second[name].view(-1).view(torch.uint8)), name
    return first


def kept(case: Case, rank: int) -> tuple[Tensor, int]:
    """The rank's ids without those for which static mode has no room, and how many these are."""
    experts = case.experts[rank]
    if case.max_rows is None:
        return experts, 0
    local, place = len(held(case, rank)), place_of(case, rank)
    places = experts if case.placement is None else places_by_loop(experts, case.placement, place)[0]
    fits, dropped = fits_by_loop(experts, places, case.ep, local, case.max_rows)
    return torch.where(fits < 0, -1, experts), int(dropped)


def errors(case: Case, parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """How far what the ranks have is from every expert computed densely, in float64: over what is tolerated."""
    of, ids = values(case), [kept(case, rank) for rank in range(len(case.tokens))]
    assert [int(part["dropped"]) for part in parts] == [lost for _, lost in ids]
    want = reference.layer_and_gradients(of.x, torch.cat([each for each, _ in ids]), of.weights, of.up, of.down, of.grad)
    got = {name: torch.cat([part[name] for part in parts]) for name in ("y", "x", "weights")}
    for name, total in (("up", torch.zeros_like(of.up, dtype=torch.float64)), ("down", torch.zeros_like(of.down, dtype=torch.float64))):
        for rank, part in enumerate(parts):
            total.index_add_(0, torch.tensor(held(case, rank)), part[name].double())
        got[name] = total
    far = {}
    for name, value in got.items():
        assert value.shape == want[name].shape
        assert name in ("up", "down") or value.dtype == (case.weights if name == "weights" else case.dtype)
        difference = (value.double() - want[name]).abs()
        eps = max(torch.finfo(case.dtype).eps, torch.finfo(case.weights).eps if name == "weights" else 0.0)
        largest = max(1.0, want[name].abs().max().item()) if value.numel() else 1.0
        far[name] = difference.max().item() / (UNITS[case.dtype] * eps * largest) if value.numel() else 0.0
        assert not difference.isnan().any(), name
    return far


def check(case: Case, run: Callable[[Case], dict[str, Tensor]]) -> None:
    alone = len(case.tokens) == 1 and case.named == "none"
    parts = [run(case)] if alone else run_ranks(run, len(case.tokens), case, timeout=200)
    far = errors(case, parts)
    assert max(far.values()) <= 1, f"times their tolerance off: {far}"


@pytest.mark.slow
@fuzzed(100, 2000)
@given(cases())
def test_a_layer_and_its_gradients_agree_with_every_expert_computed_densely(case: Case) -> None:
    check(case, layer_here)


def layer_by_kernels(case: Case) -> dict[str, Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return by_kernels(layer, case, rank, group_of(case))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is off")
@fuzzed(4, 200)
@given(cases())
def test_so_does_a_layer_of_triton_kernels_which_keep_within_their_tensors(case: Case) -> None:
    check(case, layer_by_kernels)
