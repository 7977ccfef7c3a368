"""received[p] = rank p's message for this rank: counts, what ranks must agree on, and the slots if they are few.

Costs one all-to-all of LENGTH int64 words to each rank. It has no backward: the words are integers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moecomm.ops.base.process_group import process_group
from moecomm.ops.base.signature import ROOM
from moecomm.ops.exchange.all_to_all import start
from moecomm.ops.exchange.start_op import define_start

SCHEMA = "messages_exchange(Tensor messages, Tensor? few, str what, str group) -> Tensor"


def messages_fake(messages: Tensor, few: Tensor | None, what: str, group: str) -> Tensor:
    return messages.new_empty(messages.shape[0], messages.shape[1] + ROOM)


def send_messages(messages: Tensor, few: Tensor | None, what: str, group: str) -> Tensor:
    """Send row p of ``messages`` [P, ...] and of ``few`` [P, ROOM] to rank p.

    Without ``few`` zeros take its place, so that all messages have the same length.
    """
    room = messages.new_zeros(messages.shape[0], ROOM) if few is None else few
    return start(torch.cat((messages, room), 1), messages.shape[0], None, 0, group, what)


messages_exchange = define_start(SCHEMA, messages_fake, send_messages, send_messages)


def send_without_waiting(messages: Tensor, group: str) -> None:
    """Send row p of ``messages`` [P, LENGTH] to rank p, and drop what arrives.

    Torch keeps the memory until the other ranks have taken part.
    """
    sent = messages.view(torch.uint8)  # [P, bytes of LENGTH]
    dist.all_to_all_single(torch.empty_like(sent), sent, None, None, group=process_group(group), async_op=True)


def gather_objects(mine: object, ranks: int, group: str) -> list[Any]:
    """The objects of all ranks, pickled for the exchange. Used only for the text of an error."""
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, mine, process_group(group))
    return every
