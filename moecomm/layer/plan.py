"""Plan: which rank gets which token, as plain data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Plan(NamedTuple):
    """The result of `plan`, which `dispatch` and `combine` follow: a pytree of tensors, ints and the group's name.

    Symbols: T tokens of this rank, K slots per token, S (token, rank) pairs sent, R pairs received, N rows computed here,
    L local experts, P ranks.

    Example:
        >>> a_plan = plan(torch.tensor([[1, 0], [1, -1]]), torch.ones(2, 2), num_experts=2)
        >>> a_plan.row_order  # expert 0 has the second slot of token 0, expert 1 the first slots of both
        tensor([1, 0, 2], dtype=torch.int32)
        >>> a_plan.row_position
        tensor([[ 1,  0],
                [ 2, -1]], dtype=torch.int32)
    """

    offsets: Tensor  # [L] int32: the rows of local expert e end before row offsets[e]; grouped_mm's argument offs
    weights: Tensor  # [R, K]: the weights of the received pairs' slots; their gradient goes back to the tokens' ranks
    row_order: Tensor  # [N] int32: row n is slot row_order[n] % K of received pair row_order[n] // K
    row_position: Tensor  # [R, K] int32: the row of each slot, -1 if its expert is on another rank; inverse of row_order
    send_order: Tensor | None  # [S] int32: sent pair s is token send_order[s] // K; None in a group of one
    send_position: Tensor | None  # [T, K] int32: the sent pair whose first slot this is, or -1; inverse of send_order
    splits: Tensor | None  # [2, P] int64 on the CPU: pairs to each rank, pairs from each; None in static mode (max_rows each)
    tokens: int  # T
    num_experts: int  # E
    group: str  # the group's name; "" for a single process
    layout: Tensor | None = None  # [T of all ranks, 0, ...]: a DTensor with the placements of combine's y; None without DTensors
    dropped: Tensor | None = None  # [] int32: this rank's slots that static mode dropped; None without max_rows
    dtype: int = -1  # the dtype in which combine sends rows that are one tensor: like's, as its index in errors.SUMMED; -1: their own
    ticket: int = 0  # with check=True: the plan's number, equal on all ranks, to tell plans apart; else 0
