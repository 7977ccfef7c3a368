"""Plan: who gets which token, as plain data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Plan(NamedTuple):
    """What `plan` gives and `dispatch` and `combine` follow: tensors, ints and the group's name; a pytree, and nothing else.

    T tokens of this rank, K slots a token, S (token, rank) pairs sent, R pairs received, N rows computed here, L local experts, P ranks.

    >>> a_plan = plan(torch.tensor([[1, 0], [1, -1]]), torch.ones(2, 2), num_experts=2)
    >>> a_plan.row_order  # expert 0 has the second slot of token 0, expert 1 the first slots of both
    tensor([1, 0, 2], dtype=torch.int32)
    >>> a_plan.row_position
    tensor([[ 1,  0],
            [ 2, -1]], dtype=torch.int32)
    """

    offsets: Tensor  # [L] int32: the rows of local expert e end before row offsets[e]; what grouped_mm calls offs
    weights: Tensor  # [R, K]: the weights of the received pairs' slots; they carry the gradient home
    row_order: Tensor  # [N] int32: row n is slot row_order[n] % K of received pair row_order[n] // K
    row_position: Tensor  # [R, K] int32: the row of each slot, -1 where the slot's expert is elsewhere; the inverse of row_order
    send_order: Tensor | None  # [S] int32: sent pair s is token send_order[s] // K; None in a group of one
    send_position: Tensor | None  # [T, K] int32: the sent pair that a slot opens, or -1; the inverse of send_order
    splits: Tensor | None  # [2, P] int64 on the CPU: pairs to each rank, pairs from each rank; None in static mode: max_rows for each
    tokens: int  # T
    num_experts: int  # E
    group: str  # the group's name, "" for a single process
    layout: Tensor | None = None  # [T of all ranks, 0, ...]: a DTensor, how combine's y is placed; None where no argument was a DTensor
    dropped: Tensor | None = None  # [] int32: this rank's slots of an expert for which static mode had no row; None without max_rows
    ticket: int = 0  # with check=True a number that all ranks have alike, by which dispatch and combine tell plans apart; else 0
