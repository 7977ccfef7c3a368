"""torch's functional collectives, as this library calls them: each is started here, and `wait` waits where its result is first used.

They cost what torch's cost. None has a backward: what joins them to one says what its gradient is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

funcol = torch.ops._c10d_functional  # each op starts an exchange and registers its Work with the tensor that it gives


def wait(pending: Tensor) -> Tensor:
    """The result of an exchange that was started, once it is there."""
    return funcol.wait_tensor(pending)


def start_all_to_all(rows: Tensor, splits: Sequence[int], group: str) -> Tensor:
    """Start to send each rank its ``splits`` rows, and to receive as many from it; the rows keep their order and their ranks'."""
    return funcol.all_to_all_single(rows, splits, splits, group)


def start_all_gather(chunk: Tensor, ranks: int, group: str) -> Tensor:
    """Start to gather the equal chunks of all ranks: [chunk, ...] -> a flat buffer of bytes, to be finished by `all_gathered`."""
    return funcol.all_gather_into_tensor(chunk.reshape(-1).view(torch.uint8), ranks, group)  # gloo sends bytes, but not every dtype


def all_gathered(pending: Tensor, chunk: Tensor, ranks: int) -> Tensor:
    """Wait for what `start_all_gather` began for ``chunk``: [ranks * chunk, ...]."""
    return wait(pending).view(chunk.dtype).view(ranks * chunk.shape[0], *chunk.shape[1:])


def all_reduced(counts: Tensor, group: str) -> Tensor:
    """The sum of integers over the ranks, in which their order does not show."""
    return wait(funcol.all_reduce(counts, "sum", group))
