"""torch.export and AOTInductor: the one op whose results neither of them can write down, in a form that they can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moecomm.ops.routing.read_sizes import plan_sizes, read_sizes


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What to give ``ExportedProgram.run_decompositions``, so that a program with a plan in it can be saved and packaged.

    `plan` reads the sizes S, R and N as numbers. `torch.export.export` takes that; `torch.export.save` and
    `torch._inductor.aoti_compile_and_package` take no op that gives numbers (torch 2.13: "Unhandled output type SymInt", "Unsupported
    return type"). This puts a tensor of three numbers, and a read of each, in its place. A plan of `max_rows` has no such sizes, and
    needs this not at all.

    The program calls moecomm's ops: who loads it imports moecomm.functional first. It names its group as it was called where it was
    exported, so that the ranks which load it need a group of that name, and then one package serves all of them.

    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x, experts, weights):
    ...         a_plan = mf.plan(experts, weights, num_experts=4)
    ...         return mf.combine(mf.dispatch(x, a_plan).relu(), a_plan)
    >>> tokens = torch.export.Dim("tokens")
    >>> given = torch.randn(6, 8), torch.randint(4, (6, 2)), torch.rand(6, 2)
    >>> program = torch.export.export(Layer(), given, dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}))
    >>> program = program.run_decompositions(decompositions())
    >>> others = torch.randn(9, 8), torch.randint(4, (9, 2)), torch.rand(9, 2)
    >>> torch.equal(program.module()(*others), Layer()(*others))
    True
    """
    return {plan_sizes: _plan_sizes}


def _plan_sizes(sent: Tensor, received: Tensor) -> tuple[Any, Any, Any, Tensor, Tensor]:
    sizes, splits, few = read_sizes(sent, received)
    pairs_sent, pairs_received, rows = (number.item() for number in sizes.unbind())
    for size in (pairs_sent, pairs_received, rows):
        torch._check(size >= 0)
    return pairs_sent, pairs_received, rows, splits, few
