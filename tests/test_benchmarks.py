"""What is measured against each other computes the same: every benchmark makes this check before it times anything."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks import figures, layer
from benchmarks.peers import ON_ONE, ON_RANKS, check
from tests.spawn import run_ranks

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", ON_ONE)
def test_a_peer_is_the_dense_layer_on_one_process(name: str) -> None:
    for dtype in DTYPES:
        for k in (1, 8):
            check(ON_ONE[name], dtype, k)


def check_here() -> None:
    for way in ON_RANKS.values():
        for dtype in DTYPES:
            for k in (1, 8):
                check(way, dtype, k)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_peer_is_the_dense_layer_on_ranks(ranks: int) -> None:
    run_ranks(check_here, ranks, timeout=120)


def test_the_check_sees_a_layer_that_is_wrong() -> None:
    def forgets_weights(x, experts, weights, num_experts, compute):  # type: ignore[no-untyped-def]
        return ON_ONE["k_fold"](x, experts, torch.ones_like(weights) + 0 * weights, num_experts, compute)

    with pytest.raises(AssertionError, match="not close"):
        check(forgets_weights, torch.float32, 2)


def lines_here() -> list[layer.Line]:
    with patch.multiple(layer, TOKENS=16, DIM=8, REPEATS=2):
        return layer.on_ranks(torch.float32, 2) + layer.bytes_and_peak(torch.float32, 2)


def test_ranks_are_measured_alike_and_bytes_are_counted() -> None:
    of_ranks = run_ranks(lines_here, 4, timeout=120)
    assert all(lines == of_ranks[0] for lines in of_ranks)  # the slowest rank's times, and everyone's bytes
    lines = {(line["what"], line["case"], line["to"]): line for line in of_ranks[0]}
    for case, to in (("k_fold", "moecomm"), ("by_expert", "moecomm"), ("moecomm", "floor"), ("plan", "forward")):
        line = lines["4 ranks", case, to]
        assert 0 < line["low"] <= line["ratio"] <= line["high"]
    sent, of_k_fold = lines["bytes", "moecomm", "k_fold"]["amounts"]
    metadata, all_sent = lines["bytes", "metadata", "all that moecomm sends"]["amounts"]
    assert all_sent == sent
    assert 0 < metadata < sent
    elsewhere = 0
    for rank in range(4):
        seed = torch.Generator().manual_seed(rank)
        torch.randn(16, 8, generator=seed)
        places = torch.rand(16, layer.EXPERTS, generator=seed).topk(2).indices // (layer.EXPERTS // 4)
        elsewhere += int((places != rank).sum())
    counts = 4 * 3 * layer.EXPERTS // 4 * 8  # int64, of each rank's experts to each other rank
    assert of_k_fold == 4 * elsewhere * 8 * 4 + counts  # a float32 row a slot, in four exchanges


def test_the_figures_in_the_document_are_those_of_the_committed_run() -> None:
    root = Path(__file__).parent.parent
    results = json.loads((root / "benchmarks" / "results" / "layer_cpu.json").read_text())
    assert figures.tables(results) in (root / "docs" / "benchmarks.md").read_text()
    assert (root / "docs" / "benchmarks.png").stat().st_size > 10_000
