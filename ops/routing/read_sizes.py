"""(S, R, N, splits, few) = the sums of the messages' pairs and slots; splits[0] = pairs to each rank, splits[1] = pairs from each.

In a group of one S, R and the splits are 0: it has no pairs.

Costs one copy of the numbers of 2 * P messages to the host, whatever T and E are. Only this file reads from the device.
No backward: integers only.

- ``few`` says whether the slots of every rank came with the messages. ``splits`` and ``few`` are CPU tensors.
- `plan_sizes` raises the same error on every rank if signatures differ, an expert id is out of range, or int32 indices cannot number the
  slots.
- `read_sizes` returns (S, R, N) as one CPU tensor, for graphs that leave the process. torch.export and AOTInductor support only ops whose
  results are all tensors (torch 2.13).
- `checked` raises the same errors in static mode and returns the keys. Later ops need the keys, so no compiler removes the check.
- `read_list` is for code outside a layer's step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.ops.base.library import define
from moecomm.ops.base.signature import PAIRS, SLOTS, WIDTH, check_routing
from moecomm.ops.routing.counting_sort import MOST

READ = "read_sizes(Tensor sent, Tensor received) -> (Tensor, Tensor, Tensor)"
CHECKED = "checked(Tensor received, Tensor keys) -> Tensor"
SCHEMA = "plan_sizes(Tensor sent, Tensor received) -> (SymInt, SymInt, SymInt, Tensor, Tensor)"


def read_list(tensor: Tensor) -> list[Any]:
    """The tensor's values as nested lists: a host synchronization."""
    return tensor.tolist()


def sizes_fake(sent: Tensor, received: Tensor) -> tuple[torch.SymInt, torch.SymInt, torch.SymInt, Tensor, Tensor]:
    context = torch.library.get_ctx()
    sizes = context.new_dynamic_size(), context.new_dynamic_size(), context.new_dynamic_size()
    return *sizes, *_splits_and_few(sent.shape[0])


def _splits_and_few(ranks: int) -> tuple[Tensor, Tensor]:
    return torch.empty(2, ranks, dtype=torch.int64, device="cpu"), torch.empty(1, dtype=torch.bool, device="cpu")


def sizes(sent: Tensor, received: Tensor) -> tuple[int, int, int, Tensor, Tensor]:
    if sent.shape[0] == 1:  # a group of one has no pairs, and sends no slots
        (message,) = messages = read_list(sent)  # the layer's host sync
        check_routing(messages, MOST)
        return 0, 0, message[SLOTS], torch.zeros(2, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
    if sent.is_cpu:
        out, messages = sent.numpy()[:, PAIRS].tolist(), received.numpy()[:, : WIDTH + 1].tolist()
    else:
        both = read_list(torch.cat((sent[:, PAIRS : PAIRS + 1], received[:, : WIDTH + 1]), 1))  # [P, 1 + message]: likewise
        out, messages = [row[0] for row in both], [row[1:] for row in both]
    check_routing(messages, MOST)
    pairs = [out, [message[PAIRS] for message in messages]]
    few = all(message[WIDTH:] == [1] for message in messages)
    return sum(out), sum(pairs[1]), sum(message[SLOTS] for message in messages), torch.tensor(pairs), torch.tensor([few])


def read_fake(sent: Tensor, received: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(3, dtype=torch.int64, device="cpu"), *_splits_and_few(sent.shape[0])


def read(sent: Tensor, received: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, splits, few = sizes(sent, received)
    return torch.tensor(numbers), splits, few


def checked_fake(received: Tensor, keys: Tensor) -> Tensor:
    return torch.empty_like(keys)


def check(received: Tensor, keys: Tensor) -> Tensor:
    check_routing(read_list(received[:, :WIDTH]), None)
    return keys.clone()  # an op may not return its input


plan_sizes = define(SCHEMA, sizes_fake, sizes, sizes)
read_sizes = define(READ, read_fake, read, read)
checked = define(CHECKED, checked_fake, check, check)
