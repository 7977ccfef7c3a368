"""What is measured against each other computes the same: every benchmark makes this check before it times anything."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import ON_ONE, ON_RANKS, check
from tests.spawn import run_ranks

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", ON_ONE)
def test_a_peer_is_the_dense_layer_on_one_process(name: str) -> None:
    for dtype in DTYPES:
        for k in (1, 8):
            check(ON_ONE[name], dtype, k)


def check_here() -> None:
    for layer in ON_RANKS.values():
        for dtype in DTYPES:
            for k in (1, 8):
                check(layer, dtype, k)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_peer_is_the_dense_layer_on_ranks(ranks: int) -> None:
    run_ranks(check_here, ranks, timeout=120)


def test_the_check_sees_a_layer_that_is_wrong() -> None:
    def forgets_weights(x, experts, weights, num_experts, compute):  # type: ignore[no-untyped-def]
        return ON_ONE["k_fold"](x, experts, torch.ones_like(weights) + 0 * weights, num_experts, compute)

    with pytest.raises(AssertionError, match="not close"):
        check(forgets_weights, torch.float32, 2)
