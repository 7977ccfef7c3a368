"""What checks the accesses of the Triton kernels sees what it is there for, and every kernel passes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl

import moecomm.functional as mf
from moecomm.ops.routing.choose_experts import choose
from moecomm.ops.routing.counting_sort import counting_sort
from moecomm.ops.rows.wire_formats import WIRES
from tests.ops.bounds import Kernels, OutOfBounds, within_bounds
from tests.spawn import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is off: make sanitize")

OPS = Path(__file__).parents[3] / "ops"


@triton.jit
def copy_kernel(x, y, size, stride, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i + shift, tl.load(x + i * stride, mask=i < size, other=0), mask=i < size)


def copied(size: int, stride: int = 1, shift: int = 0, programs: int = 2, block: int = 8) -> None:
    """What is right for 16 elements of every other one of 32, in two programs of 8."""
    x, y = torch.arange(32.0)[::2], torch.zeros(20)[2:18]
    with within_bounds() as names:
        copy_kernel[(programs,)](x, y, size, 2 * stride, shift, BLOCK=block)
    assert names == {"copy_kernel"}
    torch.testing.assert_close(y[:size], x[:size])


def test_a_kernel_that_touches_its_own_passes() -> None:
    copied(16)
    copied(11)
    copied(11, programs=3)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"size": 16, "stride": 2}, "copy_kernel: a load of 8 elements that are none of its tensors', the first \\+\\d+ bytes off"),
        ({"size": 16, "shift": 1}, "copy_kernel: a store of 1 elements that are none of its tensors', the first \\+4 bytes off"),
        ({"size": 16, "shift": -1}, "copy_kernel: a store of 1 elements that are none of its tensors', the first -4 bytes off"),
        ({"size": 17, "programs": 3}, "copy_kernel: a load of 1 elements that are none of its tensors'"),
    ],
)
def test_a_load_or_store_beside_the_tensors_is_seen_though_it_is_in_their_memory(wrong: dict[str, int], text: str) -> None:
    with pytest.raises(OutOfBounds, match=text):
        copied(**wrong)


@triton.jit
def shift_kernel(x, size, step):
    i = tl.program_id(0)
    from_here = (i + step + size) % size
    tl.store(x + i, tl.load(x + from_here))


@triton.jit
def sum_kernel(x, total, ATOMIC: tl.constexpr):
    i = tl.program_id(0)
    if ATOMIC:
        tl.atomic_add(total, tl.load(x + i))
    else:
        tl.store(total, tl.load(x + i))


def test_programs_in_each_others_way_are_seen() -> None:
    for step, text in ((1, "stores what another program loads"), (-1, "loads what another program stores")):
        with pytest.raises(OutOfBounds, match=f"shift_kernel: a program {text}"), within_bounds():
            shift_kernel[(4,)](torch.arange(4.0), 4, step)
    with pytest.raises(OutOfBounds, match="sum_kernel: a program stores what another program stores"), within_bounds():
        sum_kernel[(4,)](torch.ones(4), torch.zeros(1), ATOMIC=False)


def test_atomics_of_several_programs_are_right_within_the_tensors() -> None:
    total = torch.zeros(2)
    with within_bounds():
        sum_kernel[(4,)](torch.ones(4), total, ATOMIC=True)
    assert total.tolist() == [4, 0]
    with pytest.raises(OutOfBounds, match="sum_kernel: an atomic"), within_bounds():
        sum_kernel[(4,)](torch.ones(4), total[1:].new_empty(1).as_strided((0,), (1,)), ATOMIC=True)


def checked_here() -> set[str]:
    """A layer over this rank's group, in dynamic and in static mode, forward and backward: the names of its kernels."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(5, 7, generator=generator, requires_grad=True)
    weights = torch.rand(5, 2, generator=generator, requires_grad=True)
    experts = torch.rand(5, 4, generator=generator).argsort(1)[:, :2]
    with within_bounds() as names, Kernels():
        for max_rows, placement in ((None, [[0, 1, 3], [3, 2, 1]]), (4, None)):
            for wire in (None, *WIRES):
                plan = mf.plan(experts, weights, 4, max_rows=max_rows, placement=placement, like=x)
                mf.combine(mf.dispatch(x, plan, wire=wire), plan, backward_wire=wire).sum().backward()
        mf.sum_ranks(x.detach(), None)
        choose(weights.detach(), 1)
        counting_sort(experts, 300, experts.numel())
    return names


@pytest.mark.slow
def test_every_kernel_of_a_layer_keeps_within_its_tensors() -> None:
    kernels = {name for file in OPS.rglob("*.py") for name in re.findall(r"@jit.*\ndef (\w+_kernel)", file.read_text())}
    for names in run_ranks(checked_here, 2, timeout=200):
        assert names == kernels
