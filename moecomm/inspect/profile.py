"""Names for the steps of a layer in the traces of torch.profiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def profiled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make a running profiler record the function's time as ``moecomm.<its name>``.

    Without a running profiler the cost is the check of one flag. Compiled code has no such ranges, because Inductor drops them
    (torch 2.13). There, and in the backward pass, the ops' own names tell the steps apart, such as
    ``moecomm::dispatch_exchange``.
    """
    name = f"moecomm.{function.__name__}"

    @functools.wraps(function)
    def named(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
            return function(*args, **kwargs)
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return named
