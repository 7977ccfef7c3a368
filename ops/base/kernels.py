"""Triton, if the platform has it: how a kernel is declared, and how a compiled one is launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.runtime.jit import JITFunction
except ImportError:  # this platform has no Triton; CPU tensors never need it
    triton = tl = knobs = JITFunction = None


def jit(kernel: Callable[..., Any] | None = None, *, varies: Sequence[str] = ()) -> Any:
    """``triton.jit`` if Triton is there. Without Triton it returns the kernel unchanged; such a kernel is never launched.

    ``varies`` names the integer arguments that differ from call to call, such as T. Triton compiles a kernel again for an
    argument that is 1, and for one that is a multiple of 16. Two such arguments give up to nine kernels, compiled in the middle
    of a training. Leave out arguments that stay constant, such as D, and those along which a kernel loads.
    """
    if kernel is None:
        return partial(jit, varies=varies)
    if triton is None:
        return kernel
    made = triton.jit(kernel, do_not_specialize=varies)
    return Kernel(made) if isinstance(made, JITFunction) and torch.version.hip is None else made  # else Triton's interpreter


def inlined(function: Callable[..., Any]) -> Any:
    """``triton.jit`` of a function that kernels call."""
    return function if triton is None else triton.jit(function)


class Kernel:
    """A kernel that finds what Triton compiled for its arguments by their dtypes, alignment and constants.

    A launch takes 22 us of host time with Triton's own search, and 6 without any (Triton 3.6). What Triton compiles depends on no property
    that is not in the key. AMD's backend looks at a tensor's size as well: there Triton searches.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.constants = tuple(parameter.name for parameter in kernel.params if parameter.is_constexpr)  # they come last
        self.compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
        device = args[0].get_device()
        if device < 0 or _hooked():
            return self.kernel[grid](*args, **constants)
        key = (device, *map(_kind, args), *constants.items())
        found = self.compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*args, **constants)
            self.compiled[key] = compiled, tuple(constants[name] for name in self.constants)
            return compiled
        compiled, values = found
        x, y = grid if len(grid) == 2 else (grid[0], 1)
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(x, y, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *values)
        return compiled


def _kind(arg: Any) -> Any:
    """The properties of an argument for which Triton compiles a kernel of its own."""
    if type(arg) is int:
        return (1 if arg == 1 else 2 if arg % 16 == 0 else 3) if -(2**31) <= arg < 2**31 else (4 if arg % 16 == 0 else 5, arg < 2**63)
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if type(arg) is tuple:
        return tuple(map(_kind, arg))
    return type(arg), arg


def _hooked() -> bool:
    """Whether a profiler of Triton's wants to see each launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
