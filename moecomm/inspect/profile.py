"""Names in torch.profiler's traces for the steps of a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def profiled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function, whose time a running profiler records as that of ``moecomm.<its name>``; a check of a flag where none runs.

    Compiled code has no ranges, for Inductor drops them (torch 2.13): there the ops' own names, ``moecomm::dispatch_exchange`` and so
    on, tell the steps apart, as they do in the backward pass.
    """
    name = f"moecomm.{function.__name__}"

    @functools.wraps(function)
    def named(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
            return function(*args, **kwargs)
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return named
