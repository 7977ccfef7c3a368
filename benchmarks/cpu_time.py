"""Where does the CPU time of one step go, for moecomm and for the K-fold exchange, on 4 gloo ranks?

    python -m benchmarks.cpu_time          # or: make bench

It explains the times of `benchmarks.layer`. Four ranks on two cores wait for a core most of the time. CPU time does not depend on how many
other programs run. It is the CPU time of the whole process, not only of the layer's thread: gloo has threads of its own. They receive, and
they send what a socket does not take at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.inputs import routed, step
from benchmarks.layer import DIM, EXPERTS, RANKS, TOKENS
from benchmarks.peers import MOECOMM, ON_RANKS
from benchmarks.timing import Line, command, exact, said
from tests.spawn import run_ranks

WAYS, TOP_K, DTYPES, REPEATS = (MOECOMM, "k_fold"), (1, 8), (torch.float32, torch.bfloat16), 5
STEP, THREADS, BETWEEN, OTHERS = "the whole step", "gloo's threads", "between the ops", "other ops"
SHOWN = 6  # ops that are named, the largest


def main() -> None:
    command("cpu_time", measure, sizes, __doc__)


def sizes(device: str) -> Line:
    return {"ranks": RANKS, "tokens": TOKENS, "dim": DIM, "experts": EXPERTS}


def measure(device: str, memory: str) -> list[Line]:
    lines = []
    for dtype in DTYPES:
        for k in TOP_K:
            lines += said(run_ranks(here, RANKS, dtype, k, timeout=600)[0], memory)
    return lines


def here(dtype: torch.dtype, k: int) -> list[Line]:
    """Of each way the parts of its CPU time, the mean of all ranks, and the ratio of the two wholes."""
    x, experts, weights, grad = routed(TOKENS, DIM, EXPERTS, k, dtype)
    base = {"what": f"CPU time, {RANKS} ranks", "dtype": str(dtype).removeprefix("torch."), "k": k}
    lines, whole = [], {}
    for name in WAYS:

        def steps(name: str = name) -> None:
            for _ in range(REPEATS):
                step(ON_RANKS[name], x, experts, weights, EXPERTS, grad)

        steps()
        parts = parts_of(steps)
        whole[name] = sum(parts.values())
        lines += [exact(part, STEP, seconds, whole[name]) | base | {"way": name} for part, seconds in parts.items()]
    return [*lines, exact("k_fold", MOECOMM, whole["k_fold"], whole[MOECOMM]) | base]


def parts_of(steps: Callable[[], None]) -> dict[str, float]:
    """Seconds of CPU time of a step, the mean of all ranks: of the largest ops, of the others, between the ops, and of gloo's threads."""
    dist.barrier()
    process, thread = time.process_time(), time.thread_time()
    steps()
    dist.barrier()  # until here others may still send
    process, thread = time.process_time() - process, time.thread_time() - thread
    with OpTimes() as ops:
        steps()
    process, thread, *each = means([process, thread, *ops.seconds.values()])  # all ranks run the same ops
    named = dict(sorted(zip(ops.seconds, each, strict=True), key=lambda op: -op[1])[:SHOWN])
    return named | {OTHERS: sum(each) - sum(named.values()), BETWEEN: max(0.0, thread - sum(each)), THREADS: process - thread}


def means(seconds: list[float]) -> list[float]:
    """For one step and rank."""
    total = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / (RANKS * REPEATS)).tolist()


class OpTimes(TorchDispatchMode):
    """The CPU time of this thread in each op that no other one calls, backward passes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        try:
            return op(*args, **(kwargs or {}))
        finally:
            self.seconds[op._opname] = self.seconds.get(op._opname, 0.0) + time.thread_time() - start


if __name__ == "__main__":
    main()
