"""(S, R, N, splits) = the sums of the messages' pairs and slots; splits[0] = pairs to each rank, splits[1] = pairs from each, on the CPU.

The one place that reads from the device: one copy of 2 * P short messages, whatever T and E are. It raises, alike on every rank, where the
ranks' signatures differ, an expert id is out of range, or int32 indices could not number the slots. Integers only: no backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moecomm.errors import ExpertIdError, MoECommError
from moecomm.ops.count import HIGHEST, LOWEST, PAIRS, SIGNATURE, SLOTS, TOKENS
from moecomm.ops.library import define
from moecomm.ops.sort import MOST

SCHEMA = "plan_sizes(Tensor sent, Tensor received) -> (SymInt, SymInt, SymInt, Tensor)"
SIGNED = ("k", "num_experts", "weights.dtype", "like's elements a token", "like.dtype", "placement")  # what a signature's numbers mean


def sizes_fake(sent: Tensor, received: Tensor) -> tuple[torch.SymInt, torch.SymInt, torch.SymInt, Tensor]:
    context = torch.library.get_ctx()
    splits = torch.empty(2, sent.shape[0], dtype=torch.int64, device="cpu")
    return context.new_dynamic_size(), context.new_dynamic_size(), context.new_dynamic_size(), splits


def sizes(sent: Tensor, received: Tensor) -> tuple[int, int, int, Tensor]:
    messages = torch.stack((sent, received)).cpu()  # [2, P, 5 + signature]: the host sync of a layer
    _check(messages[1].tolist())
    splits = messages[:, :, PAIRS].contiguous()  # [2, P]
    pairs_sent, pairs_received = splits.sum(1).tolist()
    return pairs_sent, pairs_received, int(messages[1, :, SLOTS].sum()), splits


def _check(messages: list[list[int]]) -> None:
    for column, what in enumerate(SIGNED, SIGNATURE):
        values = [message[column] for message in messages]
        if len(set(values)) > 1:
            passed = ", ".join(f"{_readable(what, value)} on rank {rank}" for rank, value in enumerate(values))
            raise MoECommError(f"{what} was {passed} of the group; it must be the same on every rank")
    num_experts = messages[0][SIGNATURE + SIGNED.index("num_experts")]
    wrong = [(rank, m) for rank, m in enumerate(messages) if m[LOWEST] < -1 or m[HIGHEST] >= num_experts]
    if wrong:
        where = ", ".join(f"between {m[LOWEST]} and {m[HIGHEST]} on rank {rank}" for rank, m in wrong)
        raise ExpertIdError(f"experts was {where} of the group; ids must be in [-1, num_experts) = [-1, {num_experts})")
    k = messages[0][SIGNATURE + SIGNED.index("k")]
    slots = sum(message[TOKENS] for message in messages) * k  # no rank has more, T * K sent or R * K received, and all know this sum
    if slots > MOST:
        shapes = ", ".join(f"[{message[TOKENS]}, {k}] on rank {rank}" for rank, message in enumerate(messages))
        raise MoECommError(
            f"experts was of shape {shapes} of the group, {slots} slots; together it must be at most {MOST}, as int32 indices number them"
        )


DTYPES = tuple(sorted((d for d in vars(torch).values() if isinstance(d, torch.dtype)), key=str))


def signature(experts: Tensor, weights: Tensor, num_experts: int, like: Tensor | None, placement: int = -1) -> list[int]:
    """What the ranks must agree on, as numbers in the order of `SIGNED`; of the placement its checksum."""
    elements, dtype = (-1, -1) if like is None else (math.prod(like.shape[1:]), DTYPES.index(like.dtype))
    return [experts.shape[1], num_experts, DTYPES.index(weights.dtype), elements, dtype, placement]


def _readable(what: str, value: int) -> object:
    if value < 0:
        return "not given"
    if what == "placement":
        return f"of checksum {value:08x}"
    return DTYPES[value] if what.endswith("dtype") else value


plan_sizes = define(SCHEMA, sizes_fake, sizes, sizes)
