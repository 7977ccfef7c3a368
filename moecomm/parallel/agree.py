"""What the ranks of a group must have passed alike, compared by checksums before anything else is sent: tensors, placements, calls."""

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
from moecomm.ops.base.signature import FUNCTIONS, LENGTH, SIGNATURE, SIGNED, WIDTH, check_agreed, traced
from moecomm.ops.exchange.collectives import wait
from moecomm.ops.exchange.messages import gather_objects, messages_exchange, send_without_waiting
from moecomm.ops.routing.read_sizes import read_list
from moecomm.parallel.group import Group

Result = TypeVar("Result")


def exchange_messages(sent: Tensor, group: Group, what: str, few: Tensor | None = None) -> Tensor:
    """The message of each rank for this one, [P, LENGTH], in a group of one [1, WIDTH]; an error says that ``what`` was waited for."""
    return sent if group.size == 1 else wait(messages_exchange(sent, few, what, group.name))


def checksums(function: str, passed: object, device: torch.device, group: Group) -> list[int]:
    """Of what each rank passed, by its repr: one small exchange, read by the host. Raises where a rank called another function."""
    mine = [0] * SIGNATURE + [FUNCTIONS.index(function), zlib.crc32(repr(passed).encode())]
    sent = torch.tensor([mine + [0] * (WIDTH - len(mine))], device=device).repeat(group.size, 1)  # [P, WIDTH]
    messages = read_list(exchange_messages(sent, group, f"what the ranks passed to {function}")[:, :WIDTH])
    check_agreed(messages, SIGNED[:1])
    return [message[SIGNATURE + 1] for message in messages]


def tell_refusal(function: str, passed: object, group: Group) -> None:
    """Send the others, in place of the message of ``function`` that they wait for, that this rank refuses its arguments: they raise, too.

    It is not waited for: this rank's own error comes at once, wherever the others are. Torch keeps the message until they have it. It goes
    from the first device of the tensors in ``passed`` that the group sends from; where there is none, nothing is sent.
    """
    if group.size == 1 or traced():
        return
    for device in dict.fromkeys(leaf.device for leaf in tree_leaves(passed) if isinstance(leaf, Tensor) and not leaf.is_meta):
        try:
            messages = torch.zeros(group.size, LENGTH, dtype=torch.int64, device=device)
            messages[:, SIGNATURE] = FUNCTIONS.index(function) + len(FUNCTIONS)
            send_without_waiting(messages, group.name)
            return
        except RuntimeError:  # not a device of this group's, or a group that is broken: what counts is the rank's own error
            continue


def _gathered(passed: object, group: Group) -> list[Any]:
    with temporarily_clear_interpreter_stack():  # of torch.func, in whose transforms torch cannot read what it gathered (2.13)
        return gather_objects(passed, group.size, group.name)


def check_same_kind(function: str, tensors: Sequence[Tensor], group: Group) -> None:
    """Raise, alike on every rank, where the ranks' tensors differ in number, dtype or shape."""
    mine = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors]
    if len(set(checksums(function, mine, tensors[0].device, group))) > 1:
        ranks = _gathered(mine, group)
        at = next(i for i, what in enumerate(zip_longest(*ranks)) if len(set(what)) > 1)
        passed = ", ".join(f"{theirs[at] if at < len(theirs) else 'missing'} on rank {rank}" for rank, theirs in enumerate(ranks))
        raise MoECommError(f"params' tensor {at} was {passed} of the group; it must be of the same dtype and shape on every rank")


def check_same_placement(function: str, rows: list[list[int]], device: torch.device, group: Group) -> None:
    """Raise, alike on every rank, where the ranks' placements differ."""
    every = checksums(function, rows, device, group)
    if len(set(every)) > 1:
        passed = ", ".join(f"of checksum {value:08x} on rank {rank}" for rank, value in enumerate(every))
        raise MoECommError(f"placement was {passed} of the group; it must be the same on every rank")


def ticket(device: torch.device, group: Group) -> int:
    """A number that all ranks have alike and, but for chance, no other plan has: one small exchange, read by the host."""
    if group.size == 1 or traced():
        return 0
    return zlib.crc32(repr(checksums("plan", time.time_ns(), device, group)).encode()) or 1


def check_same_call(
    function: str, ticket: int, passed: dict[str, object], check: Callable[[], Result], device: torch.device, group: Group
) -> Result:
    """What ``check`` makes of what this rank passed, where the others found theirs right, and passed the same for the plan of ``ticket``.

    An error of one rank's own ``check`` alone would let the exchanges of the others wait for it; here it is raised on every rank.
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
    return result  # type: ignore[return-value] # where there is no error, there is a result
