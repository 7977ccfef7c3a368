"""The errors of moecomm. Each names the argument, its value, the value that it must have and, if that is known, what to write instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import guard_or_false

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
SUMMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what moecomm computes in
BITS = ("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")  # a later torch may lack these
MOVED = (  # what moecomm sends, without computing
    *SUMMED, *INTEGERS, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex32, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
    *(getattr(torch, name) for name in BITS if hasattr(torch, name)),
)  # fmt: skip
LISTED = "float64, float32, bfloat16 or float16"


class MoECommError(RuntimeError):
    """The ranks of a group passed arguments that do not fit together. Raised alike on every rank of the group."""


class ExpertIdError(MoECommError, ValueError):
    """An expert id is outside [-1, num_experts) on some rank. Raised alike on every rank of the group."""


def wrong_value(argument: str, was: object, must: str, instead: str = "") -> NoReturn:
    """Raise the ValueError that all functions of moecomm raise for a wrong value.

    ``instead`` is a sentence with what to write instead. It ends with code, in the names of the caller's arguments.
    """
    raise ValueError(_message(argument, was, must, instead))


def wrong_type(argument: str, was: object, must: str, instead: str = "") -> NoReturn:
    """Raise the TypeError that all functions of moecomm raise for a wrong type or dtype. ``instead``: see `wrong_value`."""
    raise TypeError(_message(argument, was, must, instead))


def _message(argument: str, was: object, must: str, instead: str) -> str:
    return f"{argument} was {was}; it must be {must}{'. ' if instead else ''}{instead}"


def check_tensor(argument: str, value: object, shape: str, dims: int | None = None) -> None:
    """Raise unless ``value`` is a tensor, with ``dims`` dimensions if given. ``shape`` is the text for the message."""
    if not isinstance(value, torch.Tensor):
        wrong_type(argument, type(value).__name__, f"a tensor {shape}", _tensor_instead(argument, value))
    if dims is not None and value.dim() != dims:
        wrong_value(argument, f"of shape {list(value.shape)}", f"of shape {shape}", _shape_instead(argument, value.dim(), shape))


def _tensor_instead(argument: str, value: object) -> str:
    if isinstance(value, tuple) and any(isinstance(part, torch.Tensor) for part in value):
        return "Unpack what route returns: weights, experts = mf.route(logits, k)"
    if isinstance(value, list | tuple) or hasattr(value, "__array__"):
        return f"Make it a tensor: torch.as_tensor({argument})"
    return ""


def _shape_instead(argument: str, dims: int, shape: str) -> str:
    if not shape.startswith("[T, ") or dims == 0:
        return ""
    if dims > 2:
        return f"Flatten the tokens first: {argument}.flatten(0, -2)"
    return f"For one {'expert a token' if shape == '[T, K]' else 'token'}: {argument}.unsqueeze({int(shape == '[T, K]')})"


def check_experts(experts: torch.Tensor, weights: object = None) -> None:
    """Raise unless ``experts`` is [T, K], with an integer dtype in which torch can compute. ``weights`` may be the ids by mistake."""
    check_tensor("experts", experts, "[T, K]", dims=2)
    if experts.dtype not in INTEGERS:
        instead = "Convert the ids: experts.long()"
        if experts.dtype == torch.bool:
            instead = "Of a map [T, E] with k experts a token take the ids: experts.int().topk(k).indices"
        elif isinstance(weights, torch.Tensor) and weights.dtype in INTEGERS:
            instead = "The ids come first: mf.plan(experts, weights, num_experts)"
        wrong_type("experts", f"of dtype {experts.dtype}", "of dtype int8, int16, int32, int64 or uint8", instead)


def check_int(argument: str, value: object, of_float: str = "") -> None:
    """Raise unless ``value`` is an int. ``of_float`` is what to write instead of a float, where int() of it is not meant."""
    if not isinstance(value, int) or isinstance(value, bool):
        wrong_type(argument, type(value).__name__, "an int", int_instead(argument, value, of_float))


def int_instead(argument: str, value: object, of_float: str = "") -> str:
    if isinstance(value, float) and of_float:
        return of_float
    if isinstance(value, float) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return f"Convert it: int({argument})"
    return f"Count them: len({argument})" if hasattr(value, "__len__") and not isinstance(value, str) else ""


def check_slots(experts: torch.Tensor, most: int) -> None:
    """Raise unless int32 indices can number the slots of this rank's tokens."""
    if guard_or_false(experts.numel() > most):
        wrong_value("experts", f"of shape {list(experts.shape)}", f"of at most {most} slots, as int32 indices number them")


def check_floating(argument: str, value: torch.Tensor, call: str = "") -> None:
    """Raise unless ``value`` has a floating dtype in which moecomm computes: float8 and float4 are only sent.

    ``call`` is the call, where ids may be in the place of ``value`` by mistake.
    """
    if value.dtype not in SUMMED:
        must = f"of dtype {LISTED}, to compute with" if value.dtype.is_floating_point else "of a floating dtype"
        instead = "" if value.is_complex() else f"Convert it: {argument}.float()"
        if call and value.dtype in INTEGERS:
            instead = f"The ids come second: {call}"
        wrong_type(argument, f"of dtype {value.dtype}", must, instead)


def check_sent(argument: str, value: torch.Tensor) -> None:
    """Raise if ``value`` has a dtype that is not sent: quantized tensors, and integers of less than a byte."""
    if value.dtype not in MOVED:
        wrong_type(argument, f"of dtype {value.dtype}", "of a dtype of whole bytes that is not quantized, or a view as uint8")


def check_gradient_summed(argument: str, value: torch.Tensor, complex: bool = True) -> None:
    """Raise if the gradient of ``value`` is a sum, in a dtype in which moecomm does not add up."""
    if value.requires_grad and torch.is_grad_enabled() and value.dtype not in SUMMED and not (complex and value.is_complex()):
        must = f"of dtype {LISTED}{', or complex' if complex else ''}, to require one"
        wrong_type(argument, f"of dtype {value.dtype} and requires a gradient", must)


def check_reverse_mode(function: str, tensors: Iterable[object]) -> None:
    """Raise if `torch.func` or forward-mode differentiation would differentiate ``function``: it only has a reverse mode.

    Torch itself raises nothing for a custom op without a forward mode: it loses the tangents (torch 2.13).
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
    """Whether two sizes differ.

    While the compiler cannot know it, the answer is False. The graph then asserts at run time that the sizes are equal.
    """
    if not torch.compiler.is_compiling() and isinstance(size, int) and isinstance(other, int):
        return size != other
    if guard_or_false(size != other):
        return True
    torch._check(size == other)
    return False
