"""decompositions: makes a program with a plan fit for torch.export.save and AOTInductor, which take no op that returns numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moecomm.ops.routing.read_sizes import plan_sizes, read_sizes


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions for ``ExportedProgram.run_decompositions``, so that a program with a plan can be saved and packaged.

    Returns:
        A dict with one entry, for the op that reads the sizes of a plan. It puts an op that returns
        a tensor of three numbers in its place, and a read of each number.

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

    `plan` reads the sizes S, R and N as numbers. `torch.export.export` accepts that.
    `torch.export.save` and `torch._inductor.aoti_compile_and_package` accept no op that returns
    numbers (torch 2.13: "Unhandled output type SymInt", "Unsupported return type"). A plan with
    `max_rows` has no such sizes and needs no decomposition.

    The program calls moecomm's ops: import moecomm.functional before you load it. It contains the
    name of its group from the export. Every rank that loads it needs a group of this name; one
    package then serves all ranks.
    """
    return {plan_sizes: _plan_sizes}


def _plan_sizes(sent: Tensor, received: Tensor) -> tuple[Any, Any, Any, Tensor, Tensor]:
    sizes, splits, few = read_sizes(sent, received)
    pairs_sent, pairs_received, rows = (number.item() for number in sizes.unbind())
    for size in (pairs_sent, pairs_received, rows):
        torch._check(size >= 0)
    return pairs_sent, pairs_received, rows, splits, few
