"""What is measured against each other computes the same, and what the benchmarks count is so: at small sizes, on the CPU."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import cpu_time, experts, figures, floors, kept, layer, links, planner, planner_tables, sweep, timing
from benchmarks.inputs import ALL_TO_ONE, ZIPF, routed, step
from benchmarks.peers import MOECOMM, ON_ONE, ON_RANKS, check
from benchmarks.sweep import Point
from benchmarks.whole import check_whole, with_experts
from moecomm.planner import PRESETS, Split, Way, assess, parameters
from tests.spawn import run_ranks
from tutorials.demo import auto

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


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_peer_is_the_dense_layer_on_ranks(ranks: int) -> None:
    run_ranks(check_here, ranks, timeout=120)


def test_the_checks_see_a_layer_that_is_wrong() -> None:
    def forgets_weights(x, experts, weights, num_experts, compute):  # type: ignore[no-untyped-def]
        return ON_ONE["k_fold"](x, experts, torch.ones_like(weights) + 0 * weights, num_experts, compute)

    with pytest.raises(AssertionError, match="not close"):
        check(forgets_weights, torch.float32, 2)
    with pytest.raises(AssertionError, match="not close"):
        check_whole(with_experts(forgets_weights), torch.float32, "cpu")


def test_a_layer_with_experts_is_the_dense_one() -> None:
    for way in (ON_ONE[MOECOMM], experts.static, ON_ONE["k_fold"]):
        for dtype in DTYPES:
            check_whole(with_experts(way), dtype, "cpu")


# What is counted


def lines_here() -> list[timing.Line]:
    with patch.multiple(layer, TOKENS=16, DIM=8, REPEATS={timing.WARM: 2}):
        return layer.on_ranks(torch.float32, 2, 2) + layer.bytes_and_peak(torch.float32, 2) + layer.threads()


@pytest.mark.slow
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


def cpu_time_here() -> list[timing.Line]:
    with patch.multiple(cpu_time, TOKENS=16, DIM=8, REPEATS=2):
        return cpu_time.here(torch.float32, 2)


@pytest.mark.slow
def test_the_parts_of_a_steps_cpu_time_are_all_of_it() -> None:
    of_ranks = run_ranks(cpu_time_here, 4, timeout=120)
    assert all(lines == of_ranks[0] for lines in of_ranks)
    *parts, whole = of_ranks[0]
    for way, seconds in zip(("k_fold", MOECOMM), whole["amounts"], strict=True):
        own = [line for line in parts if line["way"] == way]
        assert sum(line["ratio"] for line in own) == pytest.approx(1)
        assert {line["amounts"][1] for line in own} == {seconds}
        assert {cpu_time.THREADS, cpu_time.BETWEEN, cpu_time.OTHERS} < {line["case"] for line in own}


def test_the_most_that_is_held_and_what_is_kept_are_counted_in_bytes() -> None:
    x, weight = torch.ones(100, 100, requires_grad=True), torch.ones(100, 100)

    def two_steps() -> Tensor:
        return (linear(x, weight) * 2).exp().sin()  # keeps exp's result for exp and sin: one memory; its other inputs are the caller's

    assert timing.saved(two_steps, (x, weight)) == 100 * 100 * 4
    assert timing.saved(two_steps, ()) == 2 * 100 * 100 * 4  # and the weight
    assert timing.peak(lambda: torch.ones(1000).sin().sin(), "cpu") == 2 * 1000 * 4
    assert timing.held(two_steps, "cpu") == 100 * 100 * 4 + 8  # and the factor


def test_repeats_take_turns_and_a_ratio_is_of_one_repeat() -> None:
    calls = []
    times = timing.interleaved({"a": partial(calls.append, "a"), "b": partial(calls.append, "b")}, "cpu", 3)
    assert calls == ["a", "b"] * 4  # one warms up
    assert [len(each) for each in times.values()] == [3, 3]
    line = timing.compared({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b")
    assert (line["low"], line["ratio"], line["high"], line["milliseconds"]) == (1.5, 2.0, 2.5, [4000.0, 2000.0])


def test_more_repeats_are_made_while_they_are_cheap() -> None:
    times = timing.interleaved({"a": lambda: None}, "cpu", 3, seconds=1.0)
    assert len(times["a"]) == timing.MOST_REPEATS


# Routing


def test_skewed_routing_is_what_its_name_says() -> None:
    counts = [
        torch.bincount(routed(4000, 1, 16, 2, torch.float32, routing=routing)[1].flatten(), minlength=16) for routing in (ZIPF, ALL_TO_ONE)
    ]
    assert (counts[1] == torch.tensor([4000, 4000] + [0] * 14)).all()
    assert (counts[0].diff() < 60).all()  # of 8000: ever fewer, up to chance
    first = torch.bincount(routed(20000, 1, 16, 1, torch.float32, routing=ZIPF)[1].flatten(), minlength=16) / 20000
    share = 1 / torch.arange(1, 17)
    torch.testing.assert_close(first, share / share.sum(), rtol=0, atol=0.015)


# Small runs of everything that a CPU can run


@pytest.mark.slow
def test_each_op_is_measured_beside_a_copy() -> None:
    with patch.object(floors, "REPEATS", 2):
        for dtype in DTYPES:
            lines = floors.ops("cpu", dtype, floors.Sizes(64, 32, 8, 2))
            assert {"gather", "weighted_sum", "sum", "weighted_sum_backward", "plan"} <= {line["case"] for line in lines}


@pytest.mark.slow
def test_a_layer_with_experts_is_measured_beside_matmuls() -> None:
    with patch.object(experts, "REPEATS", 2):
        lines = experts.layer_with_experts("cpu", experts.Sizes(64, 32, 16, 4, 2))
    assert {(MOECOMM, experts.FLOOR), (MOECOMM, experts.DENSE), ("k_fold", MOECOMM)} <= {(line["case"], line["to"]) for line in lines}


@pytest.mark.slow
def test_a_lean_layer_keeps_what_its_name_says_beside_others() -> None:
    with patch.object(kept, "COMPILED", {name: way for name, way in kept.COMPILED.items() if name.endswith("keep_less")}):
        ratios = {line["case"]: line["ratio"] for line in kept.layer_keeps("cpu", kept.Sizes(64, 64, 256, 4, 2))}
    assert set(kept.EAGER) < set(ratios)
    assert all(1 < ratios[name] < 1.05 for name in ratios if name.endswith(("save_matmuls", "keep_less")))
    assert all(ratio > 1.5 for name, ratio in ratios.items() if not name.endswith(("save_matmuls", "keep_less")))


@pytest.mark.slow
def test_one_process_and_tiny_sizes_are_measured() -> None:
    with patch.multiple(layer, SECONDS=0.0, TINY_REPEATS=2):
        lines = layer.on_one("cpu", torch.float32, layer.Sizes(64, 16, 8, 2), 2) + layer.tiny("cpu")
    assert {line["case"] for line in lines if line["what"] == "1 process"} == set(ON_ONE)


def test_the_sweep_reaches_what_it_says() -> None:
    points = sweep.points("cpu")
    assert len(points) == len(set(points)) == 23
    reached = {axis: {getattr(point, axis) for point in points} for axis in Point._fields}
    assert (min(reached["tokens"]), max(reached["tokens"])) == (256, 65536)
    assert (min(reached["dim"]), max(reached["dim"])) == (512, 7168)
    assert (min(reached["experts"]), max(reached["experts"])) == (8, 512)
    assert (min(reached["k"]), max(reached["k"])) == (1, 16)
    assert reached["ranks"] == {1, 2, 4, 8}
    assert len(reached["routing"]) == 3
    assert {point.ranks for point in sweep.points("cuda")} == {1}


def point_here(point: Point) -> list[timing.Line]:
    with patch.multiple(sweep, REPEATS=2, SECONDS=0.0):
        return sweep.here("cpu", point, amounts=True)


@pytest.mark.slow
def test_a_point_of_the_sweep_is_measured() -> None:
    point = Point(64, 16, 8, 2, 1)
    alone = point_here(point)
    assert {line["case"] for line in alone} == {*ON_ONE, "floor"} - {"one_hot"}
    for routing in (ZIPF, ALL_TO_ONE):
        together = run_ranks(point_here, 2, point._replace(ranks=2, routing=routing), timeout=120)
        assert together[0] == together[1]
        assert {line["case"] for line in together[0]} == {*ON_RANKS, "floor"}
        assert all(line["peak"] > 0 and line["saved"] > 0 for line in together[0] if line["case"] != "floor")


def exchanges_here() -> list[links.Measured]:
    with patch.multiple(links, REPEATS=2, BYTES=(256, 1024), LAYER=links.LAYER._replace(tokens=16, dim=8)):
        return links.exchanges_here()


@pytest.mark.slow
def test_exchanges_are_measured_beside_what_the_model_expects_of_them() -> None:
    measured = run_ranks(exchanges_here, 2, timeout=120)[0]
    assert [each.bytes_to_each for each in measured[:2]] == [256, 1024]
    by_slot = [each.bytes_to_each for each in measured if each.what.startswith("a row a slot")]
    assert by_slot == [16 * k * 32 / 2 for k in links.TOP_K]


def steps_here(split: Split) -> planner.Measured:
    with patch.multiple(planner, SHAPE=planner.SHAPE._replace(dim=32, hidden=32, context=32), STEPS=2):
        return planner.steps_here(split)


@pytest.mark.slow
def test_a_split_is_measured_beside_what_the_planner_predicts_of_it() -> None:
    split = Split(pp=1, dp=2, cp=1, tp=1, edp=1, ep=2, etp=1)
    measured = run_ranks(steps_here, 2, split, timeout=120)
    shape = planner.SHAPE._replace(dim=32, hidden=32, context=32)
    model = auto.model_of(shape, planner.BATCH, torch.float32)
    assert all(each.held == pytest.approx(parameters(model).total(model) / 2 * 12, rel=1e-3) for each in measured)  # and Adam's steps
    seconds, wall, size = planner.together(measured, layer=2.0)
    ranks = [[step.own / step.yardstick for step in each.steps] for each in measured]
    assert seconds == pytest.approx(2.0 * sum(map(sum, ranks)) / 4)  # the median of two
    assert wall > 0
    [row] = assess(model, PRESETS["h100"], [(split, Way(1, False, False, 0))])
    assert planner.compared(2, row, (seconds, wall, size), PRESETS["h100"])["bytes"] == [row.memory.total(), size]
    assert row.memory.total() == pytest.approx(size, rel=0.15)


def test_numbers_of_a_slow_while_are_those_of_the_usual_machine() -> None:
    cluster = PRESETS["h100"]._replace(launch=6.0, gathers=2.0)
    usual = planner.at_speed(cluster, slower=1.5)
    assert (usual.matmul, usual.launch, usual.inside.speed) == (1.5 * cluster.matmul, 4.0, 1.5 * cluster.inside.speed)
    assert (usual.gathers, usual.between) == (2.0, cluster.between)  # a ratio stays, and so does a link that was not measured


def test_errors_are_relative_to_what_was_measured() -> None:
    lines = [{"milliseconds": pair, "ranks": 2} for pair in ([110.0, 100.0], [190.0, 200.0], [90.0, 120.0])]
    assert planner_tables.errors(lines) == pytest.approx([0.1, 0.05, 0.25])
    assert planner_tables.r2(lines) == pytest.approx(1 - (100 + 100 + 900) / (40**2 + 60**2 + 20**2))
    assert planner_tables.choice(lines) == pytest.approx(1.2)  # the third is predicted to be fastest, and the first is


def test_a_step_gives_the_gradients_of_tokens_and_weights() -> None:
    x, chosen, weights, grad = routed(6, 4, 4, 2, torch.float32)
    to_x, to_weights = step(ON_ONE[MOECOMM], x, chosen, weights, 4, grad)
    torch.testing.assert_close(to_x, grad * weights.sum(1, keepdim=True))
    torch.testing.assert_close(to_weights, (grad * x).sum(1, keepdim=True).expand(6, 2))


def test_the_figures_in_the_document_are_those_of_the_committed_runs() -> None:
    assert figures.figures() in figures.DOCUMENT.read_text()
    for picture in ("layer_cpu.png", "sweep_cpu.png", "links_cpu.png", "planner_cpu.png"):
        assert (timing.RESULTS / picture).stat().st_size > 10_000


@pytest.mark.slow
def test_results_of_a_gpu_are_written_like_those_of_a_cpu() -> None:
    """What a GPU alone measures is put beside lines of the CPU, as if they were its own."""
    about = {"on": "cuda", "device": "a GPU", "python": "3", "packages": {"torch": "2"}, "seconds": 1.0, "load before": 0.0}

    def written(name: str, lines: list[timing.Line]) -> str:
        return figures.SECTIONS[name][1]({"about": about, "lines": [line | {"memory": timing.WARM} for line in lines]})

    with patch.object(floors, "REPEATS", 2), patch.object(experts, "REPEATS", 2), patch.object(layer, "SECONDS", 0.0):
        ops = floors.ops("cpu", torch.bfloat16, floors.Sizes(64, 32, 8, 2))
        whole = experts.layer_with_experts("cpu", experts.Sizes(64, 32, 16, 4, 2))
        one = layer.on_one("cpu", torch.bfloat16, layer.Sizes(64, 16, 8, 2), 2, ("one_hot",))
    captured = next(line for line in ops if line["case"] == "plan") | {"case": floors.GRAPH}
    assert "<= 60 us: " in written("floors", [*ops, captured])
    assert ">= 85%: " in written("floors", [*ops, captured])
    assert written("experts", whole).count("<= 1.15: ") == 3
    assert "`moecomm` / floor" in written("layer", one)
    amounts = {"peak": 2**20, "saved": 2**20, "milliseconds": [1.0, 1.0], "low": 1.0, "high": 1.0, "dtype": "bfloat16"}
    points = [
        {"case": case, "to": MOECOMM, "ratio": ratio, **amounts, **point._asdict()}
        for point in sweep.points("cuda")
        for case, ratio in ((MOECOMM, 1.0), ("k_fold", 0.9 if point.k == 2 else 1.1), ("floor", 0.5))
    ]
    text = written("sweep", points)
    assert f"warm: 1 of {len(sweep.points('cuda'))} points: k = 2." in text
    assert text.count("**missed**") == 1
