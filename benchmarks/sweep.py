"""How does the cost of a layer grow with each variable, for moecomm, the other methods, and the floor?

    python -m benchmarks.sweep             # or: make bench
    python -m benchmarks.sweep --device cuda

One variable changes at a time, around a base point: tokens (of all ranks together), the hidden size, experts, experts per token, ranks, and
how even the routing is. Each point and method gives one line: its time relative to moecomm's, the largest memory that a rank allocates in a
step, and what it keeps for the backward pass beyond the tensors that the caller has. The largest points take about 4 GiB, of all ranks
together. The floor on ranks is the step's four exchanges of rows alone. The floor on one process is a copy of all rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import moecomm.functional as mf
from benchmarks.gpu_peers import ways
from benchmarks.inputs import ALL_TO_ONE, UNIFORM, ZIPF, routed, same, step
from benchmarks.layer import FLOOR, MASKS, floor
from benchmarks.peers import MOECOMM, ON_RANKS, Layer, check
from benchmarks.timing import WARM, Line, command, compared, gathered, interleaved, peak, saved
from tests.spawn import run_ranks


class Point(NamedTuple):
    tokens: int  # of all ranks
    dim: int
    experts: int
    k: int
    ranks: int
    routing: str = UNIFORM


AXES: dict[str, tuple[Any, ...]] = {
    "tokens": (256, 1024, 4096, 16384, 65536),
    "dim": (512, 1024, 2048, 4096, 7168),
    "experts": (8, 32, 128, 512),
    "k": (1, 2, 4, 8, 16),
    "ranks": (1, 2, 4, 8),
    "routing": (UNIFORM, ZIPF, ALL_TO_ONE),
}
BASE = Point(2048, 512, 64, 4, 2)
BASE_ON_GPU = Point(8192, 2048, 64, 8, 1)
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
REPEATS, SECONDS = 5, 2.0  # a point, at least and about


def main() -> None:
    command("sweep", measure, lambda device: {"base": base(device)._asdict()}, __doc__)


def base(device: str) -> Point:
    return BASE_ON_GPU if device == "cuda" else BASE


def points(device: str) -> list[Point]:
    """Each point once, those of like ranks one behind the other."""
    about = base(device)
    changed = [about._replace(**{axis: value}) for axis, values in AXES.items() for value in values]
    if device == "cuda":
        changed = [point for point in changed if point.ranks == 1]
    return sorted({about, *changed}, key=lambda point: (point.ranks, point))


def measure(device: str, memory: str) -> list[Line]:
    lines = []
    for point in points(device):
        given = device, point, memory == WARM
        made = run_ranks(here, point.ranks, *given, timeout=600)[0] if point.ranks > 1 else here(*given)
        lines += made
        best = min((line for line in made if line["case"] not in (MOECOMM, FLOOR)), key=lambda line: line["ratio"])
        whole = ", ".join(f"{name} {value}" for name, value in point._asdict().items())
        print(f"{best['ratio']:7.3f} ({best['low']:.3f} to {best['high']:.3f})  {best['case']} / moecomm; {whole}, {memory}", flush=True)
    return lines


def here(device: str, point: Point, amounts: bool) -> list[Line]:
    """The lines of a point, on each of its ranks; with the amounts of memory, which depend on no setting."""
    dtype = DTYPES[device]
    x, experts, weights, grad = routed(point.tokens // point.ranks, point.dim, point.experts, point.k, dtype, device, point.routing)
    layers = layers_at(device, point, dtype)
    steps = {name: partial(step, layer, x, experts, weights, point.experts, grad) for name, layer in layers.items()}
    plan = mf.plan(experts, weights.detach(), point.experts, like=x)
    if point.ranks > 1:
        lowest = floor(x, plan)
    else:
        rows = x.detach().new_ones(point.tokens * point.k, point.dim)
        lowest = partial(torch.empty_like(rows).copy_, rows)
    times = interleaved(steps | {FLOOR: lowest}, device, REPEATS, SECONDS)
    lines = []
    for name in times:
        line = compared(times, name, MOECOMM) | point._asdict() | {"dtype": str(dtype).removeprefix("torch.")}
        if amounts and name != FLOOR:
            forward = partial(layers[name], x, experts, weights, point.experts, same)
            line |= {"peak": max(gathered(peak(steps[name], device))), "saved": max(gathered(saved(forward, (x, experts, weights))))}
        lines.append(line)
    return lines


def layers_at(device: str, point: Point, dtype: torch.dtype) -> dict[str, Layer]:
    if dist.is_initialized():
        for layer in ON_RANKS.values():
            check(layer, dtype, min(point.k, 16))
        return ON_RANKS
    return ways(device, dtype, without=(MASKS,))  # which are of [T, E, C]


if __name__ == "__main__":
    main()
