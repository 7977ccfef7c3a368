"""The arithmetic of the cost model: the pairs it expects are those that a simulation counts, and its limits are the plain ones."""

from __future__ import annotations

import pytest
import torch

import moecomm.functional as mf
from benchmarks import links
from benchmarks.links import Measured
from benchmarks.model import HOPPER, Load, k_fold, moecomm, predicted
from moecomm.planner import Cluster, Link
from moecomm.planner.cluster import exchange
from moecomm.planner.routing import pairs

TOKENS = 20_000


def nodes_of(ranks: int, inside: Link, between: Link) -> Cluster:
    return HOPPER._replace(node=ranks, inside=inside, between=between)


def counted(experts: torch.Tensor, ranks: int, num_experts: int) -> float:
    """(token, rank) pairs a token."""
    place = experts // (num_experts // ranks)
    return float((place.unsqueeze(2) == torch.arange(ranks)).any(1).sum() / experts.shape[0])


@pytest.mark.parametrize(("num_experts", "k", "ranks"), [(8, 2, 4), (64, 8, 4), (64, 1, 8), (256, 8, 64), (16, 16, 4)])
def test_the_pairs_expected_are_those_of_a_simulation(num_experts: int, k: int, ranks: int) -> None:
    chosen = torch.rand(TOKENS, num_experts, generator=torch.Generator().manual_seed(k)).topk(k).indices
    assert counted(chosen, ranks, num_experts) == pytest.approx(pairs(num_experts, k, ranks), rel=5e-3)


@pytest.mark.parametrize(("num_experts", "k", "nodes", "most"), [(64, 8, 8, 4), (64, 4, 8, 2), (32, 6, 4, 3)])
def test_the_pairs_expected_with_a_limit_of_nodes_are_those_of_a_simulation(num_experts: int, k: int, nodes: int, most: int) -> None:
    seed = torch.Generator().manual_seed(most)
    node = torch.rand(TOKENS, nodes, generator=seed).topk(most).indices  # [T, M]
    allowed = (torch.arange(num_experts) // (num_experts // nodes)).expand(TOKENS, -1).unsqueeze(2) == node.unsqueeze(1)
    chosen = torch.rand(TOKENS, num_experts, generator=seed).masked_fill(~allowed.any(2), -1).topk(k).indices
    ranks = 2 * nodes
    assert counted(chosen, ranks, num_experts) == pytest.approx(pairs(num_experts, k, ranks, nodes, most), rel=5e-3)


def test_group_limited_routing_makes_about_the_pairs_that_are_expected() -> None:
    """`route` takes the groups whose best two experts are best, and so K experts that lie further apart than any K of those groups do."""
    scores = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(0))
    _, chosen = mf.route(scores, 8, num_groups=8, top_groups=4)
    assert 1 < counted(chosen, 16, 64) / pairs(64, 8, 16, 8, 4) < 1.08


def test_the_limits_of_pairs() -> None:
    assert pairs(64, 8, 1) == 1  # one rank has them all
    assert pairs(64, 1, 16) == pytest.approx(1)  # one expert, one rank
    assert pairs(64, 8, 64) == pytest.approx(8)  # an expert a rank: nothing to save
    assert pairs(64, 64, 16) == 16  # every expert: every rank
    assert pairs(64, 8, 16, nodes=2, most_nodes=2) == pytest.approx(pairs(64, 8, 16))  # a limit that limits nothing
    assert pairs(64, 8, 16, nodes=8, most_nodes=1) == pytest.approx(2)  # 8 of the one node's 8 experts: both of its ranks


def test_an_exchange_is_latency_for_nothing_and_bytes_by_speed_for_much() -> None:
    here, there = Link(1e-6, 1e-7, 1e11), Link(1e-5, 1e-6, 1e10)
    cluster = nodes_of(4, here, there)
    assert exchange(cluster, 1, 1e6) == 0
    assert exchange(cluster, 4, 0) == pytest.approx(1e-6 + 3e-7)
    assert exchange(cluster, 4, 1e9) == pytest.approx(3e9 / 1e11, rel=1e-3)
    assert exchange(cluster, 8, 0) == pytest.approx(1e-5 + 4e-6)
    assert exchange(cluster, 8, 1e9) == pytest.approx(4e9 / 1e10, rel=1e-3)  # the slower link of the two


def test_where_bytes_are_all_the_ways_differ_by_the_pairs() -> None:
    fast = Link(0.0, 0.0, 1e10)
    cluster, load = nodes_of(8, fast, fast), Load(tokens=4096, dim=2**20, experts=64, k=8)
    assert k_fold(cluster, 16, load) / moecomm(cluster, 16, load) == pytest.approx(8 / pairs(64, 8, 16), rel=1e-3)


def test_the_slots_of_few_tokens_cost_no_exchange_of_their_own() -> None:
    slow = Link(1.0, 0.0, 1e30)  # an exchange takes a second, whatever it carries
    for tokens, exchanges in ((100, 3), (400, 4)):  # 0.9 of them to each rank, where 204 pairs have room
        load = Load(tokens=tokens, dim=16, experts=32, k=8)
        assert moecomm(nodes_of(8, slow, slow), 4, load) == pytest.approx(exchanges)


def test_the_prediction_of_the_cluster_grows_with_it() -> None:
    lines = predicted(HOPPER, [8, 16, 64, 4096])
    assert [line["gpus"] for line in lines] == [8, 16, 64, 4096]
    for way in ("moecomm", "k_fold"):
        times = [line[way] for line in lines]
        assert times == sorted(times)
    assert lines[0]["moecomm"] < lines[0]["k_fold"]


def test_the_fit_finds_the_link_that_made_the_times() -> None:
    link = Link(50e-6, 20e-6, 3e9)
    measured = [
        Measured("equal parts", ranks, 1, size, (links.seconds(link, ranks, size),) * 3) for ranks in (2, 4) for size in links.BYTES[::2]
    ]
    for found, made in zip(links.fit(measured), link, strict=True):
        assert found == pytest.approx(made, rel=1e-6)
    assert links.compared(link, measured[0])["ratio"] == pytest.approx(1)
    assert links.fitted(measured[0])
    assert not links.fitted(measured[0]._replace(ranks=8))
