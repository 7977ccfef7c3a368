"""placement_table and place: on which place of which rank a slot's expert is, and which of its replicas serves a token."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.routing.place_slots import place, place_cpu, place_fake, place_triton, placement_table
from tests.ops.cases import assert_same_layout, guarded, routing, strided
from tests.spawn import FOUR, run_ranks

CPU = torch.device("cpu")
PLACEMENTS = {  # by the number of ranks; E is one more than the highest id
    1: [[[0]], [[2, 0, 3, 1]]],
    2: [[[3, 1], [0, 2]], [[0, 1], [2, 0]], [[0, 1], [1, 0]]],
    4: [[[0, 5, 2], [5, 1, 0], [0, 5, 4], [0, 3, 5]], [[0], [0], [0], [1]]],
}


def most(placement: list[list[int]]) -> int:
    return max(map(max, placement)) + 1


def expected(experts: Tensor, placement: list[list[int]], rank: int) -> tuple[Tensor, Tensor]:
    """(places, ranks) by loops, and the rotation by the golden ratio in exact fractions of 2^32."""
    places = torch.full(experts.shape, -1, dtype=torch.int32)
    for t, row in enumerate(experts.tolist()):
        for j, expert in enumerate(row):
            replicas = [p * len(held) + slot for p, held in enumerate(placement) for slot, e in enumerate(held) if e == expert]
            if replicas:
                turn = (t * len(placement) + rank) * 2654435769 % 2**32
                places[t, j] = replicas[turn * len(replicas) // 2**32]
    ranks = torch.where(places < 0, -1, places // len(placement[0]))
    return places, ranks


def assert_places(experts: Tensor, placement: list[list[int]], rank: int, group: str, device: str) -> None:
    table, _ = placement_table(torch.tensor(placement), most(placement), CPU)
    rest = most(placement), len(placement), group
    want = expected(experts, placement, rank)
    for got in (place_cpu(experts, table, *rest), guarded(place_triton, experts.to(device), table.to(device), *rest)):
        torch.testing.assert_close([tensor.cpu() for tensor in got], list(want), rtol=0, atol=0)
        assert_same_layout(place_fake(experts, table, *rest), got)


def places_here(device: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for placement in PLACEMENTS[ranks]:
        for tokens, k in ((300, 2), (7, 1), (0, 3)):
            assert_places(routing(tokens, k, most(placement), seed=tokens), placement, rank, dist.group.WORLD.group_name, device)


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_place_agrees_with_a_loop_on_every_rank(ranks: int, device: str) -> None:
    run_ranks(places_here, ranks, device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_place_takes_any_integer_dtype_and_any_strides(dtype: torch.dtype, device: str) -> None:
    experts = routing(37, 3, 4, seed=1, dropped=0.0 if dtype == torch.uint8 else 0.3).to(dtype)
    for layout in strided(experts):
        assert_places(layout, PLACEMENTS[1][1], 0, "", device)


@pytest.mark.parametrize("wrong", [-2, 4, 255, 2**31, 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)])
def test_ids_out_of_range_have_no_place(wrong: int, device: str) -> None:
    experts = routing(9, 2, 4, seed=3)
    experts[4, 1] = wrong
    assert_places(experts, PLACEMENTS[1][1], 0, "", device)


def test_table_has_the_places_of_each_expert_and_a_checksum_of_all() -> None:
    table, checksum = placement_table(torch.tensor([[2, 0], [1, 2]]), 3, CPU)
    assert table.tolist() == [0, 1, 2, 4, *[1], *[2], *[0, 3]]
    assert placement_table(torch.tensor([[2, 0], [1, 2]], dtype=torch.uint8), 3, CPU)[1] == checksum
    others = [[[0, 2], [1, 2]], [[1, 2], [2, 0]], [[2], [0], [1], [2]]]
    assert len({checksum, *(placement_table(torch.tensor(other), 3, CPU)[1] for other in others)}) == 4


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        ([[0, 1], [2, 3]], r"placement was \[2, 3\] on rank 1; it must be of ids in \[0, num_experts\) = \[0, 3\)"),
        ([[0, 1], [2, -1]], r"placement was \[2, -1\] on rank 1; it must be of ids in"),
        ([[0, 1, 2], [2, 1, 2]], r"placement was \[2, 1, 2\] on rank 1; it must be of different experts on a rank"),
        ([[0], [0]], r"placement was without experts \[1, 2\]; it must be of all 3 experts, each on some rank"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(placement: list[list[int]], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        placement_table(torch.tensor(placement), 3, CPU)


def imbalance_here(stride: int) -> list[int]:
    """How many of every stride-th token go to each of 3 ranks from here, where they alone choose the expert that all ranks have."""
    table, _ = placement_table(torch.tensor([[0], [0], [0], [1]]), 2, CPU)
    experts = torch.full((4096, 1), -1)
    experts[::stride] = 0
    _, ranks = place(experts, table, 2, 4, dist.group.WORLD.group_name)
    return torch.bincount(ranks.flatten() + 1, minlength=4)[1:].tolist()


def test_replicas_serve_about_as_many_tokens_each() -> None:
    """Of any run of tokens and of every n-th, from each rank, and from all ranks that have one token each."""
    for stride in (1, 2, 3, 4, 6, 8, 16, 32, 64):
        for counts in run_ranks(imbalance_here, 4, stride):
            even = 4096 / stride / 3
            assert max(abs(count - even) for count in counts) <= max(6, 0.02 * even), (stride, counts)
    for counts in zip(*run_ranks(imbalance_here, 4, 4096), strict=True):
        assert sum(counts) in (1, 2)


def twins_here() -> Tensor:
    table, _ = placement_table(torch.tensor([[0, 1, 2], [2, 1, 0]]), 3, CPU)
    return place(torch.tensor([[0, 1, 2]] * 50), table, 3, 2, dist.group.WORLD.group_name)[1]


def test_experts_with_the_same_ranks_send_a_token_to_one_of_them() -> None:
    for ranks in run_ranks(twins_here, 2):
        assert ranks.unique().tolist() == [0, 1]
        assert (ranks == ranks[:, :1]).all()


@pytest.mark.slow
def test_place_passes_opcheck(device: str) -> None:
    for placement in PLACEMENTS[1]:
        held = torch.tensor(placement)
        opcheck(placement_table, (held, most(placement), CPU), test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
        table, _ = placement_table(held, most(placement), CPU)
        for tokens, k in ((5, 1), (0, 1), (1, 1)):
            opcheck(place, (routing(tokens, k, most(placement), seed=tokens).to(device), table.to(device), most(placement), 1, ""))
