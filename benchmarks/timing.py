"""How do the benchmarks measure? Two memory settings, alternating repeats, ratios within one run, memory, and the run's machine.

Each line of a result is a ratio, its quartiles, and the two things that it compares. Both are measured in one process group, in alternating
repeats. With several ranks the slowest one counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor

RESULTS = Path(__file__).parent / "results"
WARM, INSTALLED = "warm", "as installed"
MEMORY = {
    # the process keeps its pages, as CUDA's allocator does; as installed, a large tensor is fresh pages of the kernel at each call
    WARM: {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"},
    INSTALLED: {},
}
QUIET = {"KINETO_LOG_LEVEL": "99"}  # torch's profiler says on stderr that it starts and stops
PACKAGES = (
    "torch", "triton", "numpy", "liger-kernel", "megablocks", "scattermoe", "sonic-moe", "transformer-engine", "transformers",
    "torchtitan",
)  # fmt: skip
MOST_REPEATS = 41
FLUSHED = 2**28  # bytes that are written before each repeat on a GPU: some times its L2
Line = dict[str, Any]


def command(name: str, measure: Callable[[str, str], list[Line]], sizes: Callable[[str], Line], doc: str | None) -> None:
    """``python -m benchmarks.<name>``: the lines of ``measure(device, memory)`` under each setting, as ``results/<name>_<device>.json``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", choices=MEMORY, help=argparse.SUPPRESS)  # a process of this command, for one setting
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.memory:
        torch.set_num_threads(1)  # as on the ranks: two wait for each other wherever something else runs on the machine
        arguments.into.write_text(json.dumps([line | {"memory": arguments.memory} for line in measure(device, arguments.memory)]))
        return
    lines, load, start = [], os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for memory in MEMORY if device == "cpu" else [WARM]:
            into = Path(folder) / "lines.json"
            call = [sys.executable, "-m", f"benchmarks.{name}", "--device", device, "--memory", memory, "--into", str(into)]
            subprocess.run(call, env=os.environ | QUIET | MEMORY[memory], check=True)
            lines += json.loads(into.read_text())
    about = made_on(device) | {"on": device, "load before": load, "seconds": time.monotonic() - start} | sizes(device)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}_{device}.json").write_text(json.dumps({"about": about, "lines": lines}, indent=1) + "\n")


def made_on(device: str) -> Line:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"
    return {"device": name, "python": platform.python_version(), "packages": dict(_versions())}


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{platform.machine()} {names[0]}" if names else platform.machine()


def said(lines: list[Line], memory: str) -> list[Line]:
    """Print each line, the ratio first and then what it compares. Returns the lines."""
    for line in lines:
        where = ", ".join(str(line[key]) for key in ("what", "dtype", "k") if key in line)
        spread = f"{line['ratio']:7.3f} ({line['low']:.3f} to {line['high']:.3f})"
        print(f"{spread}  {line['case']} / {line['to']}; {where}, {memory}", flush=True)
    return lines


def interleaved(cases: dict[str, Callable[[], object]], device: str, repeats: int, seconds: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each case, repeat by repeat, on the slowest rank, so that what else the machine does falls on all cases alike.

    ``repeats`` times, or more often, up to `MOST_REPEATS` times, as long as all of it takes about ``seconds``.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    clock = _on_gpu if device == "cuda" else _on_cpu
    for case in cases.values():  # warms up
        clock(case)
    for name, case in cases.items():
        times[name].append(clock(case))
    once = _slowest([sum(each[0] for each in times.values())])[0]
    for _ in range(max(repeats, min(MOST_REPEATS, int(seconds / once))) - 1):
        for name, case in cases.items():
            times[name].append(clock(case))
    width = len(next(iter(times.values())))
    slowest = _slowest([seconds for each in times.values() for seconds in each])
    return {name: slowest[i * width : (i + 1) * width] for i, name in enumerate(times)}


def _on_cpu(case: Callable[[], object]) -> float:
    if _ranks() > 1:
        dist.barrier()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # what the case before launched
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


_flushed: list[Tensor] = []


def _on_gpu(case: Callable[[], object]) -> float:
    if not _flushed:
        _flushed.append(torch.empty(FLUSHED, dtype=torch.uint8, device="cuda"))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    _flushed[0].zero_()
    start.record()
    case()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _slowest(seconds: list[float]) -> list[float]:
    if _ranks() == 1:
        return seconds
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def compared(times: dict[str, list[float]], case: str, to: str, scale: float = 1.0) -> Line:
    """The ratio of two cases, of ``scale`` times the first one's seconds: the median of the repeats, and their quartiles."""
    low, ratio, high = quartiles([scale * a / b for a, b in zip(times[case], times[to], strict=True)])
    medians = [1e3 * statistics.median(times[name]) for name in (case, to)]
    return {"case": case, "to": to, "ratio": ratio, "low": low, "high": high, "milliseconds": medians, "repeats": len(times[case])}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def exact(case: str, to: str, a: float, b: float) -> Line:
    return {"case": case, "to": to, "ratio": a / b, "low": a / b, "high": a / b, "amounts": [a, b]}


def gathered(value: int) -> list[int]:
    """The value of each rank."""
    everyones: list[Any] = [value]
    if _ranks() > 1:
        everyones = [None] * _ranks()
        dist.all_gather_object(everyones, value)
    return everyones


def peak(run: Callable[[], object], device: str, repeats: int = 5) -> int:
    """The most bytes that are allocated at a time while it runs, beyond those of before; it has run before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # The profiler sees what this thread frees, and no other. What gloo's thread frees, in some runs only, it takes for held.
    return min(_peak_on_cpu(run) for _ in range(repeats))


def _peak_on_cpu(run: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    for event in sorted(_memory_events(profile), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _memory_events(profile: torch.profiler.profile) -> list[Any]:
    return [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]


def held(forward: Callable[[], Tensor], device: str) -> int:
    """The bytes that are still allocated after a forward pass, but for its result: what the backward pass keeps. It has run before."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        y = forward()
        return torch.cuda.memory_allocated() - before - y.nbytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = forward()
    return sum(event.nbytes() for event in _memory_events(profile)) - y.nbytes


def saved(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """The bytes that are kept for the backward pass, but for those of ``own``, which the caller has anyway."""
    callers = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = (tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor).untyped_storage()
        if memory.data_ptr() not in callers:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward()
    del y  # until here nothing of it was given back
    return sum(kept.values())
