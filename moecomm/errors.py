"""The errors moecomm raises, in one voice: the argument, what came, what must come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch.autograd import forward_ad
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


def check_slots(experts: torch.Tensor, most: int) -> None:
    """Raise unless int32 indices can number the slots of this rank's tokens."""
    if guard_or_false(experts.numel() > most):
        wrong_value("experts", f"of shape {list(experts.shape)}", f"of at most {most} slots, as int32 indices number them")


def check_floating(argument: str, value: torch.Tensor) -> None:
    """Raise unless ``value`` has a floating dtype."""
    if not value.dtype.is_floating_point:
        wrong_type(argument, f"of dtype {value.dtype}", "of a floating dtype")


def check_reverse_mode(function: str, tensors: Iterable[object]) -> None:
    """Raise where `torch.func` or forward-mode differentiation would differentiate ``function``, which has a reverse mode alone.

    Torch itself says nothing where a custom op has no forward mode: the tangents are lost (2.13).
    """
    if torch.compiler.is_compiling():
        return
    must = "outside: torch.autograd.grad and backward differentiate it, as many times as you like"
    transforms = [interpreter.key().name for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    for transform in transforms:
        if transform in ("Grad", "Jvp"):
            raise NotImplementedError(f"{function} was called inside a {transform} transform of torch.func; it must be called {must}")
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(
                    f"{function} was called with a dual tensor of forward-mode differentiation; it must be called {must}"
                )


def differ(size: int, other: int) -> bool:
    """Whether two sizes differ. Where the compiler cannot know it yet they do not, and the graph asserts that when it runs."""
    if not torch.compiler.is_compiling() and isinstance(size, int) and isinstance(other, int):
        return size != other
    if guard_or_false(size != other):
        return True
    torch._check(size == other)
    return False
