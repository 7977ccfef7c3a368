"""The signature: what the ranks of a group must pass alike, as numbers in the small message that begins a function.

Every function whose host reads before it sends begins with one all-to-all of rows of this width. If ranks call different
functions, or the same one with different arguments, all of them see it in this message. They all raise the same error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from moecomm.errors import ExpertIdError, MoECommError

PAIRS, SLOTS, LOWEST, HIGHEST, TOKENS, NOT_FINITE, SIGNATURE = range(7)  # the columns of a message; the signature has the remaining ones
FUNCTIONS = ("plan", "plan with max_rows", "sync_params_", "sync_replicas_", "dispatch", "combine", "dispatch_quantized", "move_experts_")
SIGNED = (  # the meaning of a signature's numbers
    "function", "k", "num_experts", "weights.dtype", "like's elements a token", "like.dtype", "like's other tensors", "placement",
    "max_rows", "requires_grad", "check",
)  # fmt: skip
WIDTH = SIGNATURE + len(SIGNED)
ROOM = 1024  # words after the signature: a plan's slots, if they are few (slots_with_counts.py)
LENGTH = WIDTH + ROOM
DTYPES = tuple(sorted((d for d in vars(torch).values() if isinstance(d, torch.dtype)), key=str))
GRADIENTS = ("of neither weights nor like", "of weights", "of like", "of weights and like")
CHECKS = (False, True, "True in traced code")  # traced by torch.compile or make_fx: later calls are not compared, so fewer messages
REFUSES = " with arguments that it refuses"  # the index of such a call is larger by len(FUNCTIONS)
MODULUS = 2**31 - 1  # of checksums: a compiled graph may compute them in int64, from symbolic sizes


def signature(
    experts: Tensor,
    weights: Tensor,
    num_experts: int,
    like: Sequence[Tensor] = (),
    placement: int = -1,
    max_rows: int | None = None,
    check: bool = False,
) -> list[int]:
    """The values on which the ranks must agree, in the order of `SIGNED`.

    The placement, and the tensors of like from the second on, appear as checksums.
    """
    elements, dtype = (math.prod(like[0].shape[1:]), DTYPES.index(like[0].dtype)) if like else (-1, -1)
    others = -1
    for leaf in like[1:]:  # arithmetic only, because a size may be symbolic
        others = (
            (others + 2) * 1000003
            + (math.prod(leaf.shape[1:]) * 2 + int(leaf.requires_grad and torch.is_grad_enabled())) * len(DTYPES)
            + DTYPES.index(leaf.dtype)
        ) % MODULUS
    gradients = 0  # a rank without gradients skips the exchanges of the other ranks' backward pass
    if torch.is_grad_enabled():
        gradients = int(weights.requires_grad) + 2 * any(leaf.requires_grad for leaf in like)
    static = -1 if max_rows is None else max_rows
    function = FUNCTIONS.index("plan" if max_rows is None else "plan with max_rows")
    checks = (2 if traced() else 1) if check else 0
    tensors = [experts.shape[1], num_experts, DTYPES.index(weights.dtype), elements, dtype, others]
    return [function, *tensors, placement, static, gradients, checks]


def traced() -> bool:
    """Whether torch.compile or `make_fx` makes a graph of this code.

    Traced code does not compare later calls: the host would have to read numbers.
    """
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def check_agreed(messages: list[list[int]], signed: Sequence[str] = SIGNED) -> None:
    """Raise if the ranks' signatures differ. Every rank has all messages, so every rank raises the same error."""
    end = SIGNATURE + len(signed)
    if all(message[SIGNATURE:end] == messages[0][SIGNATURE:end] for message in messages):
        return
    for column, what in enumerate(signed, SIGNATURE):
        values = [message[column] for message in messages]
        if len(set(values)) > 1:
            passed = ", ".join(f"{_readable(what, value)} on rank {rank}" for rank, value in enumerate(values))
            raise MoECommError(f"{what} was {passed} of the group; it must be the same on every rank")


def check_routing(messages: list[list[int]], most: int | None) -> None:
    """Raise, alike on every rank, if the ranks' arguments do not fit together.

    The cases: signatures differ, an id is out of range, a weight is not finite, or there are more than ``most`` slots.
    Ids that seem to be a map are legal: they give a warning.
    """
    check_agreed(messages)
    k, num_experts = (messages[0][SIGNATURE + SIGNED.index(what)] for what in ("k", "num_experts"))
    wrong = [(rank, m) for rank, m in enumerate(messages) if m[LOWEST] < -1 or m[HIGHEST] >= num_experts]
    if wrong:
        where = ", ".join(f"between {m[LOWEST]} and {m[HIGHEST]} on rank {rank}" for rank, m in wrong)
        instead = _id_instead(min(m[LOWEST] for m in messages), max(m[HIGHEST] for m in messages), num_experts, len(messages))
        raise ExpertIdError(f"experts was {where} of the group; ids must be in [-1, num_experts) = [-1, {num_experts}){instead}")
    wrong = [(rank, m) for rank, m in enumerate(messages) if m[NOT_FINITE]]
    if wrong:
        where = ", ".join(f"NaN or infinite in {m[NOT_FINITE]} slots on rank {rank}" for rank, m in wrong)
        raise MoECommError(f"weights was {where} of the group; with check=True it must be finite")
    if k == num_experts > 2 and {(m[LOWEST], m[HIGHEST]) for m in messages if m[TOKENS]} == {(0, 1)}:
        warnings.warn(
            f"experts was 0 or 1 in all {k} slots of all tokens; it must be ids, not a map [T, E]. "
            "Of a map with k experts a token take the ids: experts.topk(k).indices",
            stacklevel=2,
        )
    # An upper bound on every rank's T * K sent and R * K received; all ranks know this sum.
    slots = sum(message[TOKENS] for message in messages) * k
    if most is not None and slots > most:
        shapes = ", ".join(f"[{message[TOKENS]}, {k}] on rank {rank}" for rank, message in enumerate(messages))
        raise MoECommError(
            f"experts was of shape {shapes} of the group, {slots} slots; together it must be at most {most}, as int32 indices number them"
        )


def _id_instead(lowest: int, highest: int, num_experts: int, ranks: int) -> str:
    if lowest >= -1 and highest == num_experts:
        return ". Ids count from 0, and a slot without an expert is -1: experts.masked_fill(experts == num_experts, -1)"
    if lowest >= -1 and highest < num_experts * ranks:
        return f". Count the experts of all ranks: num_experts={num_experts * ranks}"
    return ". Mark a slot without an expert with -1: experts.clamp(min=-1)" if highest < num_experts else ""


def _readable(what: str, value: int) -> object:
    if what == "function":
        refused, function = divmod(value, len(FUNCTIONS))
        return FUNCTIONS[function] + (REFUSES if refused else "") if 0 <= refused <= 1 else f"one that is not known, {value},"
    if what == "check":
        return CHECKS[value]
    if what == "requires_grad":
        return GRADIENTS[value]
    if value < 0:
        return "not given"
    if what in ("placement", "like's other tensors"):
        return f"of checksum {value:08x}"
    return DTYPES[value] if what.endswith("dtype") else value
