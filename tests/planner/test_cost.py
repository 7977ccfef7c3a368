"""The parts of a step's time against small cases by hand: a cluster in which only one thing takes time shows that thing alone."""

from __future__ import annotations

from math import comb, inf
from typing import Any

import numpy as np
import pytest

from moecomm.planner import Cluster, Link, Model, Split, Way
from moecomm.planner.cluster import exchange, fit_link, gather, scatter
from moecomm.planner.cost import FULL, HEADER, HOOKS, LEAN, NONE, SHARDED, predict, shards
from moecomm.planner.routing import Fullest, check_loads, fullest, hit

FREE = Link(0.0, 0.0, inf)
NOTHING = Cluster("nothing", 4, FREE, FREE, inf, inf, inf, inf, inf, inf)
MODEL = Model(layers=4, dim=8, hidden=16, experts=8, k=2, heads=4, kv_heads=4, head=2, vocabulary=32, sequence=8, batch=16)
ALONE = Split(1, 1, 1, 1, 1, 1, 1)
PLAIN = Way(microbatches=1, fp8=False, static=False, recompute=NONE)
EVEN = Fullest(1.0, 1.0)
TOKENS = 8 * 16


def times(split: Split = ALONE, way: Way = PLAIN, full: Fullest = EVEN, model: Model = MODEL, **cluster: Any) -> dict[str, float]:
    return {name: float(value) for name, value in predict(model, NOTHING._replace(**cluster), split, way, full)._asdict().items()}


def test_matmuls_are_two_flops_a_weight_and_three_passes() -> None:
    attention = 4 * 8 * 8  # queries, keys, values, output
    weights = 4 * (attention + 8 * 8) + 32 * 8  # gates, and the output matrix
    assert times(matmul=1.0)["dense"] == pytest.approx(TOKENS * 3 * 2 * weights)
    assert times(grouped=1.0)["experts"] == pytest.approx(TOKENS * 2 * 4 * 3 * 2 * 3 * 8 * 16)
    assert times(attention=1.0)["dense"] == pytest.approx(TOKENS * 3 * 4 * 8 / 2 * 2 * 2 * 8)  # two matmuls with half of 8 tokens


def test_a_rank_has_its_part_of_the_work() -> None:
    for split in (Split(1, 2, 2, 2, 1, 8, 1), Split(1, 8, 1, 1, 8, 1, 1), Split(1, 1, 1, 8, 2, 2, 2)):
        for part, rate in (("dense", "matmul"), ("experts", "grouped")):
            assert times(split, **{rate: 1.0})[part] == pytest.approx(times(**{rate: 1.0})[part] / 8)
    stage = Split(4, 1, 1, 1, 1, 1, 1)
    assert times(stage, PLAIN._replace(microbatches=4), grouped=1.0)["experts"] == pytest.approx(times(grouped=1.0)["experts"] / 4)


def test_full_recomputation_is_a_fourth_pass() -> None:
    for part, rate in (("dense", "matmul"), ("experts", "grouped")):
        plain, lean, full = (times(way=PLAIN._replace(recompute=way), **{rate: 1.0})[part] for way in (NONE, LEAN, FULL))
        assert (lean / plain, full / plain) == pytest.approx((1, 4 / 3))


def test_the_fullest_rank_sets_the_pace_and_spare_cores_soften_it() -> None:
    split = Split(1, 4, 1, 1, 1, 4, 1)
    even, skewed = times(split, grouped=1.0)["experts"], times(split, full=Fullest(2.5, 1.0), grouped=1.0)["experts"]
    assert skewed == pytest.approx(2.5 * even)
    assert times(split, full=Fullest(2.5, 1.0), grouped=1.0, spare=2.0)["experts"] == pytest.approx(1.25 * even)
    assert times(split, full=Fullest(2.5, 1.0), grouped=1.0, spare=4.0)["experts"] == pytest.approx(even)


def test_a_pipeline_waits_a_microbatch_for_each_later_stage() -> None:
    split = Split(4, 1, 1, 1, 1, 1, 1)
    for microbatches in (4, 8, 16):
        of_step = times(split, PLAIN._replace(microbatches=microbatches), grouped=1.0)
        assert of_step["bubble"] == pytest.approx(of_step["experts"] * 3 / microbatches)
    assert times(split, PLAIN._replace(microbatches=4), grouped=1.0, spare=2.0)["bubble"] == 0  # 4 of 7 stages' time at twice the speed


def test_the_exchanges_over_ep_are_counts_slots_rows_and_their_gradients() -> None:
    split, full = Split(1, 4, 1, 1, 1, 4, 1), Fullest(1.0, 0.5)
    second_each = Link(1.0, 0.0, inf)
    balance = 1  # the balance loss
    assert times(split, full=full, inside=second_each)["exchanges"] == 4 * (balance + 1 + 2 + 2 + 1)  # 16 tokens to each: few
    many = MODEL._replace(batch=4096)
    assert times(split, full=full, model=many, inside=second_each)["exchanges"] == 4 * (balance + 1 + 1 + 2 + 2 + 1)
    slow = Link(0.0, 0.0, 1.0)  # a byte a second
    pairs = TOKENS / 4 * 0.5
    sent = 3 * (HEADER + 4 * pairs * 8 * 2 + pairs * 2 * 4 + 8 * 8)  # to 3 others: header, bf16 rows, gradients of weights, balance
    assert times(split, full=full, inside=slow)["exchanges"] == pytest.approx(4 * sent)
    eighth = times(split, PLAIN._replace(fp8=True), full, inside=slow)["exchanges"]
    assert times(split, full=full, inside=slow)["exchanges"] - eighth == pytest.approx(4 * 3 * 2 * pairs * (16 - (8 + 4)))


def test_static_mode_has_room_for_more_pairs_and_waits_for_no_sizes() -> None:
    split, slow, static = Split(1, 4, 1, 1, 1, 4, 1), Link(0.0, 0.0, 1.0), PLAIN._replace(static=True)
    more = times(split, static, Fullest(1.0, 0.5), inside=slow)["exchanges"]
    assert more == pytest.approx(times(split, full=Fullest(1.0, 0.625), inside=slow)["exchanges"])
    assert times(split, static, Fullest(1.0, 0.9), inside=slow) == pytest.approx(times(split, inside=slow))  # at most every token
    assert times(split, PLAIN._replace(microbatches=2), sync=1.0)["host"] == 2 * 4
    assert times(split, static, sync=1.0)["host"] == 0
    assert times(split, PLAIN._replace(microbatches=2), launch=1.0)["host"] == 2 * 4 * (1 + HOOKS) + 5 * SHARDED
    assert times(split, PLAIN._replace(microbatches=2), routed=1.0)["host"] == 2 * 4
    assert times(ALONE, routed=1.0)["host"] == 0  # nothing travels


def test_the_exchanges_over_tp_cp_and_etp_carry_a_ranks_tokens() -> None:
    slow = Link(0.0, 0.0, 1.0)
    row, balance = 16, 4 * 7 * 64  # bytes; the balance loss over 8 ranks
    over_tp = times(Split(1, 2, 1, 4, 8, 1, 1), inside=slow, node=8)["exchanges"] - balance
    assert over_tp == pytest.approx(4 * 4 * 3 * TOKENS / 8 * row)  # gather and reduce, forward and backward
    over_cp = times(Split(1, 2, 4, 1, 8, 1, 1), inside=slow, node=8)["exchanges"] - balance
    assert over_cp == pytest.approx(4 * 2 * 3 * TOKENS / 8 * 2 * row)  # keys and values there, their gradients home
    over_etp = times(Split(1, 8, 1, 1, 2, 1, 4), inside=slow, node=8)["exchanges"] - balance
    assert over_etp == pytest.approx(4 * 3 * TOKENS / 8 * (4 * row + 2 * (8 + 2 * 4)))  # ids one way, weights there and back
    assert times(Split(1, 2, 1, 4, 8, 1, 1), copy=1.0, sliced=1.0)["exchanges"] == pytest.approx(4 * 2 * (1 + 5 * TOKENS / 8 * row))
    over_pp = times(Split(2, 4, 1, 1, 4, 1, 1), PLAIN._replace(microbatches=4), inside=slow, node=8)["exchanges"]
    assert over_pp == pytest.approx(2 * TOKENS / 4 * row + 4 * 2 * 3 * 64)  # and the balance loss of 2 layers, 4 times


def test_parameters_are_gathered_in_the_computations_numbers_and_gradients_scattered_in_the_stored_ones() -> None:
    split = Split(1, 4, 1, 1, 2, 2, 1)
    parts = shards(MODEL, split)
    assert parts.experts == 4 * 8 * 3 * 8 * 16 / 2
    assert (parts.over, parts.experts_over) == (4, 2)
    slow = Link(0.0, 0.0, 1.0)
    moved = parts.dense * 3 / 4 + parts.experts / 2
    assert times(split, inside=slow)["syncs"] == pytest.approx(moved * (2 + 4))
    moments, whole = 10 * 4 * (parts.dense / 4 + parts.experts / 2), parts.dense + parts.experts
    assert times(split, stream=1.0)["update"] == pytest.approx(moments + 2 * whole)  # gradients are written once
    assert times(split, PLAIN._replace(microbatches=3), stream=1.0)["update"] == pytest.approx(moments + whole * (3 * 2 + 2 * (2 + 8)))
    with_heads = shards(MODEL, Split(1, 2, 1, 2, 4, 1, 1))  # half of each attention, over 2 ranks; the rest over 4
    attention = 4 * (4 * 8 * 8 + 8) / 2
    assert with_heads.dense / with_heads.over == pytest.approx(attention / 2 + (with_heads.dense - attention) / 4)


def test_an_exchange_in_a_node_and_between_nodes_takes_the_slower_link() -> None:
    cluster = NOTHING._replace(inside=Link(1.0, 0.5, 10.0), between=Link(2.0, 1.0, 1.0))
    assert exchange(cluster, 4, 100) == 1 + 3 * (0.5 + 10)
    assert exchange(cluster, 8, 100) == 2 + 4 * (1 + 100)  # 4 others are in another node
    assert exchange(cluster, 2, 100, 4) == 2 + 1 + 100  # ranks 4 apart: one a node
    assert exchange(cluster, 4, 100, 2) == 2 + 2 * (1 + 100)  # two a node
    assert gather(cluster, 8, 100) == 2 + 1 + 4 / 4 * 100  # a node's four links bring four ranks' bytes
    assert gather(cluster, 4, 100) == 1 + 3 * 0.5 + 3 * 10
    assert gather(cluster, 1, 100) == exchange(cluster, 1, 100) == 0
    slower = cluster._replace(gathers=1.5, scatters=2.5)
    assert gather(slower, 4, 100) == 1.5 * gather(cluster, 4, 100)
    assert scatter(slower, 4, 100) == 2.5 * gather(cluster, 4, 100)
    assert exchange(cluster, np.array([1, 4, 8]), 100).tolist() == [0, 32.5, 406]


def test_a_fit_that_would_have_a_negative_number_goes_without_it() -> None:
    link = fit_link([1, 1, 3, 3], [0, 10, 0, 10], [1.0, 2.0, 0.9, 3.9])
    assert min(link) >= 0
    assert link.speed < 100


def test_the_fullest_rank_is_that_of_a_simulation() -> None:
    seed, experts, k = np.random.default_rng(0), 16, 3
    popularity = seed.normal(size=experts)
    chosen = np.argsort(-(popularity + seed.gumbel(size=(20_000, experts))), 1)[:, :k]
    counts = np.bincount(chosen.ravel(), minlength=experts)
    model = MODEL._replace(layers=1, experts=experts, k=k)
    full = fullest(model, check_loads(counts[None], model), ep=4, pp=1)
    places = chosen // 4
    rows = np.bincount(places.ravel(), minlength=4)
    assert full.rows == pytest.approx(rows.max() / rows.mean())
    reached = [(places == rank).any(1).mean() for rank in range(4)]
    assert full.reached == pytest.approx(max(reached), rel=0.05)


def test_uniform_loads_are_as_no_loads() -> None:
    model = MODEL._replace(layers=5)
    shares = check_loads(np.ones((3, 5, 8)), model)
    for ep in (1, 2, 8):
        for pp in (1, 2, 5):
            assert fullest(model, shares, ep, pp) == pytest.approx(fullest(model, None, ep, pp))
    assert hit(8, 2, 4) == pytest.approx(1 - comb(4, 2) / comb(8, 2))


def test_all_ranks_wait_in_every_layer_and_snapshot_and_the_slowest_stage_counts() -> None:
    one, other = [8, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 8]
    even = [1] * 8
    model = MODEL._replace(layers=2)
    trace = check_loads([[one, even], [other, even]], model)
    assert fullest(model, trace, 2, 1).rows == pytest.approx((2 + 1) / 2)  # not the mean of both snapshots, which is even
    assert fullest(model, trace, 2, 2).rows == pytest.approx(2)


@pytest.mark.parametrize(
    "loads", [np.ones((3, 8)), np.ones((2, 4, 7)), np.ones(8), -np.ones((4, 8)), np.zeros((4, 8)), np.full((4, 8), np.nan)]
)
def test_loads_of_another_shape_or_without_slots_are_refused(loads: Any) -> None:
    with pytest.raises(ValueError, match="loads was"):
        check_loads(loads, MODEL)
