"""(sizes, splits, few) = what `plan_sizes` gives, with (S, R, N) as a tensor on the CPU: for graphs that leave the process.

torch.export writes down, and AOTInductor calls, ops whose results are tensors alone (torch 2.13); `moecomm.compile.export` puts this op
and three reads of a number in the place of `plan_sizes`. Costs what that costs: the one copy from the device. Integers only: no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.ops.base.library import define
from moecomm.ops.routing import plan_sizes as plan_sizes

SCHEMA = "read_sizes(Tensor sent, Tensor received) -> (Tensor, Tensor, Tensor)"


def sizes_fake(sent: Tensor, received: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sizes = torch.empty(3, dtype=torch.int64, device="cpu")  # S, R, N
    return sizes, torch.empty(2, sent.shape[0], dtype=torch.int64, device="cpu"), torch.empty(1, dtype=torch.bool, device="cpu")


def sizes(sent: Tensor, received: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, splits, few = plan_sizes.sizes(sent, received)
    return torch.tensor(numbers), splits, few


read_sizes = define(SCHEMA, sizes_fake, sizes, sizes)
