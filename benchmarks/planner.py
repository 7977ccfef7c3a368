"""How well does the planner predict the demo's training step, in every way to split 2, 4 and 8 ranks?

    python -m benchmarks.planner

For each number of ranks, `calibrate` measures this machine with all of them at work, before the first split, between splits and at the end.
The planner predicts every split from these numbers, with the demo's number of microbatches. Every split trains some steps: gloo, float32,
eager, one thread a rank. The measured time is that of the median step; each number of the calibrations is the median, too.

Ranks share the cores, with each other and with whatever else the machine does. So the benchmark has a clock that others can hardly
disturb: the CPU time of a rank, times the ranks of a core. It is the time that a step takes if no core idles and nobody else uses the
machine. A pipeline's bubble costs nothing then, because other ranks use the core. The lines have the wall's time, too.

A virtual core changes its speed, because it shares a real one with other guests. So a yardstick is measured beside everything: a layer of
`calibrate`. In two minutes a step took 163 to 198 ms of CPU time (medians of six), and the layer 21 to 25 ms: their ratio varies by 2 %.

Memory: torch's profiler sees what is allocated and freed in a step. What a rank holds between steps, its parameters and moments, is added.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from benchmarks.timing import WARM, Line, command, peak
from moecomm.planner import PRESETS, Cluster, Row, Split, assess, calibrate, read_config, search
from moecomm.planner.cluster import Link
from moecomm.planner.layer import Layer, trained
from tests.planner.configs import DEEPSEEK
from tests.spawn import run_ranks
from tutorials.demo import auto, parallel, pipeline, train
from tutorials.demo.model import Shape
from tutorials.demo.options import parse
from tutorials.demo.splits import microbatches

ROUNDS = {2: 3, 4: 2, 8: 1}  # of all splits of so many ranks
SEARCHED = (64, 4096)
SHAPE, BATCH = Shape(context=128), 16
STEPS = 5
CALIBRATED = 8  # so many splits after another
RATES, TIMES = ("matmul", "grouped", "attention", "copy", "stream"), ("launch", "routed", "sliced")


class Step(NamedTuple):
    own: float  # seconds on the rank's own clock
    yardstick: float  # those of the yardstick, the mean of before and after it
    wall: float


class Measured(NamedTuple):
    """A split's steps on one rank."""

    steps: list[Step]
    held: int  # bytes between steps: parameters and the optimizer's state
    peak: int  # bytes beyond these in a step


def main() -> None:
    command("planner", measure, sizes, __doc__)


def sizes(device: str) -> Line:
    return {"shape": SHAPE._asdict(), "batch": BATCH, "steps": STEPS, "rounds": list(ROUNDS.items())}


def measure(device: str, memory: str) -> list[Line]:
    """A line for each split: its ratio is predicted / measured."""
    if memory != WARM:
        return []
    lines = [searched(ranks) for ranks in SEARCHED]
    for ranks in ROUNDS:
        candidates = list(auto.candidates(options_of(ranks), SHAPE))
        of_ranks = run_ranks(here, ranks, [split for split, _ in candidates], timeout=1800)
        layer = statistics.median(step.yardstick for _, every in of_ranks for each in every for step in each.steps)
        cluster = middle([at_speed(each, beside / layer) for each, beside in of_ranks[0][0]])
        rows = assess(auto.model_of(SHAPE, BATCH, torch.float32), cluster, candidates)
        measured = [together(list(each), layer) for each in zip(*(each for _, each in of_ranks), strict=True)]
        lines += [compared(ranks, row, each, cluster) for row, each in zip(rows, measured, strict=True)]
    return lines


def here(every: list[Split]) -> tuple[list[tuple[Cluster, float]], list[Measured]]:
    """Calibrations with the yardstick beside them, and the steps of every split between them, on this rank, in several rounds."""
    clusters, measured = [], [Measured([], 0, 0) for _ in every]
    for number in range(ROUNDS[dist.get_world_size()]):
        for i, split in enumerate(every):
            if i % CALIBRATED == 0:
                clusters.append(calibrated())
            again = steps_here(split, memory=number == 0)
            if dist.get_rank() == 0:
                print(f"{1e3 * statistics.median(each.own for each in again.steps):7.0f} ms, {split.call('cpu')}", flush=True)
            measured[i] = Measured(*(one + other for one, other in zip(measured[i], again, strict=True)))
            end_groups()
    return clusters, measured


def calibrated() -> tuple[Cluster, float]:
    """On the ranks' own clock, no core idles while a rank waits: the others use it. And the yardstick's seconds around it."""
    yardstick = a_yardstick()
    before = [yardstick() for _ in range(STEPS)]
    found = calibrate(None, auto.model_of(SHAPE, BATCH, torch.float32), clock=own_clock)
    after = [yardstick() for _ in range(STEPS)]
    return found._replace(spare=float(dist.get_world_size())), statistics.median(before + after)


def a_yardstick() -> Callable[[], float]:
    """Measures this rank's seconds for a layer of `calibrate`, forward and backward, while all ranks compute one."""
    model = auto.model_of(SHAPE, BATCH, torch.float32)
    layer = Layer(model, SHAPE.experts, "cpu", torch.float32)
    run = trained(partial(layer, torch.randn(BATCH // 4, SHAPE.context, SHAPE.dim, requires_grad=True)))

    def seconds() -> float:
        dist.barrier()
        start = own_clock()
        run()
        return own_clock() - start

    seconds()
    return seconds


def at_speed(cluster: Cluster, slower: float) -> Cluster:
    """The numbers of a machine that was ``slower`` times as slow as it is at its median speed."""
    numbers = {name: getattr(cluster, name) * slower for name in RATES} | {name: getattr(cluster, name) / slower for name in TIMES}
    link = Link(cluster.inside.latency / slower, cluster.inside.overhead / slower, cluster.inside.speed * slower)
    return cluster._replace(**numbers, inside=link)


def own_clock() -> float:
    """Seconds of this rank's CPU time, times the ranks that share a core."""
    return time.process_time() * max(1.0, dist.get_world_size() / (os.cpu_count() or 1))


def end_groups() -> None:
    """End the groups of a split, whose idle threads would disturb the next one. DTensor's caches have its meshes."""
    gc.collect()
    for group in set(dist.distributed_c10d._world.pg_map) - {dist.group.WORLD}:
        dist.destroy_process_group(group)
    _clear_sharding_prop_cache()


def searched(ranks: int) -> Line:
    """The CPU time of a search that a user starts: every way to train DeepSeek-V3."""
    model, start = read_config(DEEPSEEK, batch=16384), time.process_time()
    table = search(model, PRESETS["h100"], ranks=ranks)
    seconds = time.process_time() - start
    print(f"{seconds:7.2f} s for a search of {ranks} ranks", flush=True)
    return {"what": "search", "ranks": ranks, "seconds": seconds, "rows": len(table.rows) + len(table.unfit)}


def options_of(ranks: int, split: Split | None = None) -> Namespace:
    sizes = {} if split is None else {"pp": split.pp, "tp": split.tp, "ep": split.ep, "etp": split.etp}
    given = [f"--{name}={size}" for name, size in sizes.items()]
    return parse([f"--batch={BATCH}", f"--ranks={ranks}", *given, "--no-compile", "--dtype=float32"])


def middle(clusters: list[Cluster]) -> Cluster:
    """Of each number of the calibrations the median; the link as a whole."""
    numbers = {name: statistics.median(getattr(each, name) for each in clusters) for name in (*RATES, *TIMES, "gathers", "scatters")}
    links = sorted((each.inside for each in clusters), key=lambda link: link.latency + link.overhead + 1e5 / link.speed)
    return clusters[0]._replace(**numbers, inside=links[len(links) // 2])


def steps_here(split: Split, memory: bool = True) -> Measured:
    """Train some steps on this rank; one more with an eye on ``memory``."""
    options = options_of(dist.get_world_size(), split)
    mesh, parts = parallel.meshes(options), microbatches(options.pp)
    model = parallel.build(SHAPE, mesh, options)
    schedule = pipeline.schedule(model, mesh, SHAPE, BATCH, False, torch.float32, parts)
    optimizer = train.adamw(model)
    text = torch.randint(256, (BATCH, SHAPE.context + 1), generator=torch.Generator().manual_seed(0)).byte()
    inputs = pipeline.own_part(text, mesh, False, parts)

    def step() -> None:
        train.train_step(model, schedule, optimizer, *inputs, 1e-4, mesh, options)

    step()
    yardstick = a_yardstick()
    steps, before = [], yardstick()
    for _ in range(STEPS):
        dist.barrier()
        start, began = time.perf_counter(), own_clock()
        step()
        own, wall, after = own_clock() - began, time.perf_counter() - start, yardstick()
        steps.append(Step(own, (before + after) / 2, wall))
        before = after
    if not memory:
        return Measured(steps, 0, 0)
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(local(each).untyped_storage().nbytes() for each in (*model.parameters(), *states))
    beyond = peak(step, "cpu", 3)
    return Measured(steps, held, beyond)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def together(ranks: list[Measured], layer: float) -> tuple[float, float, int]:
    """Of the median step: the ranks' mean seconds where the yardstick takes ``layer``; its wall seconds; bytes of the rank with most."""
    steps = list(zip(*(each.steps for each in ranks), strict=True))  # [steps][ranks]
    own = layer * statistics.median(statistics.mean(step.own / step.yardstick for step in every) for every in steps)
    wall = statistics.median(max(step.wall for step in every) for every in steps)
    return own, wall, max(each.held + each.peak for each in ranks)


def compared(ranks: int, row: Row, measured: tuple[float, float, int], cluster: Cluster) -> Line:
    seconds, wall, size = measured
    print(f"{row.seconds / seconds:7.3f}  {1e3 * row.seconds:.0f} / {1e3 * seconds:.0f} ms, {row.split.call('cpu')}", flush=True)
    return {
        "what": "split", "case": "predicted", "to": "measured", "ranks": ranks, "split": row.split._asdict(),
        "microbatches": row.way.microbatches, "ratio": row.seconds / seconds, "milliseconds": [1e3 * row.seconds, 1e3 * seconds],
        "wall milliseconds": 1e3 * wall, "times": row.times._asdict(), "bytes": [row.memory.total(), size],
        "memory parts": row.memory._asdict(), "cluster": cluster.to_dict() | {"sources": []},
    }  # fmt: skip


if __name__ == "__main__":
    main()
