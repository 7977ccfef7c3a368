"""torch's collectives, as this library calls them: a function starts each, and `wait` waits where its result is first used.

They cost what torch's collectives cost.
They have no backward: the function that calls one defines its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moecomm.ops.base.library import call, direct
from moecomm.ops.base.process_group import process_group
from moecomm.ops.exchange.start_op import define_start, register

funcol = torch.ops._c10d_functional  # each op starts an exchange and registers its Work with the tensor that it returns
WAIT = funcol.wait_tensor.default


def wait(pending: Tensor) -> Tensor:
    """Wait for an exchange that was started, and return its result."""
    return call(WAIT, pending)


def _wait_here(pending: Tensor) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():  # above it torch has a backward in Python, also where nothing needs one (torch 2.13)
        return WAIT(pending)


direct(WAIT, _wait_here, _wait_here, WAIT)


def start_all_to_all(rows: Tensor, splits: Sequence[int], group: str) -> Tensor:
    """Start an all-to-all that sends ``splits`` rows to each rank and receives as many from it, in rank order and their own order."""
    return funcol.all_to_all_single(rows, splits, splits, group)


def start_all_gather(chunk: Tensor, ranks: int, group: str) -> Tensor:
    """Start an all-gather of the ranks' equal chunks: [chunk, ...] -> a flat buffer of bytes, which `all_gathered` finishes."""
    return call(gather_exchange, chunk.reshape(-1).view(torch.uint8), ranks, group)  # gloo sends bytes, but not every dtype


def gather_fake(chunk: Tensor, ranks: int, group: str) -> Tensor:
    return chunk.new_empty(ranks * chunk.shape[0])


def gather_here(chunk: Tensor, ranks: int, group: str) -> Tensor:
    """Not torch's functional all-gather: with that one gloo corrupts the heap (docs/reliability.md, Heap checks)."""
    whole, sent, among = gather_fake(chunk, ranks, group), chunk.clone(), process_group(group)
    register(whole, among._allgather_base(whole, sent), "the chunks of an all-gather", among)
    return whole


gather_exchange = define_start("gather_exchange(Tensor chunk, int ranks, str group) -> Tensor", gather_fake, gather_here, gather_here)


def all_gathered(pending: Tensor, chunk: Tensor, ranks: int) -> Tensor:
    """Wait for the result of `start_all_gather` for ``chunk``, and return it: [ranks * chunk, ...]."""
    return wait(pending).view(chunk.dtype).view(ranks * chunk.shape[0], *chunk.shape[1:])


def start_reduce_scatter(whole: Tensor, ranks: int, group: str) -> Tensor:
    """Start to add up ``whole`` [ranks * chunk, ...] over the ranks, in the backend's own order; a rank gets its chunk, as from FSDP2."""
    return funcol.reduce_scatter_tensor(whole, "sum", ranks, group)


def all_reduced(counts: Tensor, group: str) -> Tensor:
    """The sum of integers over the ranks. It is exact, so it does not depend on their order."""
    return wait(funcol.all_reduce(counts, "sum", group))
