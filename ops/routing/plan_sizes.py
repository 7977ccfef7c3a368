"""(S, R, N, splits, few) = the sums of the messages' pairs and slots; splits[0] = pairs to each rank, splits[1] = pairs from each; and
whether every rank's slots were few, and so are in the messages. The two tensors are on the CPU.

The one place that reads from the device: one copy of the numbers of 2 * P messages, whatever T and E are. It raises, alike on every rank,
where the ranks' signatures differ, an expert id is out of range, or int32 indices could not number the slots. `checked`, for static mode,
gives the keys as they are, and raises alike: what follows needs them, and so no compiler leaves it out. Integers only: no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.ops.base.library import define
from moecomm.ops.base.signature import PAIRS, SLOTS, WIDTH, check_routing
from moecomm.ops.routing.counting_sort import MOST

CHECKED = "checked(Tensor received, Tensor keys) -> Tensor"
SCHEMA = "plan_sizes(Tensor sent, Tensor received) -> (SymInt, SymInt, SymInt, Tensor, Tensor)"


def sizes_fake(sent: Tensor, received: Tensor) -> tuple[torch.SymInt, torch.SymInt, torch.SymInt, Tensor, Tensor]:
    context = torch.library.get_ctx()
    sizes = context.new_dynamic_size(), context.new_dynamic_size(), context.new_dynamic_size()
    return *sizes, torch.empty(2, sent.shape[0], dtype=torch.int64, device="cpu"), torch.empty(1, dtype=torch.bool, device="cpu")


def sizes(sent: Tensor, received: Tensor) -> tuple[int, int, int, Tensor, Tensor]:
    both = torch.cat((sent[:, PAIRS : PAIRS + 1], received[:, : WIDTH + 1]), 1).tolist()  # [P, 1 + message]: the host sync of a layer
    out, messages = [row[0] for row in both], [row[1:] for row in both]
    check_routing(messages, MOST)
    pairs = [out, [message[PAIRS] for message in messages]]
    few = all(message[WIDTH:] == [1] for message in messages)  # a group of one sends none
    return sum(pairs[0]), sum(pairs[1]), sum(message[SLOTS] for message in messages), torch.tensor(pairs), torch.tensor([few])


def checked_fake(received: Tensor, keys: Tensor) -> Tensor:
    return torch.empty_like(keys)


def check(received: Tensor, keys: Tensor) -> Tensor:
    check_routing(received[:, :WIDTH].tolist(), None)
    return keys.clone()  # an op may not give back its input


plan_sizes = define(SCHEMA, sizes_fake, sizes, sizes)
checked = define(CHECKED, checked_fake, check, check)
