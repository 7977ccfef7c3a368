"""How many kernels a layer launches on a GPU, forward and backward: at small sizes they are what its time goes by.

The ops' CUDA implementations run on tensors of the CPU here, their Triton kernels in Triton's interpreter. Each of them is counted where
it is launched, and so is each of torch's own ops that is a kernel on a GPU: all but those that allocate or view.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

import moecomm.functional as mf
from tests.spawn import run_ranks

# What allocates, views or waits on a stream, and launches nothing.
NO_KERNEL = {
    "empty", "new_empty", "empty_like", "view", "_unsafe_view", "select", "slice", "expand", "detach", "alias", "t", "unsqueeze",
    "split", "split_with_sizes", "as_strided", "resolve_conj", "resolve_neg", "wait_tensor",
}  # fmt: skip
HOST = {"plan_sizes"}  # one copy to the host, and what the host makes of it

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is off")


class _Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if op.namespace == "moecomm" and name not in HOST:
            if not op.has_kernel_for_dispatch_key(DispatchKey.CUDA):
                return op(*args, **(kwargs or {}))
            with self:
                return op.redispatch(DispatchKeySet(DispatchKey.CUDA), *args, **(kwargs or {}))
        with self:
            made = op.decompose(*args, **(kwargs or {}))  # what it is made of, where it is made of others
        if made is not NotImplemented:
            return made
        if name not in NO_KERNEL:
            self.names.append(name)
        return op(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of what is launched meanwhile."""
    run = interpreter.GridExecutor.__call__

    def counted(kernel: Any, *args: Any, **rest: Any) -> Any:
        mode.names.append(kernel.fn.__name__.strip("_"))
        with _disable_current_modes():  # what the interpreter does is no launch
            return run(kernel, *args, **rest)

    with patch.object(interpreter.GridExecutor, "__call__", counted), _Launches() as mode:
        yield mode.names


def layer_here(tokens: int, max_rows: int | None) -> str:
    """What this rank launches for the parts of a layer, a line each."""
    seed = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    x = torch.randn(tokens, 16, generator=seed).requires_grad_()
    experts, weights = torch.rand(tokens, 8, generator=seed).topk(2).indices, torch.rand(tokens, 2, generator=seed).requires_grad_()
    lines, made = [], {}

    def part(name: str, run: Callable[[], Any]) -> None:
        with launches() as names:
            made[name] = run()
        lines.append(textwrap.fill(f"{name}, {len(names)}: {' '.join(names)}", 120, subsequent_indent="    ") + "\n")

    part("plan", lambda: mf.plan(experts, weights, 8, like=x, max_rows=max_rows))
    part("dispatch", lambda: mf.dispatch(x, made["plan"]))
    part("combine", lambda: mf.combine(made["dispatch"], made["plan"]))
    grad = torch.ones_like(made["combine"])
    part("backward", lambda: torch.autograd.grad(made["combine"], (x, weights), grad))
    return "".join(lines)


def test_what_a_layer_of_one_process_launches() -> None:
    assert_expected_inline(
        layer_here(5, None),
        """\
plan, 4: histogram_kernel scan_kernel place_kernel plan_sizes
dispatch, 1: spread_kernel
combine, 1: weighted_sum_kernel
backward, 2: backward_kernel weighted_sum_kernel
""",
    )


def test_what_a_layer_of_one_process_launches_in_static_mode() -> None:
    assert_expected_inline(
        layer_here(5, 5),
        """\
plan, 3: histogram_kernel scan_kernel place_kernel
dispatch, 1: spread_kernel
combine, 1: weighted_sum_kernel
backward, 2: backward_kernel weighted_sum_kernel
""",
    )


@pytest.mark.slow
def test_what_a_rank_launches() -> None:
    of_ranks = run_ranks(layer_here, 2, 5, None, timeout=120)
    assert of_ranks[0] == of_ranks[1]
    assert_expected_inline(
        of_ranks[0],
        """\
plan, 17: count_kernel message_kernel histogram_kernel scan_kernel place_kernel zero_ pack_kernel copy_kernel cat
    alltoall_base_ plan_sizes clone copy_kernel unpack_kernel histogram_kernel scan_kernel place_kernel
dispatch, 3: gather_kernel alltoall_base_ spread_kernel
combine, 3: weighted_sum_kernel alltoall_base_ weighted_sum_kernel
backward, 10: gather_kernel alltoall_base_ backward_kernel weighted_sum_kernel alltoall_base_ weighted_sum_kernel zeros
    clone alltoall_base_ weighted_sum_kernel
""",
    )


@pytest.mark.slow
def test_what_a_rank_launches_in_static_mode() -> None:
    of_ranks = run_ranks(layer_here, 2, 5, 5, timeout=120)
    assert of_ranks[0] == of_ranks[1]
    assert_expected_inline(
        of_ranks[0],
        """\
plan, 12: count_kernel histogram_kernel scan_kernel place_kernel zero_ fit_kernel pack_kernel alltoall_base_
    unpack_kernel histogram_kernel scan_kernel place_kernel
dispatch, 3: gather_kernel alltoall_base_ spread_kernel
combine, 3: weighted_sum_kernel alltoall_base_ weighted_sum_kernel
backward, 10: gather_kernel alltoall_base_ backward_kernel weighted_sum_kernel alltoall_base_ weighted_sum_kernel zeros
    clone alltoall_base_ weighted_sum_kernel
""",
    )


@pytest.mark.slow
def test_the_number_of_launches_does_not_go_by_sizes() -> None:
    assert layer_here(5, None) == layer_here(300, None)
