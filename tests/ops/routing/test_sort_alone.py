"""sort_alone: the order of the slots that fit on one rank in static mode, and how many do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.routing.sort_alone import alone_cpu, alone_fake, alone_triton, sort_alone
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


def test_it_passes_opcheck(device: str) -> None:
    for tokens, k, most in ((5, 2, 5), (5, 2, 2), (0, 2, 1)):
        experts = routing(tokens, k, 4, seed=tokens).to(device)
        opcheck(sort_alone, (experts, experts, 4, most, most * k + 4, 2))
