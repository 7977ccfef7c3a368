"""define_start: an op that starts an exchange, and is known to Inductor as what it is. register: what it started, to be waited for.

Inductor orders kernels anew to save memory, by sizes that may differ from rank to rank. Torch's own collectives stay in the graph's order,
the same on every rank, and it knows no others (2.13). Exchanges that do not depend on each other, such as those of two layers side by
side, could start in another order on another rank, and all would wait for ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PythonCallbackWork

from moecomm.ops.base.library import define

STARTS: set[Any] = set()  # the ops that `define_start` defined


def define_start(schema: str, fake: Callable[..., Any], cpu: Callable[..., Any], cuda: Callable[..., Any]) -> Any:
    """`define` for an op whose result is a tensor that is waited for."""

    def traced(*args: Any) -> Any:
        # Inductor traces a graph before it lowers it; whoever does not use it need not import it.
        if "torch._inductor.lowering" in sys.modules:
            _lower_as_collective(op)
        return fake(*args)

    op = define(schema, traced, cpu, cuda)
    STARTS.add(op)
    return op


def register(pending: Tensor, work: dist.Work, what: str, group: dist.ProcessGroup, check: Callable[[], None] | None = None) -> None:
    """Let torch's ``wait_tensor`` wait for ``work``, which brings ``pending``: a note to its error says what was waited for, and by whom.

    That holds wherever it is waited for: by eager code, by autograd or by a compiled graph, which has no frame of moecomm's left.

    ``check`` looks at what came, and raises if it is not what was asked for.

    ``work`` keeps alive what is sent. It goes once it has been waited for, and moecomm then holds nothing of what was sent. The thread of
    gloo that ran it may, for about 5 ms more: it needs Python's GIL to let go of a tensor. So some layers need one send buffer more for a
    moment (K = 4 on 2 ranks: one layer in three has 51 MiB, rarely 59, the others 44). Nothing here frees memory that someone may hold.
    """
    direction = "backward" if in_backward() else "forward"  # the pass that started it

    def wait(_: object) -> bool:
        try:
            done = work.wait()
            if check is not None:
                check()
            return done
        except RuntimeError as error:
            rank = f"rank {group.rank()} of the {group.size()} of group {group.group_name!r}"
            error.add_note(f"moecomm: while waiting for {what} ({direction}), as {rank}")
            raise

    torch._C._distributed_c10d._register_work(pending, PythonCallbackWork(wait))


def in_backward() -> bool:
    """Whether autograd runs this: a backward, eager or compiled, or what a checkpoint computes again for one."""
    return torch._C._current_graph_task_id() != -1


def _lower_as_collective(op: Any) -> None:
    from torch._inductor.ir import TensorBox, _CollectiveKernel
    from torch._inductor.lowering import add_layout_constraint, constrain_to_fx_strides, lowerings, register_lowering

    if op in lowerings:
        return

    def lower(*args: Any) -> Any:
        return TensorBox.create(_CollectiveKernel.create_out_of_place(op, *args))  # type: ignore[arg-type] # one tensor, no list

    add_layout_constraint(op, constrain_to_fx_strides)
    register_lowering(op, type_promotion_kind=None)(lower)
