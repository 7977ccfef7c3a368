"""Compiles every Triton kernel of the local ops for a GPU that need not be here: ``python -m tests.ops.targets cuda 90 32 [all]``.

It stands in for the GPU where Triton asks which one there is, launches nothing, and prints the name of each kernel once it is compiled.
With ``all`` it takes every dtype that an op takes, else one of them. It fails if a kernel has registers spilled to memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moecomm.ops.base.signature import LENGTH
from moecomm.ops.routing import choose_experts, count_pairs, counting_sort, drop_overflow, place_slots, slot_bytes, slots_with_counts
from moecomm.ops.routing.choose_experts import choose_triton
from moecomm.ops.routing.count_pairs import count_triton, keys_triton
from moecomm.ops.routing.counting_sort import bounded_triton, sort_triton
from moecomm.ops.routing.drop_overflow import fit_triton
from moecomm.ops.routing.place_slots import place_triton, table_cpu
from moecomm.ops.routing.slot_bytes import message_triton, unpack_triton
from moecomm.ops.routing.slots_with_counts import few_triton, take_triton
from moecomm.ops.routing.sort_alone import alone_triton, counted_triton
from moecomm.ops.rows import dequantize, gather, quantize, weighted_sum, weighted_sum_backward
from moecomm.ops.rows.dequantize import dequantize_triton
from moecomm.ops.rows.gather import gather_rows_triton, gather_triton
from moecomm.ops.rows.quantize import quantize_triton
from moecomm.ops.rows.rank_sum import rank_sum_triton
from moecomm.ops.rows.weighted_sum import weighted_sum_triton
from moecomm.ops.rows.weighted_sum_backward import backward_triton
from moecomm.ops.rows.wire_formats import DTYPES, WIRES

IDS = (torch.int64, torch.int32, torch.uint8)
GATHERED = (torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float32, torch.complex64, torch.complex128)
SUMMED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class AbsentGpu:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


spilled: dict[str, list[str]] = {}  # by kernel and its constants


def compile_only(launch: Any) -> Any:
    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **rest: Any) -> Any:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **rest)
        spilled.update({f"{kernel.__name__}{rest}": found for found in [spills(compiled.asm)] if found})
        print(kernel.__name__, flush=True)
        return compiled

    return run


def spills(asm: dict[str, Any]) -> list[str]:
    """What a compiled kernel says of memory that stands in for registers, unless it is none."""
    if "cubin" in asm:  # a kernel's n_spills is known where it is loaded, on a GPU
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            said = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found = re.findall(r"(?:STACK|LOCAL):\d+", said)
    else:
        found = re.findall(r"\.vgpr_spill_count: +\d+", asm["amdgcn"])  # the scalar ones go to vector registers
    assert found, "the compiler names them in another way"
    return [each for each in found if not re.search(r"\b0$", each)]


def call_everything(most: int | None) -> None:
    """Each kernel, with the first ``most`` dtypes of those that it takes."""
    tokens, k, d = 5, 2, 7
    order = torch.zeros(tokens * k, dtype=torch.int32)
    position = torch.zeros(tokens, k, dtype=torch.int32)
    weights = torch.zeros(tokens, k)
    for dtype in IDS[:most]:
        count_triton(torch.zeros(tokens, k, dtype=dtype), 4, 2, [2, 4, -1, 16, 2**40])
        count_triton(torch.zeros(tokens, k, dtype=dtype), 4, 2, [2, 4, -1, 16, 2**40], position)
        keys_triton(torch.zeros(tokens, k, dtype=dtype), 4, 2)
        place_triton(torch.zeros(tokens, k, dtype=dtype), torch.zeros(9, dtype=torch.int32), 4, 1, "")
        sort_triton(torch.zeros(tokens, k, dtype=dtype), 4, tokens * k)
        bounded_triton(torch.zeros(tokens, k, dtype=dtype), 4, 3)
        fit_triton(torch.zeros(tokens, k, dtype=dtype), torch.zeros(tokens, k, dtype=dtype), position, 2)
        alone_triton(torch.zeros(tokens, k, dtype=dtype), torch.zeros(tokens, k, dtype=dtype), 4, tokens, tokens * k)
        counted_triton(torch.zeros(tokens, k, dtype=dtype), torch.zeros(tokens, k, dtype=dtype), 4, [0] * 11)
    for bins in (256, 2048):
        sort_triton(position, bins, tokens * k, True, 16)
    count_triton(torch.zeros(tokens, 1, dtype=torch.int64), 1, 1, [1, 1])
    for local in (4, 2**7 + 1, 2**15 + 1):
        message = message_triton(position, weights, position, order, local, True)
        unpack_triton(message, k, local, weights.dtype)
        few_triton(position, weights, position, order, position.new_zeros(2), local)
    take_triton(torch.zeros(2, LENGTH, dtype=torch.int64), tokens, 10)
    for dtype in GATHERED[:most]:
        gather_triton(torch.zeros(tokens, d, dtype=dtype), order, position)
        gather_rows_triton(torch.zeros(tokens, d, dtype=dtype), order, k)
    for dtype in SUMMED[:most]:
        for before in (False, True):
            rank_sum_triton(torch.zeros(3, 7, dtype=dtype), 3, before)
        choose_triton(torch.zeros(tokens, 6, dtype=dtype), k)
        for slots, width in ((k, d), (8, 4096)):  # the second has the largest blocks
            x, rows = torch.zeros(1, width, dtype=dtype).expand(tokens, -1), torch.zeros(1, width, dtype=dtype).expand(tokens * slots, -1)
            factors, to = torch.zeros(tokens, slots), torch.zeros(tokens * slots, dtype=torch.int32)
            weighted_sum_triton(rows, None, to, to.view(tokens, slots))
            weighted_sum_triton(rows, factors, to, to.view(tokens, slots))
            backward_triton(x, rows, factors, to, to.view(tokens, slots))
            gather_triton(x, to, to.view(tokens, slots))
    for wire in WIRES:
        for dtype in DTYPES[:most]:
            for some in (None, order):
                message = quantize_triton(torch.zeros(tokens, d, dtype=dtype), some, k, wire)
                dequantize_triton(message, some, k, d, dtype, wire)


def call_with_as_many_tokens(tokens: int) -> int:
    """How many kernels there are then, of those that are launched with other numbers of tokens as a training goes on."""
    experts, position = torch.zeros(tokens, 2, dtype=torch.int64), torch.zeros(tokens, 2, dtype=torch.int32)
    placement, checksum = table_cpu(torch.tensor([[tokens % 2, 1 - tokens % 2], [2, 3]]), 4, torch.device("cpu"))
    place_triton(experts, placement, 4, 1, "")
    count_triton(experts, 4, 2, [2, 4, checksum])
    sort_triton(experts, 4, tokens)
    bounded_triton(experts, 4, 3)
    fit_triton(experts, experts, position, 2)
    alone_triton(experts, experts, 4, tokens, tokens * 2)
    counted_triton(experts, experts, 4, [0] * 11)
    order, x, rows, weights = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, 7), torch.zeros(tokens, 7), torch.zeros(tokens, 2)
    unpack_triton(message_triton(position, weights, position, order, 4, True), 2, 4, weights.dtype)
    few_triton(position, weights, position, order, position.new_zeros(2), 4)
    take_triton(torch.zeros(2, LENGTH, dtype=torch.int64), tokens, 10)
    choose_triton(torch.zeros(tokens, 6), 2)
    gather_triton(x, order, position)
    gather_rows_triton(x, order, 2)
    weighted_sum_triton(rows, weights, order, position)
    backward_triton(x, rows, weights, order, position)
    dequantize_triton(quantize_triton(x, order, 2, "mxfp8"), order, 2, 7, x.dtype, "mxfp8")
    modules = (
        choose_experts, count_pairs, dequantize, slots_with_counts, drop_overflow, gather, slot_bytes, place_slots, quantize, counting_sort,
        weighted_sum, weighted_sum_backward,
    )  # fmt: skip
    kernels = [getattr(value, "kernel", value) for module in modules for value in vars(module).values()]
    return sum(len(kernel.device_caches[0][0]) for kernel in kernels if isinstance(kernel, JITFunction))


if __name__ == "__main__":
    backend, arch, warp, *everything = sys.argv[1:]
    driver.set_active(AbsentGpu(GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))))
    JITFunction.run = compile_only(JITFunction.run)
    call_everything(None if everything else 1)
    assert not spilled, spilled
    many = torch.zeros(5, 300, dtype=torch.int64)  # slots of a token, whose square a tensor cannot hold
    count_triton(many, 600, 2, [300, 600])
    fit_triton(many, many, many.int(), 2)
    compiled = [call_with_as_many_tokens(tokens) for tokens in (5, 1, 16, 300)]
    assert len(set(compiled)) == 1, compiled
