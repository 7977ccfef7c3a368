"""What the ranks of a group must have passed alike, compared by checksums before anything else is sent: tensors' kinds, placements."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moecomm.errors import MoECommError
from moecomm.group import Group, process_group
from moecomm.ops.exchange import wait
from moecomm.ops.signature import FUNCTIONS, SIGNATURE, SIGNED, WIDTH, check_agreed


def checksums(function: str, passed: object, device: torch.device, group: Group) -> list[int]:
    """Of what each rank passed, by its repr: one small exchange, read by the host. Raises where a rank called another function."""
    mine = [0] * SIGNATURE + [FUNCTIONS.index(function), zlib.crc32(repr(passed).encode())]
    sent = torch.tensor([mine + [0] * (WIDTH - len(mine))], device=device).repeat(group.size, 1)  # [P, WIDTH]
    pairs = [1] * group.size
    messages = wait(torch.ops._c10d_functional.all_to_all_single(sent, pairs, pairs, group.name)).tolist()
    check_agreed(messages, SIGNED[:1])
    return [message[SIGNATURE + 1] for message in messages]


def check_same_kind(function: str, tensors: Sequence[Tensor], group: Group) -> None:
    """Raise, alike on every rank, where the ranks' tensors differ in number, dtype or shape."""
    mine = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors]
    if len(set(checksums(function, mine, tensors[0].device, group))) > 1:
        ranks: list[Any] = [None] * group.size
        dist.all_gather_object(ranks, mine, process_group(group.name))
        at = next(i for i, what in enumerate(zip_longest(*ranks)) if len(set(what)) > 1)
        passed = ", ".join(f"{theirs[at] if at < len(theirs) else 'missing'} on rank {rank}" for rank, theirs in enumerate(ranks))
        raise MoECommError(f"params' tensor {at} was {passed} of the group; it must be of the same dtype and shape on every rank")


def check_same_placement(function: str, rows: list[list[int]], device: torch.device, group: Group) -> None:
    """Raise, alike on every rank, where the ranks' placements differ."""
    every = checksums(function, rows, device, group)
    if len(set(every)) > 1:
        passed = ", ".join(f"of checksum {value:08x} on rank {rank}" for rank, value in enumerate(every))
        raise MoECommError(f"placement was {passed} of the group; it must be the same on every rank")
