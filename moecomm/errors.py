"""The errors moecomm raises, in one voice: the argument, what came, what must come."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


class MoECommError(RuntimeError):
    """What the ranks of a group passed does not fit together; raised alike on every rank of the group."""


class ExpertIdError(MoECommError, ValueError):
    """Expert ids outside [-1, num_experts) on some rank; raised alike on every rank of the group."""


def wrong_value(argument: str, was: object, must: str) -> NoReturn:
    """Raise the ValueError that every function of moecomm raises for a bad value."""
    raise ValueError(f"{argument} was {was}; it must be {must}")


def wrong_type(argument: str, was: object, must: str) -> NoReturn:
    """Raise the TypeError that every function of moecomm raises for a bad type or dtype."""
    raise TypeError(f"{argument} was {was}; it must be {must}")


def check_tensor(argument: str, value: object, shape: str, dims: int | None = None) -> None:
    """Raise unless ``value`` is a tensor (of ``dims`` dimensions, where given); ``shape`` describes it for the message."""
    if not isinstance(value, torch.Tensor):
        wrong_type(argument, type(value).__name__, f"a tensor {shape}")
    if dims is not None and value.dim() != dims:
        wrong_value(argument, f"of shape {list(value.shape)}", f"of shape {shape}")


def check_experts(experts: torch.Tensor) -> None:
    """Raise unless ``experts`` is [T, K], of an integer dtype that torch computes in."""
    check_tensor("experts", experts, "[T, K]", dims=2)
    if experts.dtype not in INTEGERS:
        wrong_type("experts", f"of dtype {experts.dtype}", "of dtype int8, int16, int32, int64 or uint8")


def check_floating(argument: str, value: torch.Tensor) -> None:
    """Raise unless ``value`` has a floating dtype."""
    if not value.dtype.is_floating_point:
        wrong_type(argument, f"of dtype {value.dtype}", "of a floating dtype")


def differ(size: int, other: int) -> bool:
    """Whether two sizes differ. Where the compiler cannot know it yet they do not, and the graph asserts that when it runs."""
    if guard_or_false(size != other):
        return True
    torch._check(size == other)
    return False
