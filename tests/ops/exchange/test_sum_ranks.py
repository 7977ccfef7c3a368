"""sum_ranks and sum_gradients, and cut_rows, which slice_reduce ends with where the ranks' slices differ in length."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.library import opcheck

from moecomm.ops.exchange.slices import chunk_bounds, cut_rows, slice_reduce
from moecomm.ops.exchange.sum_ranks import sum_gradient, sum_ranks
from tests.ops.cases import COMPOSED, check_gradients_across_ranks, seeded
from tests.spawn import run_ranks


def derivatives_here() -> None:
    ranks, name, rank = dist.get_world_size(), dist.group.WORLD.group_name, dist.get_rank()
    for size in (0, 5):
        x = torch.randn(size, 3, generator=seeded(rank), dtype=torch.float64).requires_grad_()
        check_gradients_across_ranks(lambda x: slice_reduce(x.sin(), 0, None, ranks, name), x)
        own = chunk_bounds(size, ranks, rank)[1]
        for op, args in ((sum_ranks, (x, ranks, name)), (sum_gradient, (x, ranks, name)), (slice_reduce, (x, 0, own, ranks, name))):
            opcheck(op, args, test_utils=COMPOSED)
        chunk = torch.arange(-(-size // ranks) * 2.0).view(-1, 2)
        assert torch.equal(cut_rows(chunk, size, ranks, name), chunk[:own])
        opcheck(cut_rows, (chunk, size, ranks, name))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_sums_are_ops_with_their_derivatives(ranks: int) -> None:
    run_ranks(derivatives_here, ranks)
