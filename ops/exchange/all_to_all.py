"""received = what each rank gathered for me, in their order: rows x[order[s] // K] one way (S -> R), weighted sums of rows back (R -> S).

Costs (token, rank) pairs x D elements on the wire, each way, and one private send buffer of as many: private, because the compiler
reuses the memory of an op's input while the exchange is still in flight. Every op here returns as soon as the exchange is started;
`wait` gives the result. `dispatch_exchange` and `combine_exchange` are each other's mirror; `dispatch_combine.py` and `slots.py` join them
to the backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moecomm.errors import MoECommError
from moecomm.ops.base.process_group import process_group
from moecomm.ops.exchange.start_op import define_start, in_backward, register
from moecomm.ops.rows.gather import gather_rows_cpu, gather_rows_triton
from moecomm.ops.rows.weighted_sum import weighted_sum_cpu, weighted_sum_triton

MARK = 8  # bytes: a message ends with the mark by chance once in 2^64
DISPATCH = "dispatch_exchange(Tensor x, Tensor order, int k, Tensor? splits, SymInt received, str group) -> Tensor"
COMBINE = "combine_exchange(Tensor rows, Tensor? weights, Tensor order, Tensor position, Tensor? splits, SymInt pairs, str group) -> Tensor"
RETURN = "return_exchange(Tensor rows, Tensor? splits, SymInt pairs, str group) -> Tensor"


def start(send: Tensor, size: int, splits: Tensor | None, direction: int, group: str, what: str = "rows") -> Tensor:
    """Start the exchange of the rows of ``send`` [n, D]: the [size, D] tensor that will hold what comes.

    Direction 0 is S -> R, 1 is R -> S. Without ``splits`` as many rows go to each rank and come from it. ``what`` is what an error says of
    them. Nobody may write to ``send`` from here on: it is read until the exchange is waited for.
    """
    try:
        received = send.new_empty(size, send.shape[1])
    except RuntimeError as error:
        error.add_note(f"moecomm: no memory for {what}; nothing was sent: the others wait until this rank ends, or the group's timeout")
        raise
    if send.shape[1] == 0:
        return received  # no bytes on any rank
    out, into = (None, None) if splits is None else splits.numpy().tolist()[:: 1 - 2 * direction]
    ranks, arriving = process_group(group), received.view(torch.uint8)  # what a backend can send does not depend on the dtype of bytes
    check = _marked(arriving, into, ranks.size(), what) if arriving.is_cpu else None
    work = dist.all_to_all_single(arriving, send.view(torch.uint8), into, out, group=ranks, async_op=True)
    register(received, work, what, ranks, check)
    return received


def _marked(arriving: Tensor, into: list[int] | None, ranks: int, what: str) -> Callable[[], None]:
    """Mark the end of each rank's part of ``arriving`` [rows, bytes], and return a check that raises if a mark is still there.

    gloo accepts a message that is shorter than what was asked for, and says nothing: the rest of the part keeps what was in its memory.
    A part of less than a mark's 8 bytes has no mark. On a GPU there are none: to read them would be a host synchronization.
    """
    rows, width = arriving.shape
    memory, mark = arriving.numpy().reshape(-1).data, os.urandom(MARK)
    ends, end = [], 0  # of the parts that have a mark, with their ranks
    for rank, part in enumerate([rows // ranks] * ranks if into is None else into):
        end += part * width
        if part * width >= MARK:
            memory[end - MARK : end] = mark
            ends.append((rank, end))

    def check() -> None:
        short = [rank for rank, end in ends if memory[end - MARK : end] == mark]
        if short:
            raise MoECommError(
                f"{what} from {', '.join(f'rank {rank}' for rank in short)} of the group came in a shorter message than this rank's; "
                "dtype and width must be the same on every rank"
            )

    return check


def dispatch_fake(x: Tensor, order: Tensor, k: int, splits: Tensor | None, received: int, group: str) -> Tensor:
    return x.new_empty(received, x.shape[1])


def _dispatched() -> str:
    return "the gradients of combine, or the tokens of a dispatch that is repeated" if in_backward() else "the tokens of dispatch"


def dispatch_cpu(x: Tensor, order: Tensor, k: int, splits: Tensor | None, received: int, group: str) -> Tensor:
    return start(gather_rows_cpu(x, order, k), received, splits, 0, group, _dispatched())


def dispatch_triton(x: Tensor, order: Tensor, k: int, splits: Tensor | None, received: int, group: str) -> Tensor:
    return start(gather_rows_triton(x, order, k), received, splits, 0, group, _dispatched())


def combine_fake(
    rows: Tensor, weights: Tensor | None, order: Tensor, position: Tensor, splits: Tensor | None, pairs: int, group: str
) -> Tensor:
    return rows.new_empty(pairs, rows.shape[1])


def _combined(weights: Tensor | None) -> str:
    return "the gradients of dispatch" if weights is None else "the experts' rows of combine"


def combine_cpu(
    rows: Tensor, weights: Tensor | None, order: Tensor, position: Tensor, splits: Tensor | None, pairs: int, group: str
) -> Tensor:
    return start(weighted_sum_cpu(rows, weights, order, position), pairs, splits, 1, group, _combined(weights))


def combine_triton(
    rows: Tensor, weights: Tensor | None, order: Tensor, position: Tensor, splits: Tensor | None, pairs: int, group: str
) -> Tensor:
    return start(weighted_sum_triton(rows, weights, order, position), pairs, splits, 1, group, _combined(weights))


def return_fake(rows: Tensor, splits: Tensor | None, pairs: int, group: str) -> Tensor:
    return rows.new_empty(pairs, rows.shape[1])


def return_rows(rows: Tensor, splits: Tensor | None, pairs: int, group: str) -> Tensor:
    return start(rows.clone(memory_format=torch.contiguous_format), pairs, splits, 1, group, "the gradients of plan's weights")


dispatch_exchange = define_start(DISPATCH, dispatch_fake, dispatch_cpu, dispatch_triton)
combine_exchange = define_start(COMBINE, combine_fake, combine_cpu, combine_triton)
return_exchange = define_start(RETURN, return_fake, return_rows, return_rows)
