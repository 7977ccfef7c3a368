"""What the ranks of a group must pass alike, as numbers: a part of the small message with which a function begins.

Every function whose host reads before it sends begins with one all-to-all of rows of this width. So ranks that call different ones of
them, or one with different arguments, all see it in that message, and raise the same error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from moecomm.errors import ExpertIdError, MoECommError

PAIRS, SLOTS, LOWEST, HIGHEST, TOKENS, NOT_FINITE, SIGNATURE = range(7)  # the columns of a message; the signature takes the rest
FUNCTIONS = ("plan", "plan with max_rows", "sync_params_", "sync_replicas_", "dispatch", "combine", "dispatch_quantized")
SIGNED = (  # what the numbers of a signature mean
    "function", "k", "num_experts", "weights.dtype", "like's elements a token", "like.dtype", "like's other tensors", "placement",
    "max_rows", "requires_grad", "check",
)  # fmt: skip
WIDTH = SIGNATURE + len(SIGNED)
ROOM = 1024  # words that follow: of the message of a plan, its slots, where they are few (slots_with_counts.py)
LENGTH = WIDTH + ROOM
DTYPES = tuple(sorted((d for d in vars(torch).values() if isinstance(d, torch.dtype)), key=str))
GRADIENTS = ("of neither weights nor like", "of weights", "of like", "of weights and like")
CHECKS = (False, True, "True in traced code")  # of torch.compile or make_fx: it compares no later calls, and so sends fewer messages
REFUSES = " with arguments that it refuses"  # FUNCTIONS' index of such a call is as many more as there are FUNCTIONS
MODULUS = 2**31 - 1  # of checksums: a compiled graph may compute them in int64, with sizes that it does not know


def signature(
    experts: Tensor,
    weights: Tensor,
    num_experts: int,
    like: Sequence[Tensor] = (),
    placement: int = -1,
    max_rows: int | None = None,
    check: bool = False,
) -> list[int]:
    """What the ranks must agree on, in the order of `SIGNED`; of the placement, and of like from its second tensor on, a checksum."""
    elements, dtype = (math.prod(like[0].shape[1:]), DTYPES.index(like[0].dtype)) if like else (-1, -1)
    others = -1
    for leaf in like[1:]:  # by arithmetic: a size may be symbolic
        others = (
            (others + 2) * 1000003
            + (math.prod(leaf.shape[1:]) * 2 + int(leaf.requires_grad and torch.is_grad_enabled())) * len(DTYPES)
            + DTYPES.index(leaf.dtype)
        ) % MODULUS
    gradients = 0  # where a rank has none, it takes no part in the exchanges of the others' backward pass
    if torch.is_grad_enabled():
        gradients = int(weights.requires_grad) + 2 * any(leaf.requires_grad for leaf in like)
    static = -1 if max_rows is None else max_rows
    function = FUNCTIONS.index("plan" if max_rows is None else "plan with max_rows")
    checks = (2 if traced() else 1) if check else 0
    tensors = [experts.shape[1], num_experts, DTYPES.index(weights.dtype), elements, dtype, others]
    return [function, *tensors, placement, static, gradients, checks]


def traced() -> bool:
    """Whether this makes a graph, by torch.compile or `make_fx`: later calls compare nothing there, for their host would read numbers."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def check_agreed(messages: list[list[int]], signed: Sequence[str] = SIGNED) -> None:
    """Raise, alike on every rank that has these messages of all ranks, where their signatures differ."""
    end = SIGNATURE + len(signed)
    if all(message[SIGNATURE:end] == messages[0][SIGNATURE:end] for message in messages):
        return
    for column, what in enumerate(signed, SIGNATURE):
        values = [message[column] for message in messages]
        if len(set(values)) > 1:
            passed = ", ".join(f"{_readable(what, value)} on rank {rank}" for rank, value in enumerate(values))
            raise MoECommError(f"{what} was {passed} of the group; it must be the same on every rank")


def check_routing(messages: list[list[int]], most: int | None) -> None:
    """Raise, alike on every rank, where their signatures differ, an id is out of range, a weight not finite, or slots are over ``most``."""
    check_agreed(messages)
    k, num_experts = (messages[0][SIGNATURE + SIGNED.index(what)] for what in ("k", "num_experts"))
    wrong = [(rank, m) for rank, m in enumerate(messages) if m[LOWEST] < -1 or m[HIGHEST] >= num_experts]
    if wrong:
        where = ", ".join(f"between {m[LOWEST]} and {m[HIGHEST]} on rank {rank}" for rank, m in wrong)
        raise ExpertIdError(f"experts was {where} of the group; ids must be in [-1, num_experts) = [-1, {num_experts})")
    wrong = [(rank, m) for rank, m in enumerate(messages) if m[NOT_FINITE]]
    if wrong:
        where = ", ".join(f"NaN or infinite in {m[NOT_FINITE]} slots on rank {rank}" for rank, m in wrong)
        raise MoECommError(f"weights was {where} of the group; with check=True it must be finite")
    slots = sum(message[TOKENS] for message in messages) * k  # no rank has more, T * K sent or R * K received, and all know this sum
    if most is not None and slots > most:
        shapes = ", ".join(f"[{message[TOKENS]}, {k}] on rank {rank}" for rank, message in enumerate(messages))
        raise MoECommError(
            f"experts was of shape {shapes} of the group, {slots} slots; together it must be at most {most}, as int32 indices number them"
        )


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
