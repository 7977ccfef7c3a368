"""explain: what it says of a plan is what the experts' ids say, counted one by one; its tables and its picture show the same."""

from __future__ import annotations

import re
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from moecomm.errors import MoECommError
from moecomm.inspect.explain import Explanation
from moecomm.ops.rows.wire_formats import WIRES
from tests.layer.test_static import fitting
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

D = 6


class Case(NamedTuple):
    tokens: tuple[int, ...]  # of each rank
    k: int
    num_experts: int
    placed: bool = False  # expert e on rank e % P, and not on rank e // L
    max_rows: int | None = None
    all_to: int | None = None  # the one expert that is chosen
    x: bool = False  # whether its bytes are asked for


CASES = {
    1: [Case((7,), 2, 4), Case((0,), 2, 4, x=True), Case((5,), 1, 4, placed=True), Case((6,), 2, 4, max_rows=3, x=True)],
    2: [
        Case((5, 9), 2, 8, x=True),
        Case((0, 9), 1, 4),
        Case((0, 0), 2, 4, x=True),
        Case((5, 9), 3, 8, placed=True),
        Case((5, 9), 8, 8, all_to=7),
        Case((5, 9), 2, 8, max_rows=9, x=True),
        Case((5, 9), 4, 4, max_rows=2),
    ],
    4: [Case((5, 0, 11, 1), 4, 8, x=True), Case((5, 0, 11, 1), 2, 8, placed=True), Case((3, 2, 0, 6), 2, 8, max_rows=2, x=True)],
}


def experts_of(case: Case) -> list[Tensor]:
    """[T, K] of each rank, some dropped."""
    seed = torch.Generator().manual_seed(sum(case.tokens) + case.k)
    ids = [torch.randint(-1, case.num_experts, (tokens, case.k), generator=seed) for tokens in case.tokens]
    return ids if case.all_to is None else [torch.full_like(part, case.all_to) for part in ids]


def placement_of(case: Case) -> list[list[int]] | None:
    ranks = len(case.tokens)
    return [list(range(rank, case.num_experts, ranks)) for rank in range(ranks)] if case.placed else None


def expected(case: Case) -> Explanation:
    """By loops over the ids."""
    ranks, size = len(case.tokens), case.num_experts // len(case.tokens)
    pairs, slots, rows = ([[0] * wide for _ in range(ranks)] for wide in (ranks, ranks, size))
    dropped = []
    for p, ids in enumerate(experts_of(case)):
        served = ids if case.max_rows is None else fitting(ids, case.num_experts, ranks, case.max_rows)
        dropped.append(int((served != ids).sum()))
        for chosen in served.tolist():
            there = [(e % ranks, e // ranks) if case.placed else divmod(e, size) for e in chosen if e >= 0]
            for q, e in there:
                slots[p][q] += 1
                rows[q][e] += 1
            for q in {q for q, _ in there}:
                pairs[p][q] += 1
    on_rank = [sum(row) for row in rows]
    imbalance = max(on_rank) / (sum(on_rank) / ranks) if sum(on_rank) else 1.0
    sent = [[(case.max_rows or pairs[p][q]) * D * 4 if p != q else 0 for q in range(ranks)] for p in range(ranks)]
    return Explanation(
        list(case.tokens), pairs, slots, rows, imbalance, None if case.max_rows is None else dropped, sent if case.x else None
    )


def explained_here(case: Case) -> tuple[Explanation, list[list[int]]]:
    """What explain says, and the bytes that dispatch sent."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    experts = experts_of(case)[rank]
    x = torch.zeros(experts.shape[0], D)
    plan = mf.plan(experts, torch.ones(experts.shape), case.num_experts, placement=placement_of(case), max_rows=case.max_rows)
    with Traffic() as looked:
        explanation = mf.explain(plan, x if case.x else None)
    assert len(looked.collectives) == (len(case.tokens) > 1)
    with Traffic() as traffic:
        mf.dispatch({"x": x[:, :2], "more": x[:, 2:]}, plan)
    assert mf.explain(plan, [x[:, :2], x[:, 2:]]).bytes == mf.explain(plan, x).bytes
    return explanation, traffic.bytes


def all_explained_here(cases: list[Case]) -> list[tuple[Explanation, list[list[int]]]]:
    return [explained_here(case) for case in cases]


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_every_rank_is_told_what_the_experts_ids_say(ranks: int) -> None:
    of_rank = run_ranks(all_explained_here, ranks, CASES[ranks])
    for case, *parts in zip(CASES[ranks], *of_rank, strict=True):
        want = expected(case)
        assert all(part[0] == want for part in parts), case
        if not case.x or ranks == 1:
            continue
        for rank, (_, bytes_sent) in enumerate(parts):
            off = [[size for q, size in enumerate(of_tensor) if q != rank] for of_tensor in bytes_sent]
            assert [sum(sizes) for sizes in zip(*off, strict=True)] == [size for q, size in enumerate(want.bytes[rank]) if q != rank]


def wired_here(case: Case) -> None:
    """The bytes that explain says of a wire are those that dispatch sends by it, and combine back."""
    rank = dist.get_rank()
    experts = experts_of(case)[rank]
    plan = mf.plan(experts, torch.ones(experts.shape), case.num_experts, max_rows=case.max_rows)
    x = {"x": torch.ones(experts.shape[0], 2, 100), "y": torch.ones(experts.shape[0], 7, dtype=torch.bfloat16)}
    for wire in WIRES:
        said = mf.explain(plan, x, wire=wire).bytes
        assert said is not None
        with Traffic() as there:
            rows = mf.dispatch(x, plan, wire=wire)
        with Traffic() as back:
            mf.combine(rows, plan, wire=wire)
        for traffic, of_said in ((there, said[rank]), (back, [row[rank] for row in said])):
            sent = [sum(sizes) for sizes in zip(*traffic.bytes, strict=True)]
            assert [size for q, size in enumerate(sent) if q != rank] == [size for q, size in enumerate(of_said) if q != rank]


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_the_bytes_of_a_wire_are_those_that_are_sent(ranks: int) -> None:
    for case in CASES[ranks]:
        if case.x:
            run_ranks(wired_here, ranks, case)


def test_no_process_group_is_needed() -> None:
    assert not dist.is_initialized()
    for case in CASES[1]:
        assert explained_here(case)[0] == expected(case)


def differing_here() -> str:
    plan = mf.plan(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 2)
    with pytest.raises(MoECommError) as raised:
        mf.explain(plan, torch.zeros(2, 3) if dist.get_rank() else None)
    assert mf.explain(plan).pairs == [[2, 0], [2, 0]]  # the group still works
    return str(raised.value)


def test_ranks_that_ask_for_different_bytes_get_the_same_error() -> None:
    message = "x was not given on rank 0, of 12 bytes a token on rank 1 of the group; it must be the same on every rank"
    assert run_ranks(differing_here, 2) == [message] * 2


def test_what_is_no_plan_or_not_of_its_tokens_is_refused() -> None:
    plan = mf.plan(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 2)
    with pytest.raises(TypeError, match="plan was NoneType; it must be a Plan, as moecomm.functional.plan gives it"):
        mf.explain(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x was of shape \[3, 4\]; it must be of shape \[2, ...\], the plan's T = 2"):
        mf.explain(plan, torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"x was int; it must be a tensor \[T, ...\], or a pytree of them"):
        mf.explain(plan, 4)
    with pytest.raises(ValueError, match="wire was 'fp8'; it must be None, 'float8_e4m3' or 'mxfp8'"):
        mf.explain(plan, torch.zeros(2, 4), wire="fp8")


STATIC = expected(Case((3, 2, 0, 6), 2, 8, max_rows=2, x=True))


def test_the_tables_show_every_number_in_its_place() -> None:
    sections = [section.splitlines() for section in str(STATIC).split("\n\n")]
    assert [section[0].split(":")[0] for section in sections] == [
        "pairs (slots) that each rank sends",
        "rows of each rank's local experts",
        f"imbalance {STATIC.imbalance:.2f}",
        "bytes that each rank sends",
    ]
    numbers = [[[int(n) for n in re.findall(r"\d+", line)] for line in section[2:]] for section in sections]
    for p in range(4):
        both = [n for pair in zip(STATIC.pairs[p], STATIC.slots[p], strict=True) for n in pair]
        assert numbers[0][p] == [p, *both, STATIC.tokens[p]]
        assert numbers[1][p] == [p, *STATIC.rows[p], sum(STATIC.rows[p])]
        assert numbers[3][p] == [p, *STATIC.bytes[p]]
    assert sections[2][1] == "dropped slots: " + ", ".join(f"{slots} of rank {p}" for p, slots in enumerate(STATIC.dropped))
    assert len({len(line) for line in sections[0][1:]}) == 1  # columns end where their titles do


MANY = Explanation([1] * 40, [[1] * 40] * 40, [[1] * 40] * 40, [[1]] * 40, 1.0, None, None)


@pytest.mark.parametrize("of", [STATIC, expected(Case((0,), 2, 4)), MANY], ids=["static", "no tokens", "40 ranks"])
def test_the_picture_shows_the_pairs_and_the_rows(of: Explanation, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    figure = of.plot()
    left, right = figure.axes[:2]
    assert left.images[0].get_array().tolist() == of.pairs
    assert right.images[0].get_array().tolist() == of.rows
    shown = [text.get_text() for text in left.texts]
    assert shown == ([str(n) for row in of.pairs for n in row] if len(of.pairs) < 40 else [])
    figure.savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5_000


def test_without_matplotlib_the_picture_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plot needs matplotlib, which moecomm does not install: pip install matplotlib"):
        STATIC.plot()
