"""The algorithms of one process on random input: each agrees with its definition by a loop, whatever the sizes, dtypes and layouts.

So do their Triton kernels, whose every access is checked meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from moecomm.ops.routing.choose_experts import choose
from moecomm.ops.routing.count_pairs import count
from moecomm.ops.routing.counting_sort import bounded_sort, counting_sort
from moecomm.ops.routing.drop_overflow import fit
from moecomm.ops.routing.place_slots import place, placement_table
from moecomm.ops.rows.gather import gather
from moecomm.ops.rows.rank_sum import rank_sum
from moecomm.ops.rows.weighted_sum import weighted_sum
from moecomm.ops.rows.weighted_sum_backward import weighted_sum_backward
from tests.fuzz.cases import INTEGERS, fuzzed, layout, layouts, placements, routings
from tests.ops.bounds import Kernels, by_kernels
from tests.ops.cases import assert_within_rounding, bounded_slots, inverse, seeded, sorted_slots
from tests.ops.routing import test_choose_experts, test_count_pairs, test_drop_overflow, test_place_slots
from tests.ops.rows import test_gather, test_weighted_sum
from tests.ops.rows.test_weighted_sum import FLOAT32_SUM, SPLIT_WEIGHT

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")

tokens_of = st.one_of(st.integers(0, 12), st.integers(0, 140))
slots_of = st.integers(1, 8)


def assert_alike(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(list(got), list(want), rtol=0, atol=0)


def as_ids(draw: st.DrawFn, experts: Tensor, most: int) -> Tensor:
    """The ids in some integer dtype and layout; those that the dtype lacks are dropped, or, where there is no -1, expert 0."""
    dtype = draw(st.sampled_from(INTEGERS))
    limit = min(most, torch.iinfo(dtype).max + 1)
    ids = experts.masked_fill(experts >= limit, -1)
    return layout((ids.clamp(min=0) if dtype == torch.uint8 else ids).to(dtype), draw(layouts))


@st.composite
def counted(draw: st.DrawFn) -> tuple[Tensor, int, int, Tensor | None]:
    """(experts, E, P, placed): ids out of range among them where nothing is placed."""
    ranks, tokens, k = draw(st.sampled_from((1, 2, 3, 4, 8))), draw(tokens_of), draw(slots_of)
    if draw(st.booleans()):
        num_experts = draw(st.integers(1, 40))
        experts = draw(routings(tokens, k, num_experts))
        placed = torch.where(experts < 0, -1, (experts * 5 + torch.arange(tokens).unsqueeze(1)) % ranks).to(torch.int32)
        return layout(experts, draw(layouts)), num_experts, ranks, layout(placed, draw(layouts))
    num_experts = ranks * draw(st.integers(1, 20))
    experts = draw(routings(tokens, k, num_experts))
    if experts.numel() and draw(st.booleans()):
        experts.view(-1)[draw(st.integers(0, experts.numel() - 1))] = draw(st.integers(-(2**63), 2**63 - 1))
        return layout(experts, draw(layouts)), num_experts, ranks, None
    return as_ids(draw, experts, num_experts), num_experts, ranks, None


def check_count(case: tuple[Tensor, int, int, Tensor | None]) -> None:
    experts, num_experts, ranks, placed = case
    assert_alike(
        count(experts, num_experts, ranks, test_count_pairs.SIGNATURE, placed),
        test_count_pairs.expected(experts, num_experts, ranks, placed),
    )


@st.composite
def keyed(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(keys, bins)."""
    tokens, k, bins = draw(tokens_of), draw(slots_of), draw(st.one_of(st.integers(1, 9), st.integers(1, 300)))
    return as_ids(draw, draw(routings(tokens, k, bins)), bins), bins


def check_counting_sort(case: tuple[Tensor, int], extra: int) -> None:
    keys, bins = case
    order, position, offsets = sorted_slots(keys, bins)
    assert_alike(counting_sort(keys, bins, order.shape[0]), (order, position, offsets))
    padded = torch.cat((order, order.new_full((extra,), -1)))
    assert_alike(counting_sort(keys, bins, padded.shape[0], True), (padded, position, offsets))


def check_aligned_sort(case: tuple[Tensor, int], align: int, extra: int) -> None:
    keys, bins = case
    order: list[int] = []
    offsets = []
    for b in range(bins):
        order += (keys.flatten().long() == b).nonzero().flatten().tolist()
        order += [-1] * (-len(order) % align)
        offsets.append(len(order))
    padded, ends = (torch.tensor(each, dtype=torch.int32) for each in (order + [-1] * extra, offsets))
    assert_alike(counting_sort(keys, bins, len(padded), True, align), (padded, inverse(padded, *keys.shape), ends))


def check_bounded_sort(case: tuple[Tensor, int], most: int) -> None:
    keys, bins = case
    assert_alike(bounded_sort(keys, bins, most), bounded_slots(keys, bins, most))


@st.composite
def fitted(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, int]:
    """(experts, places, P, L, the rows of a pair of ranks)."""
    ranks, local, tokens, k = draw(st.sampled_from((1, 2, 3, 4))), draw(st.integers(1, 5)), draw(tokens_of), draw(slots_of)
    experts = draw(routings(tokens, k, ranks * local))
    most = draw(st.integers(1, tokens + 2))
    if draw(st.booleans()):
        ids = as_ids(draw, experts, ranks * local)
        return ids, ids, ranks, local, most
    places = torch.where(experts < 0, -1, (experts * 7 + torch.arange(tokens).unsqueeze(1)) % (ranks * local)).to(torch.int32)
    return layout(experts, draw(layouts)), layout(places, draw(layouts)), ranks, local, most


def check_fit(case: tuple[Tensor, Tensor, int, int, int]) -> None:
    experts, places, ranks, local, most = case
    wide = places.to(torch.int64)
    keys, _ = count(experts, ranks * local, ranks, [], torch.where(wide < 0, -1, wide // local).to(torch.int32))
    _, position = bounded_sort(keys, ranks, most)
    assert_alike(fit(experts, places, position, local), test_drop_overflow.expected(experts, places, ranks, local, most))


@st.composite
def placed_on(draw: st.DrawFn) -> tuple[Tensor, list[list[int]], int]:
    """(experts, placement, E), with ids out of range among them."""
    num_experts = draw(st.integers(1, 12))
    experts = draw(routings(draw(tokens_of), draw(slots_of), num_experts))
    if experts.numel() and draw(st.booleans()):
        experts.view(-1)[draw(st.integers(0, experts.numel() - 1))] = draw(st.integers(-(2**63), 2**63 - 1))
        return layout(experts, draw(layouts)), draw(placements(num_experts, 1)), num_experts
    return as_ids(draw, experts, num_experts), draw(placements(num_experts, 1)), num_experts


def check_place(case: tuple[Tensor, list[list[int]], int]) -> None:
    experts, placement, num_experts = case
    table, _ = placement_table(torch.tensor(placement), num_experts, CPU)
    assert_alike(place(experts, table, num_experts, 1, ""), test_place_slots.expected(experts, placement, 0))


class Sums(tuple[Tensor, Tensor, Tensor, Tensor, Tensor]):
    """(rows [N, D], weights [T, K], order, position, grad [T, D])."""


@st.composite
def summed(draw: st.DrawFn) -> Sums:
    tokens, k, d = draw(st.integers(0, 24)), draw(slots_of), draw(st.one_of(st.integers(0, 9), st.integers(0, 70)))
    experts = draw(routings(tokens, k, 5))
    order, _, _ = sorted_slots(experts, 5)
    extra = draw(st.integers(0, 6))
    middle = draw(st.integers(0, order.shape[0]))
    order = torch.cat((order[:middle], order.new_full((extra,), -1), order[middle:]))
    generator = seeded(draw(st.integers(0, 2**31)))
    dtype, weight_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    if torch.float64 in (dtype, weight_dtype):
        weight_dtype = dtype
    rows, grad = (torch.randn(n, d, generator=generator).to(dtype) for n in (order.shape[0], tokens))
    weights = torch.rand(tokens, k, generator=generator).to(weight_dtype)
    return Sums(
        (layout(rows, draw(layouts)), layout(weights, draw(layouts)), order, inverse(order, tokens, k), layout(grad, draw(layouts)))
    )


def assert_rounded(got: Tensor, want: Tensor, terms: Tensor, error: float) -> None:
    assert_within_rounding(got, want, terms, error, interpreted=isinstance(_get_current_dispatch_mode(), Kernels))


def rounding(dtype: torch.dtype, terms: int) -> float:
    """What adding up may be off by, of the sum of the terms' sizes."""
    return terms * (2.0**-52 if dtype == torch.float64 else FLOAT32_SUM) + SPLIT_WEIGHT.get(dtype, 0.0)


def check_weighted_sum(case: Sums, weighted: bool) -> None:
    rows, weights, order, position, _ = case
    factors = weights if weighted else None
    want, sizes = test_weighted_sum.expected_sum(rows, factors, position)
    assert_rounded(weighted_sum(rows, factors, order, position), want, sizes, rounding(rows.dtype, position.shape[1] + 1))


def check_weighted_sum_backward(case: Sums) -> None:
    rows, weights, order, position, grad = case
    want_rows, want_weights, sizes = test_weighted_sum.expected_gradients(grad, rows, weights, order)
    grad_rows, grad_weights = weighted_sum_backward(grad, rows, weights, order, position)
    assert_rounded(grad_rows, want_rows, want_rows.abs(), rounding(rows.dtype, 1))
    assert_rounded(grad_weights, want_weights, sizes, rounding(rows.dtype, rows.shape[1] + 1))


@st.composite
def gathered(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """(x [T, D], order, position)."""
    rows, _, order, position, _ = draw(summed())
    dtype = draw(st.sampled_from((*test_gather.ALL_DTYPES, *test_gather.FLOAT8, *FLOATS)))
    x = torch.randint(0, 100, (position.shape[0], rows.shape[1]), generator=seeded(draw(st.integers(0, 2**31))))
    x = x.to(torch.float32 if dtype in test_gather.FLOAT8 else dtype).to(dtype)
    return x if dtype.itemsize < 2 else layout(x, draw(layouts)), order, position


def check_gather(case: tuple[Tensor, Tensor, Tensor]) -> None:
    x, order, position = case
    want = test_gather.expected(x, order, position.shape[1])
    assert torch.equal(gather(x, order, position).view(torch.uint8), want.view(torch.uint8))


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(scores [T, E], K): random, of few values, of special values."""
    tokens, num_experts = draw(st.integers(0, 12)), draw(st.one_of(st.integers(1, 9), st.integers(1, 140)))
    generator, dtype = seeded(draw(st.integers(0, 2**31))), draw(st.sampled_from(FLOATS))
    kind = draw(st.integers(0, 2))
    scores = torch.randn(tokens, num_experts, generator=generator)
    if kind == 1:
        scores = scores.round()
    elif kind == 2:
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])
        scores = special[torch.randint(0, 6, scores.shape, generator=generator)]
    return layout(scores.to(dtype), draw(layouts)), draw(st.integers(1, num_experts))


def check_choose(case: tuple[Tensor, int]) -> None:
    scores, k = case
    assert torch.equal(choose(scores, k), test_choose_experts.expected(scores, k))


@st.composite
def parts_of_ranks(draw: st.DrawFn) -> tuple[Tensor, int, bool]:
    """(parts [P, n], divisor, before)."""
    ranks, n, generator = draw(st.integers(1, 9)), draw(st.integers(0, 60)), seeded(draw(st.integers(0, 2**31)))
    parts = torch.randn(ranks, n, generator=generator).to(draw(st.sampled_from(FLOATS)))
    return layout(parts, draw(layouts)), draw(st.integers(1, 9)), draw(st.booleans())


def check_rank_sum(case: tuple[Tensor, int, bool]) -> None:
    parts, divisor, before = case
    want, terms = parts.double().sum(0) / divisor, parts.double().abs().sum(0) / divisor
    error = rounding(torch.float64 if parts.dtype == torch.float64 else torch.float32, parts.shape[0] + 1)
    assert_rounded(rank_sum(parts, divisor, before), want, terms, error)


CHECKS: dict[str, tuple[Callable[..., None], tuple[st.SearchStrategy[Any], ...]]] = {
    "count": (check_count, (counted(),)),
    "counting_sort": (check_counting_sort, (keyed(), st.integers(0, 300))),
    "aligned_sort": (check_aligned_sort, (keyed(), st.integers(1, 40), st.integers(0, 60))),
    "bounded_sort": (check_bounded_sort, (keyed(), st.integers(1, 60))),
    "fit": (check_fit, (fitted(),)),
    "place": (check_place, (placed_on(),)),
    "weighted_sum": (check_weighted_sum, (summed(), st.booleans())),
    "weighted_sum_backward": (check_weighted_sum_backward, (summed(),)),
    "gather": (check_gather, (gathered(),)),
    "choose": (check_choose, (scored(),)),
    "rank_sum": (check_rank_sum, (parts_of_ranks(),)),
}


@pytest.mark.parametrize("name", CHECKS)
@fuzzed(60, 10_000)
@given(data=st.data())
def test_an_op_agrees_with_its_definition(name: str, data: st.DataObject) -> None:
    check, strategies = CHECKS[name]
    check(*map(data.draw, strategies))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is off")
@pytest.mark.parametrize("name", CHECKS)
@fuzzed(5, 500)
@given(data=st.data())
def test_its_kernels_do_so_too_and_keep_within_their_tensors(name: str, data: st.DataObject) -> None:
    check, strategies = CHECKS[name]
    by_kernels(check, *map(data.draw, strategies))
