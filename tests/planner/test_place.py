"""Placements made of loads: legal, alike everywhere, near the optimum that brute force finds, and changed only where it pays."""

from __future__ import annotations

import itertools
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import moecomm.functional as mf
from benchmarks.placement import generated
from moecomm.planner import Links, imbalance, place
from moecomm.planner.place import HORIZON

Rows = list[list[int]]


def loads_of_ranks(loads: list[int], rows: Rows) -> list[Fraction]:
    copies = {expert: sum(expert in row for row in rows) for expert in range(len(loads))}
    return [sum((Fraction(loads[expert], copies[expert]) for expert in row), Fraction(0)) for row in rows]


def assert_legal(rows: Rows, ranks: int, slots: int, experts: int) -> None:
    assert [len(row) for row in rows] == [slots] * ranks
    assert all(len(set(row)) == slots for row in rows)
    assert set().union(*rows) == set(range(experts))


SIZES = [(1, 3, 3), (2, 2, 3), (3, 3, 3), (4, 2, 8), (4, 5, 7), (5, 7, 7), (16, 3, 32), (16, 4, 32), (12, 1, 5), (64, 5, 256)]


@pytest.mark.parametrize(("ranks", "slots", "experts"), SIZES)
def test_every_rank_has_different_experts_and_every_expert_has_a_rank(ranks: int, slots: int, experts: int) -> None:
    random = np.random.default_rng(ranks * experts)
    current = None
    for skew in (0.0, 1.0, 4.0, 30.0):  # the last: one expert has nearly all of it
        loads = np.rint(1e6 * np.exp(random.normal(0, skew, experts)) / np.exp(4 * skew)).astype(np.int64)
        for rows in (place(loads, ranks, slots), place(loads, ranks, slots, current=current, steps=30)):
            assert_legal(rows, ranks, slots, experts)
            want = loads_of_ranks(loads.tolist(), rows)
            mean = sum(want) / ranks
            assert imbalance(loads, rows) == pytest.approx(float(max(want) / mean) if mean else 1.0, rel=1e-9)
            current = rows
    assert_legal(place([0] * experts, ranks, slots), ranks, slots, experts)


def best(loads: list[int], ranks: int, slots: int) -> Fraction:
    """The least load of the fullest rank, over all placements."""
    sets = list(itertools.combinations(range(len(loads)), slots))
    every = (list(map(list, rows)) for rows in itertools.combinations_with_replacement(sets, ranks))
    return min(max(loads_of_ranks(loads, rows)) for rows in every if len(set().union(*rows)) == len(loads))


@pytest.mark.parametrize(("ranks", "slots", "experts"), [(2, 3, 5), (3, 2, 5), (3, 3, 5), (2, 2, 4)])
def test_the_fullest_rank_is_near_the_least_that_any_placement_has(ranks: int, slots: int, experts: int) -> None:
    random = np.random.default_rng(0)
    excess = []
    for _ in range(6):
        loads = np.rint(1000 * random.lognormal(0, 1.2, experts)).astype(int).tolist()
        found, least = max(loads_of_ranks(loads, place(loads, ranks, slots, steps=40))), best(loads, ranks, slots)
        assert found >= least
        excess.append(float(found / least))
    assert max(excess) < 1.15
    assert np.median(excess) < 1.03


def test_the_loads_of_the_ranks_are_the_rows_that_a_plan_gives_them() -> None:
    experts = torch.multinomial(torch.arange(1.0, 9.0), 4000, True, generator=torch.Generator().manual_seed(0)).view(-1, 1)
    rows = [[0, 7, 3], [7, 1, 2], [4, 5, 6], [6, 7, 5]]
    table = torch.ops.moecomm.placement_table(torch.tensor(rows), 8, torch.device("cpu"))[0]
    places = torch.ops.moecomm.place(experts, table, 8, 1, "")[0]  # all tokens on one rank
    counts = torch.bincount(places.flatten().long(), minlength=12).view(4, 3).sum(1)
    assert imbalance(torch.bincount(experts.flatten(), minlength=8), rows) == pytest.approx(
        float(counts.max() / counts.float().mean()), rel=0.01
    )


@pytest.mark.slow
def test_loads_may_be_of_any_form_and_give_the_same_placement_in_every_process() -> None:
    counts = generated(3, 1)[:, 0]  # [3, P, E]
    forms: list[Any] = [
        counts[0].sum(0),
        torch.tensor(counts[0].sum(0)),
        counts[0].sum(0).tolist(),
        counts[0],
        torch.tensor(counts[0]).float(),
    ]
    first, *others = [place(loads, 16, 3) for loads in forms]
    assert others == [first] * 4
    then = place(counts[1], 16, 3, current=torch.tensor(first))
    code = "from benchmarks.placement import generated as g; from moecomm.planner import place as p; c = g(3, 1)[:, 0]; a = p(c[0], 16, 3)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print([a, p(c[1], 16, 3, current=a)])"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([first, then])


def test_a_router_that_drifts_stays_balanced_while_few_slots_change() -> None:
    counts = generated(40, 1)[:, 0].sum(1)
    for slots, bound in ((3, 1.2), (4, 1.1)):
        rows, ratios, changed = place(counts[0], 16, slots), [], []
        for now, after in itertools.pairwise(counts):
            new = place(now, 16, slots, current=rows, move_cost=0.3 * now.sum() / 16)
            changed.append(np.mean(np.array(new) != np.array(rows)))
            rows = new
            ratios.append(imbalance(after, rows))
        assert np.median(ratios) <= bound
        assert np.mean(changed) <= 0.1


def test_nothing_moves_for_what_chance_does_to_even_loads() -> None:
    random = np.random.default_rng(0)
    for slots in (2, 4):
        rows = place(np.ones(32), 16, slots)
        for _ in range(50):
            assert place(random.multinomial(16 * 8192, [1 / 32] * 32), 16, slots, current=rows) == rows


@pytest.mark.parametrize("draw", ["lognormal", "uniform"])
def test_loads_that_are_new_at_random_each_time_move_next_to_nothing_and_are_no_worse_than_unmoved(draw: str) -> None:
    random = np.random.default_rng(2)
    first = rows = place(np.ones(32), 16, 3)
    loads = [np.rint(1000 * (random.lognormal(0, 1, 32) if draw == "lognormal" else random.random(32))) for _ in range(120)]
    changed, moved, still = [], [], []
    for earlier, now, after in zip(loads, loads[1:], loads[2:], strict=False):
        new = place(now, 16, 3, current=rows, earlier=earlier)
        changed.append(np.mean(np.array(new) != np.array(rows)))
        rows = new
        moved.append(imbalance(after, rows))
        still.append(imbalance(after, first))
    assert np.mean(changed) < 0.02
    assert np.mean(moved) < 1.02 * np.mean(still)


def test_loads_that_last_are_placed_as_without_earlier_ones() -> None:
    random = np.random.default_rng(3)
    for ranks, experts, slots in ((2, 4, 2), (4, 32, 10)):
        loads = np.sort(random.lognormal(0, 1, experts) * 1000)
        rows = place(np.ones(experts), ranks, slots)
        new = place(loads, ranks, slots, current=rows)
        assert new != rows
        assert place(loads, ranks, slots, current=rows, earlier=loads**2) == new  # the same order
        assert place(loads, ranks, slots, current=rows, earlier=loads[::-1]) == rows


def test_moves_are_never_worse_for_the_loads_they_are_made_for() -> None:
    random = np.random.default_rng(1)
    rows = place(np.ones(32), 16, 4)
    for _ in range(60):
        loads = np.rint(1000 * random.lognormal(0, 1, 32)).astype(int)
        new = place(loads, 16, 4, current=rows)
        assert imbalance(loads, new) <= imbalance(loads, rows)
        rows = new


def test_a_move_is_made_if_it_pays_within_the_horizon() -> None:
    loads, current = [600, 600, 20, 20], [[0, 1], [2, 3]]
    gain = 1200 - 620
    moved = place(loads, 2, 2, current=current, move_cost=gain * HORIZON / 2 * 0.99)
    assert sorted(map(sorted, moved)) != [[0, 1], [2, 3]]
    assert imbalance(loads, moved) == 1.0
    assert sum(a != b for new, old in zip(moved, current, strict=True) for a, b in zip(new, old, strict=True)) == 2
    assert place(loads, 2, 2, current=current, move_cost=gain * HORIZON / 2 * 1.01) == current
    assert place(loads, 2, 2, current=current, move_cost=gain * HORIZON, horizon=4 * HORIZON) == moved


def staying(counts: np.ndarray[Any, Any], rows: Rows, node: int) -> float:
    """The rows whose expert is computed on their own node."""
    copies = {expert: sum(expert in row for row in rows) for expert in range(counts.shape[1])}
    return sum(
        counts[source, expert] / copies[expert]
        for rank, row in enumerate(rows)
        for expert in row
        for source in range(len(rows))
        if source // node == rank // node
    )


def test_tokens_stay_inside_their_node_where_links_are_given() -> None:
    random = np.random.default_rng(0)
    gained = []
    for _ in range(4):
        counts = np.rint(1000 * random.lognormal(0, 1, (2, 12)).repeat(3, 0)).astype(int)  # [P, E]: a node's tokens like other experts
        plain, near = place(counts, 6, 3), place(counts, 6, 3, Links(3))
        assert sorted(map(sorted, plain)) == sorted(map(sorted, near))  # the same sets, on other ranks
        most = max(staying(counts, [plain[i] for i in order], 3) for order in itertools.permutations(range(6)))
        assert staying(counts, near, 3) == pytest.approx(most)
        gained.append(most - staying(counts, plain, 3))
        assert place(counts, 6, 3, Links(3), current=plain, move_cost=1e9) == plain
        if gained[-1] > 1:
            near_now = {"links": Links(3), "current": plain, "move_cost": 0.0, "steps": 0}
            assert place(counts, 6, 3, **near_now) == near
            ranked = counts.sum(0).argsort(kind="stable").argsort(kind="stable")
            assert place(counts, 6, 3, **near_now, earlier=ranked + 1) == near
            assert place(counts, 6, 3, **near_now, earlier=12 - ranked) == plain  # the loads do not last: nor does where tokens come from
    assert max(gained) > 100


def test_loads_that_are_new_at_random_each_time_move_nothing_for_the_sake_of_links() -> None:
    random = np.random.default_rng(4)
    rows = place(np.ones(32), 16, 3)
    loads = [np.rint(1000 * random.lognormal(0, 1, (16, 32))) for _ in range(61)]  # [P, E]
    for earlier, now in itertools.pairwise(loads):
        new = place(now, 16, 3, Links(4), current=rows, earlier=earlier)
        assert new == place(now.sum(0), 16, 3, current=rows, earlier=earlier.sum(0))  # as if nobody knew where tokens come from
        assert new == rows


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, float("nan")], 1, 2), ValueError, "loads was between nan and nan; it must be finite and not negative"),
        (([1, -1], 1, 2), ValueError, "loads was between -1.0 and 1.0"),
        (("no", 1, 2), TypeError, "loads was str"),
        (([[[1]]], 1, 1), ValueError, r"loads was of shape \[1, 1, 1\]"),
        (([[1, 1]], 2, 1), ValueError, r"loads was of shape \[1, 2\]; it must be of shape \[E\] or \[P, E\], with P = 2 ranks"),
        (([1, 1], 1, 1), ValueError, "ranks and slots was 1 and 1; it must be such that slots <= E <= ranks"),
        (([1, 1], 1, 3), ValueError, "ranks and slots was 1 and 3"),
        (([1, 1], 1.0, 2), TypeError, "ranks was float"),
        (([1, 1], 2, 2, Links(2)), ValueError, r"loads was of shape \[E\]; it must be of shape \[P, E\] with links"),
        (([[1, 1]] * 3, 3, 2, Links(2)), ValueError, "links.node was 2; it must be a divisor of the 3 ranks"),
        (([1, 1], 2, 1, None, [[0, 1], [1, 0]]), ValueError, r"current was of shape \[2, 2\]"),
        (([1, 1], 2, 1, None, [[0], [2]]), ValueError, "ids in"),
        (([1, 1], 2, 1, None, [[0.5], [1.5]]), ValueError, "current was .*ints"),
        (([1, 1], 2, 1, None, torch.zeros(2, 1, dtype=torch.int64, device="meta")), ValueError, "current was on meta"),
        ((torch.zeros(2, device="meta"), 2, 1), ValueError, "loads was on meta"),
    ],
)
def test_what_is_wrong_is_refused_by_name(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        place(*arguments)
    with pytest.raises(ValueError, match="earlier was of 3 experts; it must be of loads' 2"):
        place([1, 1], 1, 2, earlier=[1, 1, 1])
    for wrong in ({"horizon": 0.0}, {"move_cost": -1.0}, {"steps": -1}):
        with pytest.raises(ValueError, match="horizon, move_cost and steps"):
            place([1, 1], 1, 2, **wrong)  # type: ignore[arg-type]


def test_a_plan_takes_what_place_gives() -> None:
    plan = mf.plan(torch.tensor([[0, 1], [2, 0]]), torch.ones(2, 2), 3, placement=place([2, 1, 1], 1, 3))
    assert plan.offsets.tolist()[-1] == 4
