"""(S, R, N, splits) = the sums of the messages' pairs and slots; splits[0] = pairs to each rank, splits[1] = pairs from each, on the CPU.

The one place that reads from the device: one copy of 2 * P short messages, whatever T and E are. It raises, alike on every rank, where the
ranks' signatures differ, an expert id is out of range, or int32 indices could not number the slots. `checked`, for static mode, gives the
keys as they are, and raises alike: what follows needs them, and so no compiler leaves it out. Integers only: no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.ops.library import define
from moecomm.ops.signature import PAIRS, SLOTS, check_routing
from moecomm.ops.sort import MOST

CHECKED = "checked(Tensor received, Tensor keys) -> Tensor"
SCHEMA = "plan_sizes(Tensor sent, Tensor received) -> (SymInt, SymInt, SymInt, Tensor)"


def sizes_fake(sent: Tensor, received: Tensor) -> tuple[torch.SymInt, torch.SymInt, torch.SymInt, Tensor]:
    context = torch.library.get_ctx()
    splits = torch.empty(2, sent.shape[0], dtype=torch.int64, device="cpu")
    return context.new_dynamic_size(), context.new_dynamic_size(), context.new_dynamic_size(), splits


def sizes(sent: Tensor, received: Tensor) -> tuple[int, int, int, Tensor]:
    out, into = (sent, received) if sent.is_cpu else torch.stack((sent, received)).cpu()  # [P, 6 + signature]: the host sync of a layer
    messages = into.tolist()
    check_routing(messages, MOST)
    pairs = [out[:, PAIRS].tolist(), [message[PAIRS] for message in messages]]
    return sum(pairs[0]), sum(pairs[1]), sum(message[SLOTS] for message in messages), torch.tensor(pairs)


def checked_fake(received: Tensor, keys: Tensor) -> Tensor:
    return torch.empty_like(keys)


def check(received: Tensor, keys: Tensor) -> Tensor:
    check_routing(received.tolist(), None)
    return keys.clone()  # an op may not give back its input


plan_sizes = define(SCHEMA, sizes_fake, sizes, sizes)
checked = define(CHECKED, checked_fake, check, check)
