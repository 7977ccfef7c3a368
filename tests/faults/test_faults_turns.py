"""Ranks with nothing to do take part in every exchange, exchanges of several groups take turns, and gradients are reduced meanwhile."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moecomm.functional as mf
from moecomm.parallel.group import GroupLike
from tests import reference
from tests.spawn import run_ranks

E, K, D = 4, 2, 6


def scaled(rows: Tensor, scale: Tensor, offsets: Tensor) -> Tensor:
    """Experts that multiply: row [N, D] of local expert e times scale[e]."""
    expert = torch.searchsorted(offsets, torch.arange(rows.shape[0], dtype=offsets.dtype), right=True)  # [N]
    return rows * scale[expert].unsqueeze(1)


class Share(NamedTuple):
    """What a rank has of the results: y and gradients."""

    y: Tensor
    x: Tensor
    scales: list[Tensor]


def tokens_of(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], weights [T, K] and the gradient of y [T, D] of all ranks' tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(sum(shape), wide, generator=generator, dtype=torch.float64) for wide in (D, K, D))  # type: ignore[return-value]


def scales_of(layers: int) -> list[Tensor]:
    return list(1 + torch.rand(layers, E, generator=torch.Generator().manual_seed(7), dtype=torch.float64))


def truth(shape: tuple[int, ...], seed: int, experts: list[Tensor], parallel: bool) -> Share:
    """All experts densely: layers one behind the other, or side by side and added up."""
    x, weights, grad = tokens_of(shape, seed)
    leaves = [x.requires_grad_(), *(scale.clone().requires_grad_() for scale in scales_of(len(experts)))]
    factors = [(reference.mix(ids, weights, E) @ scale).unsqueeze(1) for ids, scale in zip(experts, leaves[1:], strict=True)]
    y = sum((x * factor for factor in factors), torch.zeros_like(x)) if parallel else x * factors[0] * factors[1]
    gradients = torch.autograd.grad(y, leaves, grad)
    return Share(y.detach(), gradients[0], list(gradients[1:]))


def layer(x: Tensor, ids: Tensor, weights: Tensor, scale: Tensor, group: GroupLike) -> Tensor:
    plan = mf.plan(ids, weights, E, group, like=x)
    return mf.combine(scaled(mf.dispatch(x, plan), scale, plan.offsets), plan)


SHAPE, STEPS = (3, 0, 4, 2), 20


def starving(step: int) -> list[Tensor]:
    """Two layers' experts: all tokens choose one expert, another one each step, but those of a rank in turn, which choose none."""
    first = [torch.full((tokens, K), -1 if rank == step % 5 else step % E) for rank, tokens in enumerate(SHAPE)]
    return [torch.cat(first), torch.full((sum(SHAPE), K), (step // E) % E)]


def starving_here() -> list[Share]:
    rank, shares = dist.get_rank(), []
    own = slice(sum(SHAPE[:rank]), sum(SHAPE[: rank + 1]))
    for number in range(STEPS):
        x, weights, grad = (part[own] for part in tokens_of(SHAPE, number))
        leaves = [x.requires_grad_(), *(scale[rank : rank + 1].clone().requires_grad_() for scale in scales_of(2))]
        y = x
        for ids, scale in zip(starving(number), leaves[1:], strict=True):
            y = layer(y, ids[own], weights, scale, None)
        gradients = torch.autograd.grad(y, leaves, grad)
        shares.append(Share(y.detach(), gradients[0], list(gradients[1:])))
    return shares


@pytest.mark.slow
def test_ranks_that_send_none_and_that_get_none_take_part_in_every_exchange() -> None:
    """A rank that gets no tokens must have the backward graph of the others: Megatron-LM pull request 4851, PaddleFormers pull request
    3010. One that has none to send must come to the exchange, and to every step: uccl pull request 940, and vLLM issue 43547, where such
    a rank left out a collective, fell behind by one each time, and the job hung an hour later."""
    assert len(SHAPE) == E  # an expert each
    for number, *shares in zip(range(STEPS), *run_ranks(starving_here, len(SHAPE)), strict=True):
        want = truth(SHAPE, number, starving(number), parallel=False)
        torch.testing.assert_close(torch.cat([share.y for share in shares]), want.y)
        torch.testing.assert_close(torch.cat([share.x for share in shares]), want.x)
        for i, scale in enumerate(want.scales):
            torch.testing.assert_close(torch.cat([share.scales[i] for share in shares]), scale)


def ids_of(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    return [torch.randint(-1, E, (sum(SHAPE), K), generator=generator) for _ in range(2)]


def interleaved_here() -> list[Share]:
    """The same tokens through a layer over this rank's row of the mesh and one over its column, their exchanges in turns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("column", "row"))
    rank, groups = dist.get_rank(), (mesh["row"], mesh["column"])
    own, shares = slice(sum(SHAPE[:rank]), sum(SHAPE[: rank + 1])), []
    for number in range(5):
        x, weights, grad = (part[own] for part in tokens_of(SHAPE, number))
        mine = [group.get_local_rank() for group in groups]
        leaves = [x.requires_grad_(), *(s.chunk(2)[i].clone().requires_grad_() for s, i in zip(scales_of(2), mine, strict=True))]
        row, column = (mf.plan(ids[own], weights, E, group, like=x) for ids, group in zip(ids_of(number), groups, strict=True))
        to_row, to_column = mf.dispatch(x, row), mf.dispatch(x, column)
        of_column = mf.combine(scaled(to_column, leaves[2], column.offsets), column)
        y = mf.combine(scaled(to_row, leaves[1], row.offsets), row) + of_column
        gradients = torch.autograd.grad(y, leaves, grad)
        shares.append(Share(y.detach(), gradients[0], list(gradients[1:])))
    return shares


def test_the_exchanges_of_two_groups_of_the_same_ranks_take_turns() -> None:
    """Two groups' collectives waited for each other in torchrec pull request 4149, and overlapping ones of one group came in different
    orders in Megatron-LM issue 1810; that they fail in time where ranks do not keep one order is in `test_faults.py`."""
    for number, *shares in zip(range(5), *run_ranks(interleaved_here, 4), strict=True):
        want = truth(SHAPE, number, ids_of(number), parallel=True)
        torch.testing.assert_close(torch.cat([share.y for share in shares]), want.y)
        torch.testing.assert_close(torch.cat([share.x for share in shares]), want.x)
        # The ranks that hold an expert, 0 and 2 or 1 and 3 in rows, 0 and 1 or 2 and 3 in columns, each have a part of its gradient.
        for i, ((a, b), (c, d)) in enumerate((((0, 2), (1, 3)), ((0, 1), (2, 3)))):
            part = [share.scales[i] for share in shares]
            torch.testing.assert_close(torch.cat((part[a] + part[b], part[c] + part[d])), want.scales[i])


BULK = 2**18  # elements that are reduced beside each gradient: large enough to be on their way during the exchanges that follow


def reduced_here() -> list[tuple[Share, list[float]]]:
    """Two layers over this rank's row of the mesh, whose gradients are reduced from the moment that they are there, by hooks, while the
    exchanges of the backward go on: over its column, over its row, whose exchanges they are, and over all; ranks are apart in time."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("column", "row"))
    rank, row = dist.get_rank(), mesh["row"].get_local_rank()
    groups = [mesh["column"].get_group(), mesh["row"].get_group(), dist.group.WORLD]
    own, shares = slice(sum(SHAPE[:rank]), sum(SHAPE[: rank + 1])), []
    for number in range(5):
        x, weights, grad = (part[own] for part in tokens_of(SHAPE, number))
        scales = [scale.chunk(2)[row].clone().requires_grad_() for scale in scales_of(2)]
        works: list[dist.Work] = []
        bulks: list[Tensor] = []

        def reduce(scale: Tensor, works: list[Any] = works, bulks: list[Tensor] = bulks, number: int = number) -> None:
            time.sleep(0.004 * ((rank + number) % 3))
            assert scale.grad is not None
            for group in groups:
                bulks.append(torch.full((BULK,), float(rank + 1), dtype=torch.float64))
                works.append(dist.all_reduce(bulks[-1], group=group, async_op=True))
            works.append(dist.all_reduce(scale.grad, group=groups[0], async_op=True))

        for scale in scales:
            scale.register_post_accumulate_grad_hook(reduce)
        y = x.requires_grad_()
        for ids, scale in zip(ids_of(number), scales, strict=True):
            y = layer(y, ids[own], weights, scale, mesh["row"])
        y.backward(grad)
        for work in works:
            work.wait()
        assert x.grad is not None
        assert [len(works), len(bulks)] == [8, 6]
        sums = [bulk.unique().item() for bulk in bulks]
        shares.append((Share(y.detach(), x.grad, [scale.grad for scale in scales if scale.grad is not None]), sums))
    return shares


@pytest.mark.slow
def test_gradients_are_reduced_over_the_same_ranks_while_exchanges_are_on_their_way() -> None:
    """Megatron-LM issue 5749: the all-to-all of tokens and the reduction of gradients on the same ranks, which came to a standstill."""
    for number, *ranks in zip(range(5), *run_ranks(reduced_here, 4), strict=True):
        want = truth(SHAPE, number, ids_of(number), parallel=False)
        torch.testing.assert_close(torch.cat([share.y for share, _ in ranks]), want.y)
        torch.testing.assert_close(torch.cat([share.x for share, _ in ranks]), want.x)
        for i, scale in enumerate(want.scales):
            for pair in (0, 2):  # ranks 0 and 1, and ranks 2 and 3, have all experts, and after the reduction the whole gradient
                torch.testing.assert_close(torch.cat([share.scales[i] for share, _ in ranks[pair : pair + 2]]), scale)
        for rank, (_, sums) in enumerate(ranks):  # rank r contributed r + 1
            column, row = {0: (4.0, 3.0), 1: (6.0, 3.0), 2: (4.0, 7.0), 3: (6.0, 7.0)}[rank]
            assert sums == [column, row, 10.0] * 2
