"""How much of an exchange does a shared expert hide, compiled with `overlap_exchanges` and without, in one run?

    python -m benchmarks.overlap

Two processes with one thread each. The layer runs beside a shared expert that takes about as long as the layer's two exchanges of rows.
"Hidden" is the time that the pass saves, relative to the shorter of the two. It compares the medians of alternating repeats, and gives the
quartiles of their differences. Every compiled result is checked against eager mode before it is timed. There are two networks:

- gloo: localhost. Its exchange is a copy by the same cores that the experts run on.
- paced: gloo, but an exchange arrives no sooner than its bytes would at `SPEED`, and waiting uses no processor. It shows what the order
  alone hides.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import silu

import moecomm.functional as mf
from benchmarks.lanes import draw
from moecomm.compile.overlap import overlap_exchanges
from moecomm.compile.passes import options
from tests.spawn import run_ranks

RESULTS, PICTURE = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs" / "overlap.png"
DIM, HIDDEN, EXPERTS, TOP_K = 512, 16, 8, 2
TOKENS = {"gloo": 4096, "paced": 256}
SPEED = 20e6  # bytes a second that the paced network moves for a rank
REPEATS = 15


class Paced(dist._Work):
    """A piece of work that ends no sooner than ``end``."""

    def __init__(self, work: Any, end: float) -> None:
        super().__init__()
        self.work, self.end = work, end

    def wait(self, timeout: Any = None) -> bool:
        self.work.wait()
        time.sleep(max(0.0, self.end - time.perf_counter()))
        return True


def main() -> None:
    lines = []
    for network in ("paced", "gloo"):
        for backward in (False, True):
            (line, profile), (_, other) = run_ranks(measure, 2, network, backward, timeout=1500)
            lines.append(line)
            if (network, backward) == ("paced", False):
                draw([profile, other], PICTURE)
            print(
                f"{line['hidden']:5.0%} ({line['low']:.0%} to {line['high']:.0%})  of {line['shorter']:.1f} ms hidden, {line['case']}: ",
                end="",
            )
            print(f"{line['without']:.1f} ms without the pass, {line['with']:.1f} ms with it")
    about = {"device": f"{platform.machine()} CPU, 2 processes of 1 thread", "torch": torch.__version__, "tokens": TOKENS, "dim": DIM}
    RESULTS.joinpath("overlap_cpu.json").write_text(json.dumps({"about": about, "lines": lines}, indent=1) + "\n")


def measure(network: str, backward: bool) -> tuple[dict[str, Any], Path]:
    """On each rank: the line, and the file that holds a profile of one call with the pass."""
    torch._dynamo.reset()
    with patch.object(dist, "all_to_all_single", paced(dist.all_to_all_single) if network == "paced" else dist.all_to_all_single):
        x, weights, ids, parameters = inputs(TOKENS[network])
        exchange = time_of_exchanges(x, ids, weights, parameters, backward)
        width = 64
        for _ in range(3):  # as wide as takes about as long
            shared = timed(ready(shared_expert, backward, x, *wide(width)))
            width = max(16, min(8192, round(width * agreed(exchange / shared) / 16) * 16))
        shared = agreed(statistics.median(timed(ready(shared_expert, backward, x, *wide(width))) for _ in range(5)))
        arguments = (x, ids, weights, *parameters, *wide(width))
        variants = {
            "without": torch.compile(block, fullgraph=True),
            "with": torch.compile(block, fullgraph=True, options=options(overlap_exchanges)),
        }
        want = ready(block, backward, *arguments)()
        for variant in variants.values():
            for one, right in zip(ready(variant, backward, *arguments)(), want, strict=True):
                torch.testing.assert_close(one, right, rtol=1e-3, atol=1e-3)
        times = {name: [] for name in variants}
        for _ in range(REPEATS):
            for name, variant in variants.items():
                times[name].append(agreed(timed(ready(variant, backward, *arguments))))
        profile = trace(variants["with"], backward, arguments)
    shorter = min(exchange, shared)
    saved = [(a - b) / shorter for a, b in zip(times["without"], times["with"], strict=True)]
    medians = {name: 1e3 * statistics.median(series) for name, series in times.items()}
    lengths = {"exchange": 1e3 * exchange, "shared": 1e3 * shared, "shorter": 1e3 * shorter, "width": width}
    case = f"{network}, {'backward' if backward else 'forward'}"
    hidden = (medians["without"] - medians["with"]) / lengths["shorter"]
    low, _, high = statistics.quantiles(saved, n=4)
    line = {"case": case, "hidden": hidden, "low": low, "high": high} | medians | lengths
    return line, profile


def paced(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(output: Tensor, send: Tensor, *splits: Any, **keywords: Any) -> Paced:
        end = time.perf_counter() + send.nbytes / SPEED
        return Paced(real(output, send, *splits, **keywords), end)

    return call


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    seed = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(tokens, DIM, generator=seed).requires_grad_()
    ids = torch.rand(tokens, EXPERTS, generator=seed).topk(TOP_K).indices
    shapes = ((EXPERTS // 2, HIDDEN, DIM), (EXPERTS // 2, DIM, HIDDEN))
    parameters = [(torch.randn(*shape, generator=seed) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]
    return x, torch.rand(tokens, TOP_K, generator=seed).requires_grad_(), ids, parameters


def wide(width: int) -> tuple[Tensor, Tensor]:
    return (torch.ones(DIM, width) / DIM).requires_grad_(), (torch.ones(width, DIM) / width).requires_grad_()


def layer(x: Tensor, ids: Tensor, weights: Tensor, into: Tensor, out: Tensor) -> Tensor:
    plan = mf.plan(ids, weights, EXPERTS, like=x)
    rows = mf.dispatch(x, plan)
    return mf.combine(rows * (1 + into.mean() * out.mean()), plan)  # experts that take next to no time: the exchange is what is looked at


def shared_expert(x: Tensor, into: Tensor, out: Tensor) -> Tensor:
    return silu(x @ into) @ out


def block(x: Tensor, ids: Tensor, weights: Tensor, into: Tensor, out: Tensor, shared_into: Tensor, shared_out: Tensor) -> Tensor:
    return layer(x, ids, weights, into, out) + shared_expert(x, shared_into, shared_out)


def ready(function: Callable[..., Tensor], backward: bool, *arguments: Tensor) -> Callable[[], Sequence[Tensor]]:
    """What is to be timed: the forward alone, or, when that is through, the backward."""
    if not backward:
        return lambda: [torch.no_grad()(function)(*arguments)]
    y = function(*arguments)
    return partial(torch.autograd.grad, y, [each for each in arguments if each.requires_grad], torch.ones_like(y))


def timed(function: Callable[[], Any]) -> float:
    dist.barrier()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def agreed(seconds: float) -> float:
    """The longest of the ranks'."""
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


def time_of_exchanges(x: Tensor, ids: Tensor, weights: Tensor, parameters: list[Tensor], backward: bool) -> float:
    """Seconds that the layer's exchanges take, each by itself."""
    calls: list[Any] = []
    real = dist.all_to_all_single

    def keep(output: Tensor, send: Tensor, *splits: Any, **keywords: Any) -> Any:
        calls.append((output.clone(), send.clone(), *splits))
        return real(output, send, *splits, **keywords)

    call_layer = ready(layer, backward, x, ids, weights, *parameters)
    with patch.object(dist, "all_to_all_single", keep):
        call_layer()
    group = dist.group.WORLD
    return agreed(sum(statistics.median(timed(lambda: real(*call, group=group, async_op=True).wait()) for _ in range(5)) for call in calls))  # noqa: B023


def trace(function: Callable[..., Tensor], backward: bool, arguments: tuple[Tensor, ...]) -> Path:
    """A profile of one call, which `benchmarks.lanes` draws."""
    file = Path(tempfile.gettempdir()) / f"overlap_rank{dist.get_rank()}.json"
    call = ready(function, backward, *arguments)
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    profile.export_chrome_trace(str(file))
    return file


if __name__ == "__main__":
    main()
