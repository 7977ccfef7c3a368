"""counting_sort and bounded_sort: a stable order of keys, its inverse, and the end of each key."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.routing.counting_sort import (
    bounded_cpu,
    bounded_fake,
    bounded_sort,
    bounded_triton,
    counting_sort,
    sort_cpu,
    sort_fake,
    sort_triton,
)
from tests.ops.cases import assert_same_layout, bounded_slots, guarded, inverse, routing, sorted_slots, strided


def check(keys: Tensor, bins: int, device: str, padding: tuple[int, ...] = (0, 700)) -> None:
    want = sorted_slots(keys, bins)
    size = want[0].shape[0]
    for got in (sort_cpu(keys, bins, size), guarded(sort_triton, keys.to(device), bins, size)):
        torch.testing.assert_close([tensor.cpu() for tensor in got], list(want), rtol=0, atol=0)
        assert_same_layout(sort_fake(keys, bins, size), got)
    for extra in padding:
        order = torch.cat((want[0], want[0].new_full((extra,), -1)))
        for got in (sort_cpu(keys, bins, size + extra, True), guarded(sort_triton, keys.to(device), bins, size + extra, True)):
            torch.testing.assert_close([tensor.cpu() for tensor in got], [order, *want[1:]], rtol=0, atol=0)
            assert_same_layout(sort_fake(keys, bins, size + extra, True), got)


def check_aligned(keys: Tensor, bins: int, align: int, device: str) -> None:
    """Each key's slots one after the other, from a multiple of ``align`` on."""
    flat, order, offsets = keys.flatten().tolist(), [], []
    for b in range(bins):
        order += [i for i, key in enumerate(flat) if key == b]
        order += [-1] * (-len(order) % align)
        offsets.append(len(order))
    for extra in (0, 300):
        want = torch.tensor(order + [-1] * extra, dtype=torch.int32)
        for got in (
            sort_cpu(keys, bins, len(want), True, align),
            guarded(sort_triton, keys.to(device), bins, len(want), True, align),
        ):
            assert torch.equal(got[0].cpu(), want)
            assert torch.equal(got[1].cpu(), inverse(want, *keys.shape))
            assert got[2].tolist() == offsets
            assert_same_layout(sort_fake(keys, bins, len(want), True, align), got)


@pytest.mark.parametrize("align", [2, pytest.param(16, marks=pytest.mark.exhaustive), 128])
@pytest.mark.parametrize(
    ("tokens", "k", "bins"),
    [(5, 2, 3), pytest.param(300, 1, 65, marks=pytest.mark.slow), pytest.param(100, 8, 17, marks=pytest.mark.slow), (0, 2, 3), (1, 1, 1)],
)
def test_keys_begin_at_multiples(tokens: int, k: int, bins: int, align: int, device: str) -> None:
    check_aligned(routing(tokens, k, bins, seed=tokens), bins, align, device)


@pytest.mark.parametrize("named", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("bins", [2, 255, 256, 70_000])
def test_a_cpu_sorts_many_keys_as_few(bins: int, named: float) -> None:
    generator = torch.Generator().manual_seed(bins)
    keys = torch.randint(bins, (1500, 2), generator=generator, dtype=torch.int32)
    keys[torch.rand(keys.shape, generator=generator) >= named] = -1
    flat = keys.flatten().tolist()
    want = sorted((i for i, key in enumerate(flat) if key >= 0), key=flat.__getitem__)
    ends = Counter(flat)
    order, position, offsets = sort_cpu(keys, bins, len(want))
    assert order.tolist() == want
    assert torch.equal(position, inverse(order, *keys.shape))
    assert offsets.tolist() == list(accumulate(ends[b] for b in range(bins)))


def test_more_rows_than_int32_indices_number_are_refused() -> None:
    for sort in (counting_sort, sort_triton):
        with pytest.raises(ValueError, match="align was 16; it must be less: with padding there are 2147483393 rows, and int32 indices"):
            sort(torch.zeros(3, 1, dtype=torch.int32), 2, 2**31 - 255, True, 16)


def check_bounded(keys: Tensor, bins: int, most: int, device: str) -> None:
    want = bounded_slots(keys, bins, most)
    for got in (bounded_cpu(keys, bins, most), guarded(bounded_triton, keys.to(device), bins, most)):
        torch.testing.assert_close([tensor.cpu() for tensor in got], list(want), rtol=0, atol=0)
        assert_same_layout(bounded_fake(keys, bins, most), got)


SIZES: list[Any] = [(1, 1, 1), (257, 2, 1), (5, 2, 3), (255, 1, 4), (0, 2, 3), (0, 1, 1)]
SIZES += [pytest.param(256, 1, 64, marks=pytest.mark.exhaustive), pytest.param(300, 2, 200, marks=pytest.mark.exhaustive)]
SIZES += [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((257, 1, 65), (100, 8, 17))]
MANY_BINS = (100, 3, 2500)  # several steps a block, and bins that one warp does not add up


@pytest.mark.parametrize(("tokens", "k", "bins"), SIZES)
def test_bounded_sort_agrees_with_a_loop(tokens: int, k: int, bins: int, device: str) -> None:
    """Where each key has room for all of it, for none but the first, and for about half."""
    keys = routing(tokens, k, bins, seed=tokens)
    for most in (tokens * k + 1, 1, max(1, tokens * k // bins // 2)):
        check_bounded(keys, bins, most, device)


@pytest.mark.slow
def test_many_bins_are_sorted_too(device: str) -> None:
    tokens, k, bins = MANY_BINS
    keys = routing(tokens, k, bins, seed=tokens)
    check(keys, bins, device, padding=())
    check_bounded(keys, bins, 1, device)


def test_bounded_sort_has_room_for_nothing(device: str) -> None:
    for tokens in (0, 5, 300):
        check_bounded(routing(tokens, 2, 3, seed=tokens), 3, 0, device)


DTYPES = [torch.int64, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.int32, torch.int16, torch.uint8))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounded_sort_takes_any_integer_dtype_and_any_strides(dtype: torch.dtype, device: str) -> None:
    keys = routing(150, 2, 5, seed=1, dropped=0.0 if dtype == torch.uint8 else 0.3).to(dtype)
    for layout in strided(keys):
        check_bounded(layout, 5, 20, device)


@pytest.mark.parametrize(("tokens", "k", "bins"), SIZES)
def test_sort_agrees_with_a_loop(tokens: int, k: int, bins: int, device: str) -> None:
    check(routing(tokens, k, bins, seed=tokens), bins, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sort_takes_any_integer_dtype_and_any_strides(dtype: torch.dtype, device: str) -> None:
    keys = routing(150, 2, 5, seed=1, dropped=0.0 if dtype == torch.uint8 else 0.3).to(dtype)
    for layout in strided(keys):
        check(layout, 5, device, padding=(3,))


def test_sort_of_nothing_but_dropped_slots(device: str) -> None:
    check(torch.full((40, 2), -1), 3, device)


def test_sort_of_one_key_only_keeps_the_order(device: str) -> None:
    check(torch.full((300, 1), 2), 5, device)


def test_sort_gives_no_view_into_larger_memory(device: str) -> None:
    """Compiled code takes an op's outputs to be aligned as memory that was allocated is."""
    for bins in (1, 3):
        keys = routing(600, 1, bins, seed=bins)
        size = int((keys >= 0).sum())
        for got in (sort_cpu(keys, bins, size), sort_triton(keys.to(device), bins, size)):
            assert [tensor.storage_offset() for tensor in got] == [0, 0, 0]


def test_keys_that_need_more_than_16_bits() -> None:
    keys = torch.tensor([[2**15, 7], [-1, 2**15]])
    order, position, offsets = counting_sort(keys, 2**15 + 1, 3)
    assert order.tolist() == [1, 0, 3]
    assert position.tolist() == [[1, 0], [-1, 2]]
    assert offsets[[0, 6, 7, 2**15 - 1, 2**15]].tolist() == [0, 0, 1, 1, 3]


@pytest.mark.slow
def test_sort_passes_opcheck(device: str) -> None:
    for tokens, k in ((5, 2), (4, 1), (0, 2), (1, 1)):
        keys = routing(tokens, k, 4, seed=tokens).to(device)
        opcheck(counting_sort, (keys, 4, int((keys >= 0).sum())))
        opcheck(counting_sort, (keys, 4, keys.numel() + 1, True))
        opcheck(counting_sort, (keys, 4, keys.numel() + 28, True, 8))
        opcheck(bounded_sort, (keys, 4, 2))
