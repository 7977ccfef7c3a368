"""sort_alone and sort_counted: the order of one rank's slots; in static mode how many do not fit, else the message to the rank itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.base.signature import NOT_FINITE, PAIRS, signature
from moecomm.ops.routing.count_pairs import count
from moecomm.ops.routing.sort_alone import (
    alone_cpu,
    alone_fake,
    alone_triton,
    counted_cpu,
    counted_fake,
    counted_triton,
    sort_alone,
    sort_counted,
)  # fmt: skip
from tests.ops.cases import assert_same_layout, guarded, inverse, routing, strided


def expected(experts: Tensor, places: Tensor, bins: int, most: int, size: int, align: int) -> tuple[Tensor, Tensor, Tensor, int]:
    keys, dropped, tokens = [], 0, 0
    for ids, row in zip(experts.tolist(), places.tolist(), strict=True):
        room = tokens < most
        tokens += any(0 <= place < bins for place in row)
        for name, place in zip(ids, row, strict=True):
            keys.append(place if room and 0 <= place < bins else -1)
            dropped += name != -1 and keys[-1] < 0
    order, offsets = [], []
    for b in range(bins):
        order += [i for i, key in enumerate(keys) if key == b]
        order += [-1] * (-len(order) % align)
        offsets.append(len(order))
    made = torch.tensor(order + [-1] * (size - len(order)), dtype=torch.int32)
    return made, inverse(made, *experts.shape), torch.tensor(offsets, dtype=torch.int32), dropped


def check(experts: Tensor, places: Tensor, bins: int, device: str) -> None:
    tokens, k = experts.shape
    for most, align in ((tokens, 1), (tokens + 3, 4), (max(1, tokens // 3), 1), (max(1, tokens // 2), 4)):
        size = most * k + bins * (align - 1)
        *want, dropped = expected(experts, places, bins, most, size, align)
        args = bins, most, size, align
        for got in (alone_cpu(experts, places, *args), guarded(alone_triton, experts.to(device), places.to(device), *args)):
            torch.testing.assert_close([tensor.cpu() for tensor in got[:3]], want, rtol=0, atol=0)
            assert got[3].item() == dropped
            assert_same_layout(alone_fake(experts, places, *args), got)
    check_counted(experts, places, bins, device)


def check_counted(experts: Tensor, places: Tensor, bins: int, device: str) -> None:
    """The message is that of `count`, to a group of one rank whose places these are."""
    tokens, k = experts.shape
    weights = torch.zeros(tokens, k)
    weights[tokens // 2 :, 0] = torch.inf
    signed = signature(experts, weights, bins)
    alone = torch.where((places.long() >= 0) & (places.long() < bins), 0, -1).to(torch.int32)
    for align, checked in ((1, None), (4, weights)):
        there = [None if tensor is None else tensor.to(device) for tensor in (experts, places, checked)]
        *want, _ = expected(experts, places, bins, tokens, tokens * k + bins * (align - 1), align)
        message = count(experts, bins, 1, signed, alone, checked)[1]
        message[:, PAIRS] = 0
        assert message[0, NOT_FINITE] == (0 if checked is None else tokens - tokens // 2)
        for got in (
            counted_cpu(experts, places, bins, signed, align, checked),
            guarded(counted_triton, *there[:2], bins, signed, align, there[2]),
        ):
            torch.testing.assert_close([tensor.cpu() for tensor in got], [*want, message], rtol=0, atol=0)
            assert_same_layout(counted_fake(experts, places, bins, signed, align, checked), got)


@pytest.mark.parametrize(
    ("tokens", "k", "bins"),
    [(5, 2, 3), pytest.param(70, 1, 65, marks=pytest.mark.slow), pytest.param(40, 8, 17, marks=pytest.mark.slow), (0, 2, 3), (1, 1, 1)],
)
def test_the_sort_agrees_with_a_loop(tokens: int, k: int, bins: int, device: str) -> None:
    experts = routing(tokens, k, bins, seed=tokens)
    check(experts, experts, bins, device)


@pytest.mark.parametrize("wrong", [-2, 8, *(pytest.param(wrong, marks=pytest.mark.slow) for wrong in (255, 2**31, 2**32 + 1, -(2**63)))])
def test_ids_out_of_range_do_not_fit_and_are_counted(wrong: int, device: str) -> None:
    experts = routing(9, 2, 8, seed=3)
    experts[4, 1] = wrong
    check(experts, experts, 8, device)
    if wrong == 255:
        check(*2 * (experts.clamp(min=0).to(torch.uint8),), 8, device)


@pytest.mark.slow
def test_places_may_be_others_than_the_experts(device: str) -> None:
    experts = routing(30, 3, 5, seed=4)
    experts[7, 2] = 5  # out of range: it has no place
    places = torch.where((experts < 0) | (experts > 4), -1, (experts + 2) % 5).to(torch.int32)
    for layout in strided(experts):
        check(layout, places, 5, device)


def test_more_slots_than_int32_indices_number_are_refused(device: str) -> None:
    experts = torch.zeros(1, 2, dtype=torch.uint8, device=device).expand(2**30, 2)
    for function in (counted_cpu, counted_triton):
        with pytest.raises(ValueError, match=r"experts was of shape \[1073741824, 2\]; it must be of at most 2147483392 slots"):
            function(experts, experts, 4, [])


def test_they_pass_opcheck(device: str) -> None:
    for tokens, k, most in ((5, 2, 5), (5, 2, 2), (0, 2, 1)):
        experts = routing(tokens, k, 4, seed=tokens).to(device)
        opcheck(sort_alone, (experts, experts, 4, most, most * k + 4, 2))
        opcheck(sort_counted, (experts, experts, 4, [1, 2], 2))
