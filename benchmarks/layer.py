"""plan, dispatch and combine against the published ways of the same layer, forward and backward, in one run.

    python -m benchmarks.layer             # or: make bench
    python -m benchmarks.layer --device cuda

Experts give their rows back as they came, so that what is measured is everything around them. On 4 gloo processes and on one, each of one
thread; and the bytes, the memory and the time at tiny sizes. Each line: the ratio first, then what it is a ratio to; repeats of all cases
are interleaved, ratios are taken repeat by repeat, and of the ranks the slowest counts. Each layer is checked against a dense one in
float64 before it is timed.

All of it runs under two settings of the C library's memory: as installed, where large tensors come as fresh pages from the kernel at each
call, and warm, where the process keeps its pages, as a caching allocator does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from benchmarks.figures import write
from benchmarks.peers import MOECOMM, ON_ONE, ON_RANKS, Layer, check
from moecomm.ops.weighted_sum import weighted_sum
from tests.spawn import run_ranks
from tests.traffic import Traffic

RANKS, TOKENS, TOKENS_ON_ONE, DIM, EXPERTS, TOP_K = 4, 1024, 4096, 1024, 64, (1, 2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16)
REPEATS, TINY_REPEATS, SLOW_REPEATS = 5, 200, 2
FLOOR, MASKS = "floor", "one_hot"
RESULTS = Path(__file__).parent / "results"
WARM = "warm"
MEMORY = {
    WARM: {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)},
    "as installed": {},
}
QUIET = {"KINETO_LOG_LEVEL": "99"}  # torch's profiler says on stderr that it starts and stops
Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", choices=MEMORY, help=argparse.SUPPRESS)  # a process of this command, for one setting
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        arguments.into.write_text(json.dumps(measure(arguments.device, arguments.memory)))
        return
    lines, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        for memory in MEMORY if arguments.device == "cpu" else [WARM]:  # as CUDA's own allocator is
            into = Path(folder) / "lines.json"
            command = [sys.executable, "-m", "benchmarks.layer", "--device", arguments.device, "--memory", memory, "--into", str(into)]
            subprocess.run(command, env=os.environ | QUIET | MEMORY[memory], check=True)
            lines += json.loads(into.read_text())
    write({"about": about(arguments.device) | {"load before": load}, "lines": lines}, RESULTS / f"layer_{arguments.device}.json")


def about(device: str) -> Line:
    sizes = {"ranks": RANKS, "tokens": TOKENS, "tokens on one process": TOKENS_ON_ONE, "dim": DIM, "experts": EXPERTS}
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "repeats": REPEATS} | sizes


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{platform.machine()} {names[0]}" if names else platform.machine()


def measure(device: str, memory: str) -> list[Line]:
    """All lines of one setting."""
    lines: list[Line] = []

    def add(made: list[Line]) -> None:
        for line in made:
            lines.append(line | {"memory": memory})
            where = ", ".join([*(str(line[key]) for key in ("what", "dtype", "k")), memory])
            spread = f"{line['ratio']:7.3f} ({line['low']:.3f} to {line['high']:.3f})"
            print(f"{spread}  {line['case']}: to {line['to']}; {where}", flush=True)

    torch.set_num_threads(1)  # here as on the ranks: two wait for each other wherever something else runs on the machine
    for dtype in DTYPES:
        if device == "cpu":
            for k in TOP_K:
                add(run_ranks(on_ranks, RANKS, dtype, k, timeout=300)[0])
                if memory == WARM:  # what does not depend on it, once
                    add(run_ranks(bytes_and_peak, RANKS, dtype, k, timeout=300)[0])
        add(on_one(device, dtype, [name for name in ON_ONE if name not in (MOECOMM, MASKS)], REPEATS))
    if memory == WARM:
        add(tiny(device))
        if device == "cpu":
            add(run_ranks(tiny_on_ranks, 2, timeout=300)[0])
        add(on_one(device, torch.float32, [MASKS], SLOW_REPEATS)[:1])  # seconds a step, most of them matmuls
    return lines


# On ranks


def on_ranks(dtype: torch.dtype, k: int) -> list[Line]:
    for layer in ON_RANKS.values():
        check(layer, dtype, k)
    x, experts, weights, grad = inputs(TOKENS, DIM, EXPERTS, k, dtype)
    plan = mf.plan(experts, weights.detach(), EXPERTS, like=x)

    @torch.no_grad()
    def exchange_and_permute() -> Tensor:
        return mf.combine(mf.dispatch(x, plan), plan)

    cases: dict[str, Callable[[], object]] = {name: partial(step, layer, x, experts, weights, grad) for name, layer in ON_RANKS.items()}
    cases |= {FLOOR: floor(x, plan), "plan": partial(mf.plan, experts, weights.detach(), EXPERTS, like=x), "forward": exchange_and_permute}
    times = interleaved(cases, "cpu", REPEATS)
    base = {"what": f"{RANKS} ranks", "dtype": str(dtype).removeprefix("torch."), "k": k}
    pairs = [(name, MOECOMM) for name in ON_RANKS if name != MOECOMM] + [(MOECOMM, FLOOR), ("plan", "forward")]
    return [compared(times, case, to) | base for case, to in pairs]


def floor(x: Tensor, plan: mf.Plan) -> Callable[[], None]:
    """The four exchanges of a layer's rows by themselves, one for each (token, rank) pair, from and into memory that is already mapped."""
    there, back = x.new_ones(plan.send_order.shape[0], DIM), x.new_ones(plan.weights.shape[0], DIM)  # type: ignore[union-attr]
    out, into = plan.splits.tolist()  # type: ignore[union-attr]

    def exchanges() -> None:
        for _ in range(2):  # forward and backward
            dist.all_to_all_single(back.view(torch.uint8), there.view(torch.uint8), into, out)
            dist.all_to_all_single(there.view(torch.uint8), back.view(torch.uint8), out, into)

    return exchanges


def bytes_and_peak(dtype: torch.dtype, k: int) -> list[Line]:
    """What the ranks send to others in a step, and the most memory that a rank allocates beyond its inputs."""
    x, experts, weights, grad = inputs(TOKENS, DIM, EXPERTS, k, dtype)
    sent, most = {}, {}
    for name in (MOECOMM, "k_fold"):
        run = partial(step, ON_RANKS[name], x, experts, weights, grad)
        with Traffic() as traffic:
            run()
        sent[name] = total(sum(part for message in traffic.bytes for rank, part in enumerate(message) if rank != dist.get_rank()))
        most[name] = max(gathered(peak(run, "cpu")))
    out, into = mf.plan(experts, weights.detach(), EXPERTS, like=x).splits.tolist()  # type: ignore[union-attr]
    other = [rank for rank in range(RANKS) if rank != dist.get_rank()]
    rows = total(2 * sum(out[rank] + into[rank] for rank in other) * DIM * dtype.itemsize)  # two exchanges each way
    base = {"dtype": str(dtype).removeprefix("torch."), "k": k}
    return [
        exact(MOECOMM, "k_fold", sent[MOECOMM], sent["k_fold"]) | base | {"what": "bytes"},
        exact("metadata", "all that moecomm sends", sent[MOECOMM] - rows, sent[MOECOMM]) | base | {"what": "bytes"},
        exact(MOECOMM, "k_fold", most[MOECOMM], most["k_fold"]) | base | {"what": "peak memory", "ranks": RANKS},
    ]


def exact(case: str, to: str, a: int, b: int) -> Line:
    return {"case": case, "to": to, "ratio": a / b, "low": a / b, "high": a / b, "amounts": [a, b]}


def gathered(value: int) -> list[int]:
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, value)
    return everyones


def total(value: int) -> int:
    return sum(gathered(value))


def peak(run: Callable[[], object], device: str) -> int:
    """The most bytes that were allocated at a time while it ran, beyond those of before."""
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# On one process


def on_one(device: str, dtype: torch.dtype, names: Sequence[str], repeats: int) -> list[Line]:
    """The named ways beside moecomm; the floor is a copy of all rows."""
    k = max(TOP_K)
    x, experts, weights, grad = inputs(TOKENS_ON_ONE, DIM, EXPERTS, k, dtype, device)
    if device == "cpu":
        for name in (MOECOMM, *names):
            check(ON_ONE[name], dtype, k)
    rows = x.new_ones(TOKENS_ON_ONE * k, DIM)
    target = torch.empty_like(rows)
    steps = {name: partial(step, ON_ONE[name], x, experts, weights, grad) for name in (MOECOMM, *names)}
    times = interleaved(steps | {FLOOR: lambda: target.copy_(rows)}, device, repeats)
    base = {"what": "1 process", "dtype": str(dtype).removeprefix("torch."), "k": k}
    lines = [compared(times, case, to) | base for case, to in [*((name, MOECOMM) for name in names), (MOECOMM, FLOOR)]]
    if "k_fold" in names:
        most = {name: peak(steps[name], device) for name in (MOECOMM, "k_fold")}
        lines.append(exact(MOECOMM, "k_fold", most[MOECOMM], most["k_fold"]) | base | {"what": "peak memory", "ranks": 1})
    return lines


# At tiny sizes


def tiny(device: str) -> list[Line]:
    """The microseconds of a layer whose tensors are next to nothing, forward without gradients; one op of it is what it is a ratio to."""
    x, experts, weights, _ = inputs(8, 8, 8, 2, torch.float32, device)
    plan = mf.plan(experts, weights.detach(), 8)
    op = partial(weighted_sum, x.detach().repeat(2, 1), plan.weights, plan.row_order, plan.row_position)
    with torch.no_grad():
        cases = {name: partial(ON_ONE[name], x, experts, weights, 8, same) for name in (MOECOMM, "k_fold")} | {"one weighted_sum": op}
        times = interleaved(cases, device, TINY_REPEATS)
    base = {"what": "tiny, 1 process", "dtype": "float32", "k": 2}
    return [compared(times, MOECOMM, "one weighted_sum") | base, compared(times, MOECOMM, "k_fold") | base]


def tiny_on_ranks() -> list[Line]:
    x, experts, weights, _ = inputs(8, 8, 8, 2, torch.float32)
    send = torch.zeros(2)
    with torch.no_grad():
        cases = {name: partial(ON_RANKS[name], x, experts, weights, 8, same) for name in (MOECOMM, "k_fold")}
        exchange = lambda: dist.all_to_all_single(torch.empty_like(send), send)  # noqa: E731
        times = interleaved(cases | {"one all_to_all_single": exchange}, "cpu", TINY_REPEATS)
    base = {"what": "tiny, 2 ranks", "dtype": "float32", "k": 2}
    return [compared(times, MOECOMM, "one all_to_all_single") | base, compared(times, MOECOMM, "k_fold") | base]


# What they share


def inputs(
    tokens: int, dim: int, num_experts: int, k: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x [T, D], experts [T, K] evenly at random, float32 weights [T, K], and the gradient of y; each rank's own."""
    seed = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    x = torch.randn(tokens, dim, generator=seed).to(device, dtype).requires_grad_()
    experts = torch.rand(tokens, num_experts, generator=seed).topk(k).indices.to(device)
    weights = torch.rand(tokens, k, generator=seed).to(device).requires_grad_()
    return x, experts, weights, torch.randn(tokens, dim, generator=seed).to(device, dtype)


def same(rows: Tensor, ends: object, first: int) -> Tensor:
    return rows


def step(layer: Layer, x: Tensor, experts: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x, experts, weights, EXPERTS, same), (x, weights), grad)


def interleaved(cases: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each case, repeat by repeat, on the slowest rank, so that what else the machine does falls on all cases alike."""
    ranks = dist.is_initialized() and dist.get_world_size() > 1
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, case in cases.items():
            if ranks:
                dist.barrier()
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            case()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    if ranks:
        slowest = torch.tensor(list(times.values()), dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times = dict(zip(times, slowest.tolist(), strict=True))
    return times


def compared(times: dict[str, list[float]], case: str, to: str) -> Line:
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(times[case], times[to], strict=True)], n=4, method="inclusive")
    medians = [1e3 * statistics.median(times[name]) for name in (case, to)]
    return {"case": case, "to": to, "ratio": ratio, "low": low, "high": high, "milliseconds": medians}


if __name__ == "__main__":
    main()
