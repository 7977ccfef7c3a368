"""fit: the slots that travel in static mode, and how many do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.routing.count_pairs import count
from moecomm.ops.routing.counting_sort import bounded_sort
from moecomm.ops.routing.drop_overflow import fit, fit_cpu, fit_fake, fit_triton
from tests.ops.cases import assert_same_layout, guarded, routing, strided


def expected(experts: Tensor, places: Tensor, ranks: int, local: int, most: int) -> tuple[Tensor, Tensor]:
    """(fits, dropped): the first ``most`` tokens of each rank have room for ``local`` slots each; by a loop."""
    fits, dropped, taken = torch.full(experts.shape, -1, dtype=torch.int32), 0, [0] * ranks
    for t, row in enumerate(places.tolist()):
        for rank in range(ranks):
            slots = [j for j, place in enumerate(row) if rank * local <= place < (rank + 1) * local]
            if slots and taken[rank] < most:
                taken[rank] += 1
                for j in slots[:local]:
                    fits[t, j] = row[j]
        dropped += sum(asked != -1 and got < 0 for asked, got in zip(experts[t].tolist(), fits[t].tolist(), strict=True))
    return fits, torch.tensor(dropped, dtype=torch.int32)


def check(experts: Tensor, ranks: int, local: int, most: int, device: str, places: Tensor | None = None) -> None:
    placed = None if places is None else torch.where(places < 0, -1, places // local).to(torch.int32)
    places = experts if places is None else places
    keys, _ = count(experts, ranks * local, ranks, [], placed)
    _, position = bounded_sort(keys, ranks, most)
    want = expected(experts, places, ranks, local, most)
    on_device = [tensor.to(device) for tensor in (experts, places, position)]
    for got in (fit_cpu(experts, places, position, local), guarded(fit_triton, *on_device, local)):
        torch.testing.assert_close([tensor.cpu() for tensor in got], list(want), rtol=0, atol=0)
        assert_same_layout(fit_fake(experts, places, position, local), got)


@pytest.mark.parametrize(
    ("tokens", "k", "ranks", "local"),
    [
        (5, 2, 4, 2),
        (33, 3, 2, 1),
        (64, 8, 4, 4),
        (70, 1, 4, 1),
        (40, 5, 1, 3),
        (1, 1, 1, 1),
        (0, 2, 2, 2),
        pytest.param(3, 300, 2, 160, marks=pytest.mark.slow),
    ],
)
def test_fit_agrees_with_a_loop(tokens: int, k: int, ranks: int, local: int, device: str) -> None:
    """An expert may stand in several slots of a token, and so a token have more slots for a rank than that has experts."""
    for most in (max(tokens, 1), 1, max(1, tokens // 3)):
        check(routing(tokens, k, ranks * local, seed=tokens), ranks, local, most, device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_fit_takes_any_integer_dtype_and_any_strides(dtype: torch.dtype, device: str) -> None:
    experts = routing(37, 3, 8, seed=1, dropped=0.0 if dtype == torch.uint8 else 0.3).to(dtype)
    for layout in strided(experts):
        check(layout, 4, 2, 6, device)


@pytest.mark.parametrize("wrong", [-2, 8, 255, 2**31, 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)])
def test_ids_out_of_range_do_not_fit_and_are_counted(wrong: int, device: str) -> None:
    experts = routing(9, 2, 8, seed=3)
    experts[4, 1] = wrong
    check(experts, 4, 2, 9, device)
    check(experts, 4, 2, 1, device)
    if wrong == 255:
        check(experts.clamp(min=0).to(torch.uint8), 4, 2, 9, device)


def test_places_may_be_others_than_the_experts(device: str) -> None:
    experts = routing(30, 3, 5, seed=4)
    experts[7, 2] = 5  # out of range: it has no place
    places = torch.where((experts < 0) | (experts > 4), -1, (experts * 5 + torch.arange(30).unsqueeze(1)) % 8).to(torch.int32)
    for most in (30, 4):
        check(experts, 4, 2, most, device, places)


@pytest.mark.slow
def test_fit_passes_opcheck(device: str) -> None:
    for tokens, k in ((5, 2), (4, 1), (0, 2), (1, 1)):
        experts = routing(tokens, k, 4, seed=tokens).to(device)
        _, position = bounded_sort(count(experts, 4, 2, [], None)[0], 2, 2)
        opcheck(fit, (experts, experts, position, 2))
        opcheck(fit, (experts, experts, position, 1))
