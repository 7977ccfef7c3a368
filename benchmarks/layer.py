"""How fast are plan, dispatch and combine compared with other published methods, forward and backward, in one run?

    python -m benchmarks.layer             # or: make bench
    python -m benchmarks.layer --device cuda

The experts return their rows unchanged, so it measures everything around them. It runs on 4 gloo processes and on one, each with one
thread. It also measures bytes, memory, the time at tiny sizes, and the effect of a second thread per rank. Each layer is checked against a
dense one in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from benchmarks.gpu_peers import ways
from benchmarks.inputs import routed, same, step
from benchmarks.peers import MOECOMM, ON_ONE, ON_RANKS, check
from benchmarks.timing import INSTALLED, WARM, Line, command, compared, exact, gathered, interleaved, peak, said
from moecomm.ops.rows.weighted_sum import weighted_sum
from tests.spawn import run_ranks
from tests.traffic import Traffic


class Sizes(NamedTuple):
    tokens: int
    dim: int
    experts: int
    k: int


RANKS, TOKENS, DIM, EXPERTS, TOP_K = 4, 1024, 1024, 64, (1, 2, 4, 8)
ON_CPU, SMALL = Sizes(4096, 1024, 64, 8), Sizes(1024, 1024, 64, 8)  # one process; and for what is too slow for more
ON_GPU = (Sizes(8192, 7168, 256, 8), Sizes(16384, 2048, 128, 8))
DTYPES = (torch.float32, torch.bfloat16)
REPEATS, TINY_REPEATS, SLOW_REPEATS = {WARM: 11, INSTALLED: 7}, 200, 3  # the targets are for warm memory
SECONDS = 1.0  # of repeats on one process: more than the least number of them, where they are short
FLOOR, MASKS, LOOP = "floor", "one_hot", "expert_loop"


def main() -> None:
    command("layer", measure, sizes, __doc__)


def sizes(device: str) -> Line:
    if device == "cuda":
        return {"one process": [each._asdict() for each in ON_GPU]}
    return {"ranks": RANKS, "tokens": TOKENS, "dim": DIM, "experts": EXPERTS, "one process": ON_CPU._asdict(), MASKS: SMALL._asdict()}


def measure(device: str, memory: str) -> list[Line]:
    """All lines of one setting."""
    if device == "cuda":
        on_gpu = [line for size in ON_GPU for line in said(on_one(device, torch.bfloat16, size, REPEATS[memory], (MASKS,)), memory)]
        return on_gpu + said(tiny(device), memory)
    lines = []
    for dtype in DTYPES:
        for k in TOP_K:
            lines += said(run_ranks(on_ranks, RANKS, dtype, k, REPEATS[memory], timeout=600)[0], memory)
            if memory == WARM:  # what does not depend on it, once
                lines += said(run_ranks(bytes_and_peak, RANKS, dtype, k, timeout=600)[0], memory)
        lines += said(on_one(device, dtype, ON_CPU, REPEATS[memory], (MASKS,)), memory)
    if memory == WARM:
        lines += said(
            on_one(device, torch.float32, SMALL, SLOW_REPEATS, ("k_fold", "by_expert", LOOP))[:1], memory
        )  # the masks: most of it is matmuls
        lines += said(run_ranks(threads, RANKS, timeout=600)[0], memory)
        lines += said(tiny(device), memory) + said(run_ranks(tiny_on_ranks, 2, timeout=600)[0], memory)
    return lines


# On ranks


def on_ranks(dtype: torch.dtype, k: int, repeats: int) -> list[Line]:
    for layer in ON_RANKS.values():
        check(layer, dtype, k)
    x, experts, weights, grad = routed(TOKENS, DIM, EXPERTS, k, dtype)
    plan = mf.plan(experts, weights.detach(), EXPERTS, like=x)

    @torch.no_grad()
    def exchange_and_permute() -> Tensor:
        return mf.combine(mf.dispatch(x, plan), plan)

    steps = {name: partial(step, layer, x, experts, weights, EXPERTS, grad) for name, layer in ON_RANKS.items()}
    parts = {FLOOR: floor(x, plan), "plan": partial(mf.plan, experts, weights.detach(), EXPERTS, like=x), "forward": exchange_and_permute}
    times = interleaved(steps | parts, "cpu", repeats)
    base = {"what": f"{RANKS} ranks", "dtype": str(dtype).removeprefix("torch."), "k": k}
    pairs = [(name, MOECOMM) for name in ON_RANKS if name != MOECOMM] + [(MOECOMM, FLOOR), ("plan", "forward")]
    return [compared(times, case, to) | base for case, to in pairs]


def floor(x: Tensor, plan: mf.Plan) -> Callable[[], None]:
    """The four exchanges of a layer's rows by themselves, one for each (token, rank) pair, from and into memory that is already mapped."""
    there, back = x.new_ones(plan.send_order.shape[0], x.shape[1]), x.new_ones(plan.weights.shape[0], x.shape[1])  # type: ignore[union-attr]
    out, into = plan.splits.tolist()  # type: ignore[union-attr]

    def exchanges() -> None:
        for _ in range(2):  # forward and backward
            dist.all_to_all_single(_bytes(back), _bytes(there), into, out)
            dist.all_to_all_single(_bytes(there), _bytes(back), out, into)

    return exchanges


def _bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8) if rows.shape[0] else rows.new_empty(0, dtype=torch.uint8)


def bytes_and_peak(dtype: torch.dtype, k: int) -> list[Line]:
    """What the ranks send to others in a step, and the most memory that a rank allocates beyond its inputs."""
    x, experts, weights, grad = routed(TOKENS, DIM, EXPERTS, k, dtype)
    sent, most = {}, {}
    for name in (MOECOMM, "k_fold"):
        run = partial(step, ON_RANKS[name], x, experts, weights, EXPERTS, grad)
        with Traffic() as traffic:
            run()
        sent[name] = sum(gathered(sum(part for message in traffic.bytes for rank, part in enumerate(message) if rank != dist.get_rank())))
        most[name] = max(gathered(peak(run, "cpu")))
    out, into = mf.plan(experts, weights.detach(), EXPERTS, like=x).splits.tolist()  # type: ignore[union-attr]
    other = [rank for rank in range(RANKS) if rank != dist.get_rank()]
    rows = sum(gathered(2 * sum(out[rank] + into[rank] for rank in other) * DIM * dtype.itemsize))  # two exchanges each way
    base = {"dtype": str(dtype).removeprefix("torch."), "k": k}
    return [
        exact(MOECOMM, "k_fold", sent[MOECOMM], sent["k_fold"]) | base | {"what": "bytes"},
        exact("metadata", "all that moecomm sends", sent[MOECOMM] - rows, sent[MOECOMM]) | base | {"what": "bytes"},
        exact(MOECOMM, "k_fold", most[MOECOMM], most["k_fold"]) | base | {"what": "peak memory", "ranks": RANKS},
    ]


def threads() -> list[Line]:
    """A step with two threads a rank, to one thread a rank."""
    x, experts, weights, grad = routed(TOKENS, DIM, EXPERTS, max(TOP_K), torch.float32)

    def with_threads(number: int) -> None:
        torch.set_num_threads(number)
        step(ON_RANKS[MOECOMM], x, experts, weights, EXPERTS, grad)

    cases = {"2 threads a rank": partial(with_threads, 2), "1 thread a rank": partial(with_threads, 1)}
    times = interleaved(cases, "cpu", REPEATS[WARM])
    torch.set_num_threads(1)
    return [compared(times, *cases) | {"what": f"threads, {RANKS} ranks", "dtype": "float32", "k": max(TOP_K)}]


# On one process


def on_one(device: str, dtype: torch.dtype, size: Sizes, repeats: int, without: Sequence[str] = ()) -> list[Line]:
    """moecomm beside the other ways; the floor is a copy of all rows."""
    here = ways(device, dtype, without)
    x, experts, weights, grad = routed(size.tokens, size.dim, size.experts, size.k, dtype, device)
    rows = x.new_ones(size.tokens * size.k, size.dim)
    target = torch.empty_like(rows)
    steps = {name: partial(step, layer, x, experts, weights, size.experts, grad) for name, layer in here.items()}
    times = interleaved(steps | {FLOOR: lambda: target.copy_(rows)}, device, repeats, seconds=SECONDS)
    base = {"what": "1 process", "dtype": str(dtype).removeprefix("torch.")} | size._asdict()
    lines = [compared(times, case, to) | base for case, to in [*((name, MOECOMM) for name in here if name != MOECOMM), (MOECOMM, FLOOR)]]
    if "k_fold" in here:
        most = {name: peak(steps[name], device) for name in (MOECOMM, "k_fold")}
        lines.append(exact(MOECOMM, "k_fold", most[MOECOMM], most["k_fold"]) | base | {"what": "peak memory", "ranks": 1})
    return lines


# At tiny sizes


def tiny(device: str) -> list[Line]:
    """The host's microseconds of a layer whose tensors are next to nothing, forward without gradients, to one op of it."""
    x, experts, weights, _ = routed(8, 8, 8, 2, torch.float32, device)
    plan = mf.plan(experts, weights.detach(), 8)
    op = partial(weighted_sum, x.detach().repeat(2, 1), plan.weights, plan.row_order, plan.row_position)
    with torch.no_grad():
        cases = {name: partial(ON_ONE[name], x, experts, weights, 8, same) for name in (MOECOMM, "k_fold")} | {"one weighted_sum": op}
        times = interleaved(cases, "cpu", TINY_REPEATS)  # by the host's clock, on a GPU too: what it takes to launch
    base = {"what": "tiny, 1 process", "dtype": "float32", "k": 2}
    return [compared(times, MOECOMM, "one weighted_sum") | base, compared(times, MOECOMM, "k_fold") | base]


def tiny_on_ranks() -> list[Line]:
    x, experts, weights, _ = routed(8, 8, 8, 2, torch.float32)
    send = torch.zeros(2)
    with torch.no_grad():
        cases = {name: partial(ON_RANKS[name], x, experts, weights, 8, same) for name in (MOECOMM, "k_fold")}
        exchange = lambda: dist.all_to_all_single(torch.empty_like(send), send)  # noqa: E731
        times = interleaved(cases | {"one all_to_all_single": exchange}, "cpu", TINY_REPEATS)
    base = {"what": "tiny, 2 ranks", "dtype": "float32", "k": 2}
    return [compared(times, MOECOMM, "one all_to_all_single") | base, compared(times, MOECOMM, "k_fold") | base]


if __name__ == "__main__":
    main()
