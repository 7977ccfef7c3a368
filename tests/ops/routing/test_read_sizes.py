"""read_sizes: plan_sizes' numbers as a tensor."""

from __future__ import annotations

import torch
from torch.library import opcheck

from moecomm.ops.base.signature import signature
from moecomm.ops.routing.count_pairs import count
from moecomm.ops.routing.plan_sizes import plan_sizes
from moecomm.ops.routing.read_sizes import read_sizes
from tests.ops.cases import routing


def test_the_sizes_are_those_of_plan_sizes() -> None:
    for tokens, seed in ((9, 0), (1, 1), (0, 2)):
        experts = routing(tokens, 2, 8, seed)
        message = count(experts, 8, 4, signature(experts, torch.zeros(tokens, 2), 8))[1]
        *numbers, splits, few = plan_sizes(message, message)
        sizes, *rest = read_sizes(message, message)
        assert sizes.tolist() == numbers
        assert all(map(torch.equal, rest, (splits, few)))
        opcheck(read_sizes, (message, message))
