"""Checks that all ranks of a group passed the same tensors, placements or calls: they compare checksums before they send anything else."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_leaves

from moecomm.errors import MoECommError
from moecomm.ops.base.library import call
from moecomm.ops.base.signature import FUNCTIONS, LENGTH, SIGNATURE, SIGNED, WIDTH, check_agreed, traced
from moecomm.ops.exchange.collectives import wait
from moecomm.ops.exchange.messages import gather_objects, messages_exchange, send_without_waiting
from moecomm.ops.routing.read_sizes import read_list
from moecomm.parallel.group import Group

Result = TypeVar("Result")


def exchange_messages(sent: Tensor, group: Group, what: str, few: Tensor | None = None) -> Tensor:
    """Exchange one small message with each rank: [P, LENGTH], where row p is the message of rank p.

    In a group of one it returns ``sent`` [1, WIDTH]. If the exchange fails, the error says that the
    rank waited for ``what``.
    """
    return sent if group.size == 1 else wait(call(messages_exchange, sent, few, what, group.name))


def checksums(function: str, passed: object, device: torch.device, group: Group) -> list[int]:
    """The checksum of the repr of what each rank passed, one int per rank, on every rank.

    Raises MoECommError, the same on every rank, if a rank called another function. Costs one small
    exchange and one host synchronization.
    """
    mine = [0] * SIGNATURE + [FUNCTIONS.index(function), zlib.crc32(repr(passed).encode())]
    sent = torch.tensor([mine + [0] * (WIDTH - len(mine))], device=device).repeat(group.size, 1)  # [P, WIDTH]
    messages = read_list(exchange_messages(sent, group, f"what the ranks passed to {function}")[:, :WIDTH])
    check_agreed(messages, SIGNED[:1])
    return [message[SIGNATURE + 1] for message in messages]


def tell_refusal(function: str, passed: object, group: Group) -> None:
    """Tell the other ranks that this rank refuses its arguments, so that they raise too.

    The message takes the place of the message of ``function`` that the others wait for. This rank
    does not wait for the others: it raises its own error at once. Torch keeps the message until the
    others have received it.

    The message is sent from a device of the tensors in ``passed``: the first from which the group
    can send. If there is no such device, nothing is sent. In a group of one and in traced code,
    nothing is sent either.
    """
    if group.size == 1 or traced():
        return
    for device in dict.fromkeys(leaf.device for leaf in tree_leaves(passed) if isinstance(leaf, Tensor) and not leaf.is_meta):
        try:
            messages = torch.zeros(group.size, LENGTH, dtype=torch.int64, device=device)
            messages[:, SIGNATURE] = FUNCTIONS.index(function) + len(FUNCTIONS)
            send_without_waiting(messages, group.name)
            return
        except RuntimeError:  # the group cannot send from this device, or is broken; the caller raises this rank's own error
            continue


def _gathered(passed: object, group: Group) -> list[Any]:
    with temporarily_clear_interpreter_stack():  # inside a torch.func transform, torch 2.13 cannot read what it gathered
        return gather_objects(passed, group.size, group.name)


def check_same_kind(function: str, tensors: Sequence[Tensor], group: Group) -> None:
    """Raise the same error on every rank if the ranks' tensors differ in number, dtype or shape."""
    mine = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors]
    if len(set(checksums(function, mine, tensors[0].device, group))) > 1:
        ranks = _gathered(mine, group)
        at = next(i for i, what in enumerate(zip_longest(*ranks)) if len(set(what)) > 1)
        passed = ", ".join(f"{theirs[at] if at < len(theirs) else 'missing'} on rank {rank}" for rank, theirs in enumerate(ranks))
        raise MoECommError(f"params' tensor {at} was {passed} of the group; it must be of the same dtype and shape on every rank")


def check_same_placement(function: str, rows: list[list[int]], device: torch.device, group: Group, argument: str = "placement") -> None:
    """Raise the same error on every rank if the ranks' placements differ."""
    every = checksums(function, rows, device, group)
    if len(set(every)) > 1:
        passed = ", ".join(f"of checksum {value:08x} on rank {rank}" for rank, value in enumerate(every))
        raise MoECommError(f"{argument} was {passed} of the group; it must be the same on every rank")


def least(function: str, number: int, device: torch.device, group: Group) -> int:
    """The least of the ranks' numbers, on every rank. Costs one small exchange and one host synchronization."""
    sent = torch.tensor([[0] * SIGNATURE + [FUNCTIONS.index(function), number] + [0] * (WIDTH - SIGNATURE - 2)], device=device)
    messages = read_list(exchange_messages(sent.repeat(group.size, 1), group, f"what the ranks told {function}")[:, :WIDTH])
    check_agreed(messages, SIGNED[:1])
    return min(message[SIGNATURE + 1] for message in messages)


def ticket(device: torch.device, group: Group) -> int:
    """A number for one plan: the same on all ranks, and different for each plan except by chance.

    Costs one small exchange and one host synchronization. In a group of one and in traced code it
    is 0 and costs nothing.
    """
    if group.size == 1 or traced():
        return 0
    return zlib.crc32(repr(checksums("plan", time.time_ns(), device, group)).encode()) or 1


def check_same_call(
    function: str, ticket: int, passed: dict[str, object], check: Callable[[], Result], device: torch.device, group: Group
) -> Result:
    """Return ``check()`` if it succeeds on every rank and all ranks passed the same for the plan of ``ticket``.

    Otherwise every rank raises. If only the rank whose ``check`` fails raised, the others would
    wait for it in their exchanges.

    Raises:
        MoECommError: the ranks differ, or ``check`` fails on some of them only.
        NotImplementedError, TypeError, ValueError: ``check`` raises the same error on every rank.
    """
    error = result = None
    try:
        result = check()
    except (NotImplementedError, TypeError, ValueError) as raised:
        error = raised
    mine = {"plan": f"number {ticket}", "what was passed": "as it must be" if error is None else f"refused ({error})", **passed}
    if len(set(checksums(function, mine, device, group))) > 1:
        ranks = _gathered(mine, group)
        what = next(what for each in ranks for what in each if len({other.get(what) for other in ranks}) > 1)
        theirs = ", ".join(f"{each.get(what, 'missing')} on rank {rank}" for rank, each in enumerate(ranks))
        raise MoECommError(f"{what} was {theirs} of the group; {function} must be called alike on every rank") from error
    if error is not None:
        raise error
    return result  # type: ignore[return-value] # without an error there is a result
