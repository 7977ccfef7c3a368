"""plan_sizes: what the host must know, read once; and the errors that all ranks raise alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import pad

from moecomm.errors import ExpertIdError, MoECommError
from moecomm.ops.base.signature import ROOM, TOKENS, WIDTH, signature
from moecomm.ops.routing.count_pairs import count
from moecomm.ops.routing.counting_sort import MOST
from moecomm.ops.routing.read_sizes import checked, plan_sizes, read_sizes
from tests.ops.cases import routing

NUM_EXPERTS = 8


def message(
    experts: Tensor, ranks: int, weights_dtype: torch.dtype = torch.float32, like: Tensor | None = None, placement: int = -1
) -> Tensor:
    """[P, 6 + signature]: what the rank with these experts sends."""
    weights = torch.zeros(experts.shape, dtype=weights_dtype)
    return count(experts, NUM_EXPERTS, ranks, signature(experts, weights, NUM_EXPERTS, () if like is None else (like,), placement))[1]


def exchanged(*messages: Tensor) -> list[Tensor]:
    """What each rank receives, when rank r sends messages[r]."""
    return [torch.stack([sent[rank] for sent in messages]) for rank in range(len(messages))]


def test_sizes_are_the_sums_of_what_is_sent_and_received() -> None:
    sent = [message(torch.tensor([[0, 1], [4, -1], [5, 0]]), 2), message(torch.tensor([[7, 7]]), 2)]
    received = exchanged(*sent)
    assert plan_sizes(sent[0], received[0])[:3] == (4, 2, 3)
    assert plan_sizes(sent[1], received[1])[:3] == (1, 3, 4)
    splits = plan_sizes(sent[0], received[0])[3]
    assert splits.tolist() == [[2, 2], [2, 0]]
    assert splits.is_contiguous()
    assert splits.device.type == "cpu"
    assert plan_sizes(sent[1], received[1])[3].tolist() == [[0, 1], [2, 1]]


@pytest.mark.slow
def test_slots_are_few_where_every_rank_says_so() -> None:
    sent = [message(torch.tensor([[0, 1]]), 2), message(torch.tensor([[7, 7]]), 2)]
    for says in ((1, 1), (1, 0), (0, 1), (0, 0)):
        received = [pad(each, (0, ROOM)) for each in exchanged(*sent)]
        for rank in range(2):
            received[rank][:, WIDTH] = torch.tensor(says)
            few = plan_sizes(sent[rank], received[rank])[4]
            assert (few.tolist(), few.dtype, few.device.type) == ([says == (1, 1)], torch.bool, "cpu")
            opcheck(plan_sizes, (sent[rank], received[rank]))
    assert plan_sizes(sent[0], sent[0])[4].tolist() == [False]  # as in a group of one, which sends none


def test_sizes_of_no_tokens() -> None:
    none = message(torch.zeros(0, 2, dtype=torch.int64), 2)
    assert plan_sizes(none, none)[:3] == (0, 0, 0)


@pytest.mark.parametrize("wrong", [-2, 8, 2**32, -(2**40)])
def test_every_rank_raises_for_an_id_out_of_range_on_any(wrong: int) -> None:
    sent = [message(torch.tensor([[0, 1]]), 2), message(torch.tensor([[3, wrong]]), 2)]
    lowest, highest = min(3, wrong), max(3, wrong)
    for rank, received in enumerate(exchanged(*sent)):
        with pytest.raises(ExpertIdError, match=rf"experts was between {lowest} and {highest} on rank 1 of the group; .*\[-1, 8\)"):
            plan_sizes(sent[rank], received)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"experts": torch.zeros(1, 3, dtype=torch.int64)}, "k was 2 on rank 0, 3 on rank 1"),
        ({"weights_dtype": torch.bfloat16}, "weights.dtype was torch.float32 on rank 0, torch.bfloat16 on rank 1"),
        ({"like": torch.zeros(1, 5)}, "like's elements a token was 4 on rank 0, 5 on rank 1"),
        ({"like": torch.zeros(1, 4, dtype=torch.float64)}, "like.dtype was torch.float32 on rank 0, torch.float64 on rank 1"),
        ({"placement": 2**32 - 1}, "placement was not given on rank 0, of checksum ffffffff on rank 1"),
        ({"like": None}, "like's elements a token was 4 on rank 0, not given on rank 1"),
    ],
)
def test_every_rank_raises_where_the_ranks_differ(other: dict[str, object], text: str) -> None:
    same = {"experts": torch.zeros(1, 2, dtype=torch.int64), "ranks": 2, "like": torch.zeros(1, 4)}
    sent = [message(**same), message(**(same | other))]
    for rank, received in enumerate(exchanged(*sent)):
        with pytest.raises(MoECommError, match=text):
            plan_sizes(sent[rank], received)


@pytest.mark.parametrize("tokens", [(2**30, 0), (2**29, 2**29), (5, 2**40)])
def test_every_rank_raises_for_more_slots_than_int32_indices_number(tokens: tuple[int, int]) -> None:
    sent = [message(torch.tensor([[0, 5]]), 2) for _ in tokens]
    for header, t in zip(sent, tokens, strict=True):
        header[:, TOKENS] = t  # as of a rank with memory for so many
    shapes = f"[{tokens[0]}, 2] on rank 0, [{tokens[1]}, 2] on rank 1"
    for rank, received in enumerate(exchanged(*sent)):
        with pytest.raises(MoECommError) as raised:
            plan_sizes(sent[rank], received)
        assert str(raised.value) == (
            f"experts was of shape {shapes} of the group, {2 * sum(tokens)} slots; together it must be at most 2147483392, "
            "as int32 indices number them"
        )


def test_as_many_slots_as_int32_indices_number_are_taken() -> None:
    sent = message(torch.tensor([[0, 5]]), 1)
    sent[:, TOKENS] = MOST // 2
    *sizes, splits, few = plan_sizes(sent, sent)
    assert sizes == [0, 0, 2]
    assert splits.tolist() == [[0], [0]]
    assert few.tolist() == [False]


def test_static_mode_checks_the_same_but_for_the_number_of_slots() -> None:
    keys = torch.tensor([[0, -1]], dtype=torch.int32)
    good, bad = message(torch.tensor([[0, 5]]), 2), message(torch.tensor([[0, NUM_EXPERTS]]), 2)
    good[:, TOKENS] = 2**40
    assert checked(good, keys).equal(keys)
    with pytest.raises(ExpertIdError, match="between 0 and 8 on rank 1 of the group"):
        checked(torch.stack((good[0], bad[0])), keys)
    opcheck(checked, (good, keys))


@pytest.mark.slow
def test_sizes_pass_opcheck() -> None:
    for tokens in (5, 1, 0):
        sent = message(routing(tokens, 2, NUM_EXPERTS, seed=tokens), 4)
        opcheck(plan_sizes, (sent, sent))


def test_the_sizes_are_those_of_plan_sizes() -> None:
    for tokens, seed in ((9, 0), (1, 1), (0, 2)):
        experts = routing(tokens, 2, 8, seed)
        message = count(experts, 8, 4, signature(experts, torch.zeros(tokens, 2), 8))[1]
        *numbers, splits, few = plan_sizes(message, message)
        sizes, *rest = read_sizes(message, message)
        assert sizes.tolist() == numbers
        assert all(map(torch.equal, rest, (splits, few)))
        opcheck(read_sizes, (message, message))
