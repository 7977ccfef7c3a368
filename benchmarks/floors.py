"""How far each op is from the floor: one copy of the rows it writes or reads, on the same device, in the same run.

    python -m benchmarks.floors            # or: make bench
    python -m benchmarks.floors --device cuda

Each line: the ratio first, then what it is a ratio to. Every op is checked against plain torch before it is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import moecomm.functional as mf
from moecomm.ops.gather import gather
from moecomm.ops.weighted_sum import weighted_sum
from moecomm.ops.weighted_sum_backward import weighted_sum_backward

TOKENS, DIM, EXPERTS, TOP_K = 4096, 1024, 64, 8
REPEATS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    lines = [line for dtype in (torch.float32, torch.bfloat16) for line in measure(device, dtype)]
    for line in lines:
        print(f"{line['ratio']:6.2f} ({line['low']:.2f} to {line['high']:.2f})  {line['op']}, {line['dtype']}: to {line['to']}")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    about = {"device": name, "torch": torch.__version__, "tokens": TOKENS, "dim": DIM, "experts": EXPERTS, "top_k": TOP_K}
    file = Path(__file__).parent / "results" / f"floors_{device}.json"
    file.write_text(json.dumps({"about": about, "lines": lines}, indent=1) + "\n")


def measure(device: str, dtype: torch.dtype) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, DIM, generator=generator).to(device, dtype)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    experts, weights = scores.topk(TOP_K).indices.to(device), torch.rand(TOKENS, TOP_K, generator=generator).to(device, dtype)
    plan = mf.plan(experts, weights, EXPERTS)
    order, position = plan.row_order, plan.row_position
    rows = gather(x, order, position)  # [N, D], N = T * K
    grad = torch.randn_like(x)
    check(x, rows, weights, grad, order, position)
    target = torch.empty_like(rows)
    copy = lambda: target.copy_(rows)  # noqa: E731 - into memory that is already mapped
    cases = {
        "gather": lambda: gather(x, order, position),
        "weighted_sum": lambda: weighted_sum(rows, weights, order, position),
        "weighted_sum_backward": lambda: weighted_sum_backward(grad, rows, weights, order, position),
        "plan": lambda: mf.plan(experts, weights, EXPERTS),
    }
    times = interleaved({"copy": copy, **cases}, device)
    lines = []
    for op in cases:
        ratios = [a / b for a, b in zip(times[op], times["copy"], strict=True)]
        line = {"op": op, "dtype": str(dtype).removeprefix("torch."), "ratio": statistics.median(ratios), "low": min(ratios)}
        lines.append(line | {"high": max(ratios), "to": f"one copy of the {TOKENS} x {TOP_K} rows of {DIM}"})
    return lines


def check(x: Tensor, rows: Tensor, weights: Tensor, grad: Tensor, order: Tensor, position: Tensor) -> None:
    """Raise unless the ops give what plain torch does."""
    token = order.long() // TOP_K
    torch.testing.assert_close(rows, x[token])
    slots = rows[position.long()]  # [T, K, D]
    loose = {"rtol": 2e-2, "atol": 5e-2} if x.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    expected = torch.einsum("tk,tkd->td", weights.double(), slots.double())
    torch.testing.assert_close(weighted_sum(rows, weights, order, position).double(), expected, **loose)
    grad_rows, grad_weights = weighted_sum_backward(grad, rows, weights, order, position)
    torch.testing.assert_close(grad_rows, (weights.flatten()[order.long(), None] * grad[token]), **loose)
    dots = torch.einsum("td,tkd->tk", grad.double(), slots.double())
    torch.testing.assert_close(grad_weights.double(), dots, rtol=loose["rtol"], atol=1.0 if x.dtype == torch.bfloat16 else 1e-2)


def interleaved(cases: dict[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Seconds of each case, repeat by repeat, so that what else the machine does falls on all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(REPEATS + 2):
        for name, case in cases.items():
            synchronize(device)
            start = time.perf_counter()
            case()
            synchronize(device)
            if repeat >= 2:  # the first ones warm up
                times[name].append(time.perf_counter() - start)
    return times


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
