"""Layers in several threads of a process at once, on groups of their own, and on side streams of a GPU: nothing is shared between them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from moecomm.parallel.group import GroupLike
from tests import reference
from tests.layers import experts_by_row
from tests.spawn import FOUR, run_ranks

E, K, D, H = 4, 2, 6, 5
THREADS, STEPS = 2, 12
TOKENS = {1: (7,), 2: (5, 3), 4: (4, 0, 6, 1)}


class Problem(NamedTuple):
    x: Tensor  # [T, D], of all ranks
    experts: Tensor  # [T, K]
    weights: Tensor  # [T, K]
    up: Tensor  # [E, D, H]
    down: Tensor  # [E, H, D]
    grad: Tensor  # [T, D]


def problem(tokens: int, thread: int, step: int) -> Problem:
    generator = torch.Generator().manual_seed(100 * thread + step)
    x, weights, up, down, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, D), (tokens, K), (E, D, H), (E, H, D), (tokens, D))
    )
    return Problem(x, torch.randint(-1, E, (tokens, K), generator=generator), weights, up, down, grad)


def step_here(thread: int, step: int, group: GroupLike) -> dict[str, Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    of, tokens = problem(sum(TOKENS[ranks]), thread, step), TOKENS[ranks]
    own = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    mine = slice(rank * E // ranks, (rank + 1) * E // ranks)
    leaves = {"x": of.x[own], "weights": of.weights[own], "up": of.up[mine], "down": of.down[mine]}
    x, weights, up, down = (leaf.clone().requires_grad_() for leaf in leaves.values())
    plan = mf.plan(of.experts[own], weights, E, group, like=x)
    rows = experts_by_row(mf.dispatch(x, plan), up.transpose(1, 2), down.transpose(1, 2), plan.offsets)
    y = mf.combine(rows, plan)
    gradients = torch.autograd.grad(y, (x, weights, up, down), of.grad[own])
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def threads_here() -> list[list[dict[str, Tensor]]]:
    """Each thread's steps, on a group of its own of the same ranks; the threads start together and are not in step after that."""
    groups = [dist.new_group() for _ in range(THREADS)]
    together = threading.Barrier(THREADS)

    def steps(thread: int) -> list[dict[str, Tensor]]:
        together.wait()
        return [step_here(thread, step, groups[thread]) for step in range(STEPS)]

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(steps, range(THREADS)))
    for group in groups:
        dist.destroy_process_group(group)
    return results


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_threads_with_groups_of_their_own_have_layers_of_their_own(ranks: int) -> None:
    parts = run_ranks(threads_here, ranks, timeout=200)
    for thread in range(THREADS):
        for step in range(STEPS):
            want = reference.layer_and_gradients(*problem(sum(TOKENS[ranks]), thread, step))
            for name, value in want.items():
                got = torch.cat([part[thread][step][name] for part in parts])
                torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-12)


def one_layer(x: Tensor, experts: Tensor, weights: Tensor, max_rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    plan = mf.plan(experts, weights, 64, max_rows=max_rows)
    y = mf.combine(mf.dispatch(x, plan) * 3, plan)
    return y, *torch.autograd.grad(y, (x, weights), torch.ones_like(y))


def test_threads_without_a_group_get_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(300, D, generator=generator), torch.rand(300, 8, generator=generator)
    experts = torch.rand(300, 64, generator=generator).argsort(1)[:, :8]
    want = one_layer(x, experts, weights, None)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: one_layer(x, experts, weights, None), range(40)):
            assert all(map(torch.equal, got, want))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("max_rows", [None, 2048])
def test_layers_on_side_streams_are_those_of_the_default_stream(max_rows: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2048, 512, generator=generator).cuda(), torch.rand(2048, 8, generator=generator).cuda()
    experts = torch.rand(2048, 64, generator=generator).argsort(1)[:, :8].cuda()
    want = one_layer(x, experts, weights, max_rows)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams * 4:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(one_layer(x, experts, weights, max_rows))
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    for got in results:
        assert all(map(torch.equal, got, want))
