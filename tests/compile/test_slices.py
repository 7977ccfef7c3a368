"""Slices as one graph, whatever their size."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from tests.spawn import run_ranks

pytestmark = pytest.mark.slow


def slices(x: Tensor, piece: Tensor, dim: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A round trip, and both kinds of gather."""
    whole = mf.slice_gather(mf.slice_scatter(x, None, dim).sin(), None, dim, size=size)
    return whole, mf.slice_gather(piece, None, dim, size=size), mf.slice_gather(piece, None, dim, grad="reduce", size=size)


def slices_here(backend: str) -> None:
    torch._dynamo.reset()
    rank = dist.get_rank()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(slices, fullgraph=True, dynamic=True, backend=counter)
    for dim in (0, 1):
        for size in (5, 9, 6, 7):
            shape = [3, 3]
            shape[dim] = size
            x = torch.randn(shape, generator=torch.Generator().manual_seed(size), dtype=torch.float64).requires_grad_()
            piece = mf.slice_scatter(x.detach(), None, dim).requires_grad_()
            torch._dynamo.decorators.mark_unbacked(piece, dim)  # this rank's may be empty
            answers = []
            for function in (slices, compiled):
                results = function(x, piece, dim, size)
                scaled = sum((result * (rank + 1) * (i + 1)).cos().sum() for i, result in enumerate(results))
                answers.append([*results, *torch.autograd.grad(scaled, (x, piece))])
            for want, got in zip(*answers, strict=True):
                torch.testing.assert_close(got, want)
        assert counter.frame_count == dim + 1, f"another size must not recompile: {size}"


@pytest.mark.exhaustive  # tests/test_functions.py compiles them in every run
@pytest.mark.parametrize(("ranks", "backend"), [(2, "inductor"), *((ranks, "aot_eager") for ranks in (1, 2, 4))])
def test_compiled_slices_are_the_eager_ones_whatever_the_size(ranks: int, backend: str) -> None:
    run_ranks(slices_here, ranks, backend, timeout=200)
