"""torch's anomaly mode: a whole layer passes it in every mode, though grouped_mm leaves rows outside offsets uninitialized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

import moecomm.functional as mf
from tests.spawn import run_ranks

T, D, H, E, K = 7, 16, 8, 4, 2
MODES: list[dict[str, int]] = [{}, {"align": 4}, {"max_rows": T + 1}, {"max_rows": 2}, {"max_rows": T + 1, "align": 8}]


@contextmanager
def memory_of_nan() -> Iterator[None]:
    """Uninitialized memory is NaN: torch fills it in deterministic mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gradients(anomaly: bool, tokens: int, **options: int) -> list[Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    seed = torch.Generator().manual_seed(rank)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seed).bfloat16().requires_grad_()

    x, gate, into, out = leaves = leaf(tokens, D), leaf(D, E), leaf(E // ranks, D, H), leaf(E // ranks, H, D)
    with torch.autograd.set_detect_anomaly(anomaly):
        weights, experts = mf.route(x @ gate, K)
        plan = mf.plan(experts, weights, E, like=x, **options)  # type: ignore[arg-type]
        rows = silu(grouped_mm(mf.dispatch(x, plan), into, offs=plan.offsets))
        y = mf.combine(grouped_mm(rows, out, offs=plan.offsets), plan)
        y.backward(torch.arange(y.numel()).view(y.shape).cos().to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def layers_here() -> None:
    with memory_of_nan():
        for options in MODES:
            for tokens in (T - dist.get_rank(), 1):
                got, want = (gradients(anomaly, tokens, **options) for anomaly in (True, False))
                assert len(got) == 5
                for one, other in zip(got, want, strict=True):
                    assert torch.equal(one, other), options
                    assert one.isfinite().all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_passes_in_every_mode_with_the_same_bits(ranks: int) -> None:
    run_ranks(layers_here, ranks)
