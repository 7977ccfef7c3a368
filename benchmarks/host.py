"""How long does the host take for the calls of a layer in eager mode, where the tensors are next to nothing?

    python -m benchmarks.host              # or: make bench
    python -m benchmarks.host --device cuda

On one process, by the host's clock. It starts when the GPU is idle, and stops when the last of several calls returns. Nothing waits for the
kernels but what reads from the GPU: `k_fold`, and a `plan` that is not static. The time is divided by the number of calls. On a CPU the
calls compute, too. Each layer is checked against a dense one in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import moecomm.functional as mf
from benchmarks.experts import static
from benchmarks.inputs import routed, same, step
from benchmarks.peers import MOECOMM, ON_ONE, check
from benchmarks.timing import WARM, Line, command, compared, interleaved, said


class Sizes(NamedTuple):
    tokens: int
    dim: int
    experts: int
    k: int


SIZES = Sizes(256, 512, 16, 4)
CALLS, REPEATS = {"cpu": 5, "cuda": 20}, 15
STATIC, HERE, FORWARD = "step, static", "step, backward on the calling thread", "k_fold, forward"


def main() -> None:
    command("host", measure, lambda device: {"sizes": SIZES._asdict(), "calls": CALLS[device]}, __doc__)


def measure(device: str, memory: str) -> list[Line]:
    """With warm memory alone: fresh pages are no time of the calls."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return said(calls(device, dtype, SIZES), memory) if memory == WARM else []


def calls(device: str, dtype: torch.dtype, size: Sizes) -> list[Line]:
    layers = {"step": ON_ONE[MOECOMM], STATIC: static, "k_fold, step": ON_ONE["k_fold"]}
    for layer in layers.values():
        check(layer, dtype, size.k, dropped=0.0, device=device)  # as timed. Its experts would read the padding of a static plan
    x, experts, weights, grad = routed(size.tokens, size.dim, size.experts, size.k, dtype, device)
    plan = mf.plan(experts, weights, size.experts, like=x)
    rows = mf.dispatch(x, plan).detach().requires_grad_()
    steps = {name: partial(step, layer, x, experts, weights, size.experts, grad) for name, layer in layers.items()}
    cases: dict[str, Callable[[], object]] = {
        "plan": partial(mf.plan, experts, weights, size.experts, like=x),
        "plan, static": partial(mf.plan, experts, weights, size.experts, like=x, max_rows=size.tokens),
        "dispatch": partial(mf.dispatch, x, plan),
        "combine": partial(mf.combine, rows, plan),
        "step": steps["step"],
        HERE: partial(on_this_thread, steps["step"]),
        STATIC: steps[STATIC],
        "k_fold, step": steps["k_fold, step"],
        FORWARD: partial(ON_ONE["k_fold"], x, experts, weights, size.experts, same),
    }
    number = CALLS[device]
    times = interleaved({name: partial(again, case, number) for name, case in cases.items()}, "cpu", REPEATS)  # by the host's clock
    of_one = {name: [seconds / number for seconds in each] for name, each in times.items()}
    base = {"what": "host", "dtype": str(dtype).removeprefix("torch.")} | size._asdict()
    return [compared(of_one, name, FORWARD) | base for name in cases if name != FORWARD]


def again(case: Callable[[], object], number: int) -> None:
    for _ in range(number):
        case()


def on_this_thread(run: Callable[[], object]) -> object:
    """Without the hand-over to the thread that autograd has for each GPU."""
    with torch.autograd.set_multithreading_enabled(False):
        return run()


if __name__ == "__main__":
    main()
