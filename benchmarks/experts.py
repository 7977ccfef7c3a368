"""How much does moecomm add to the matmuls of a layer's experts, forward and backward?

    python -m benchmarks.experts           # or: make bench
    python -m benchmarks.experts --device cuda

SwiGLU experts by torch's grouped_mm in bfloat16, on one process, with the gradients of tokens, weights and experts. There are two floors:

- grouped_mm alone on rows that are ready, plus a copy of as many rows as plan, dispatch and combine must read and write: (5 N + 4 T) / 2.
  A gather reads T rows and writes N. A sum reads N and writes T. The backward of each is the other. The backward of the weighted sum also
  reads its N rows.
- One dense matmul of as many rows by one expert.

The other methods run with the same experts. On a GPU, so do projects that join the permutation to the matmuls, and static mode runs both
launched and as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu

import moecomm.functional as mf
from benchmarks.captured import captured
from benchmarks.gpu_peers import LAYERS, runs, wholes
from benchmarks.inputs import routed
from benchmarks.peers import MOECOMM, ON_ONE, Compute
from benchmarks.timing import Line, command, compared, exact, interleaved, peak, said
from benchmarks.whole import Sizes, Whole, check_whole, lean, matrices, swiglu, with_experts

ON_CPU = (Sizes(1024, 512, 256, 16, 4),)
ON_GPU = (Sizes(8192, 7168, 2048, 256, 8), Sizes(16384, 2048, 768, 128, 8))  # as DeepSeek-V3 has, and as Qwen3-30B-A3B has
REPEATS = 7
LEAN, STATIC, GRAPH, FLOOR, ALONE, DENSE = (
    "moecomm, lean",
    "moecomm, static",
    "moecomm, static, in a CUDA graph",
    "grouped_mm and copies",
    "grouped_mm",
    "dense matmul",
)


def main() -> None:
    command("experts", measure, lambda device: {"sizes": [each._asdict() for each in sizes(device)]}, __doc__)


def sizes(device: str) -> Sequence[Sizes]:
    return ON_GPU if device == "cuda" else ON_CPU


def measure(device: str, memory: str) -> list[Line]:
    return [line for size in sizes(device) for line in said(layer_with_experts(device, size), memory)]


def layer_with_experts(device: str, size: Sizes) -> list[Line]:
    permuted = {name: layer for name, layer in LAYERS.items() if device == "cuda" and runs(name, torch.bfloat16)}
    ways = {
        name: with_experts(layer)
        for name, layer in ({MOECOMM: ON_ONE[MOECOMM], STATIC: static, "k_fold": ON_ONE["k_fold"]} | permuted).items()
    } | {LEAN: lean}
    for way in ways.values():
        check_whole(way, torch.bfloat16, device)
    x, experts, weights, grad = routed(size.tokens, size.dim, size.experts, size.k, torch.bfloat16, device)
    given = x, experts, weights, *matrices(size, device)
    steps: dict[str, Callable[[], object]] = {
        name: partial(step, way, *given, grad) for name, way in (ways | wholes(device, torch.bfloat16)).items()
    }
    if device == "cuda" and has_room(*given[3:]):
        steps[GRAPH] = captured(steps[STATIC])
    alone, dense, copies = floors(x, experts, *given[3:])

    def floor() -> None:
        alone()
        copies()

    times = interleaved(steps | {FLOOR: floor, ALONE: alone, DENSE: dense}, device, REPEATS)
    base = {"what": "layer with experts", "dtype": "bfloat16"} | size._asdict()
    pairs = [(name, to) for name in steps if name.startswith(MOECOMM) for to in (FLOOR, DENSE)] + [(ALONE, DENSE)]
    pairs += [(name, MOECOMM) for name in steps if name != MOECOMM]
    most = {name: peak(steps[name], device) for name in steps if name != GRAPH}
    memory = [exact(name, MOECOMM, most[name], most[MOECOMM]) | base | {"what": "peak memory"} for name in most if name != MOECOMM]
    return [compared(times, case, to) | base for case, to in pairs] + memory


def has_room(*experts: Tensor) -> bool:
    """For the experts and three gradients of them: a graph keeps one, a step makes another, and some of it is for rows."""
    needed = 4 * sum(matrix.nbytes for matrix in experts)
    there = torch.cuda.get_device_properties().total_memory
    if needed > there:
        print(f"{GRAPH} is left out: it needs about {needed / 2**30:.0f} GiB, and the GPU has {there / 2**30:.0f}", flush=True)
    return needed <= there


def static(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, compute: Compute) -> Tensor:
    plan = mf.plan(experts, weights, num_experts, like=x, max_rows=x.shape[0])
    return mf.combine(compute(mf.dispatch(x, plan), plan.offsets, 0), plan)


def step(way: Whole, x: Tensor, experts: Tensor, weights: Tensor, into: Tensor, out: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(way(x, experts, weights, into, out), (x, weights, into, out), grad)


def floors(
    x: Tensor, experts: Tensor, into: Tensor, out: Tensor
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
    """The experts alone on their rows; one expert on all rows; the copies."""
    (tokens, k), dim = experts.shape, x.shape[1]
    rows = x.detach().repeat(k, 1).requires_grad_()  # [N, D]
    ends = torch.bincount(experts.flatten(), minlength=into.shape[0]).cumsum(0).to(torch.int32)
    grad = torch.ones_like(rows)
    one_into, one_out = (matrix[0].detach().clone().requires_grad_() for matrix in (into, out))

    def alone() -> object:
        return torch.autograd.grad(swiglu(rows, ends, into, out), (rows, into, out), grad)

    def dense() -> object:
        gate, up = (rows @ one_into.T).chunk(2, dim=-1)
        return torch.autograd.grad((silu(gate) * up) @ one_out.T, (rows, one_into, one_out), grad)

    source = x.detach().new_ones((5 * tokens * k + 4 * tokens) // 2, dim)
    target = torch.empty_like(source)
    return alone, dense, lambda: target.copy_(source)


if __name__ == "__main__":
    main()
