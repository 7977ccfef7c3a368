"""How close is each op to one copy of the T * K rows into memory that is already mapped, on the same device, in the same run?

    python -m benchmarks.floors            # or: make bench
    python -m benchmarks.floors --device cuda

Every op is checked against plain torch before it is timed. On a GPU the measure is the share of the copy's bandwidth: a gather reads and
writes N rows, a sum reads N and writes T. It also times the plan in static mode, alone and as a CUDA graph.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import moecomm.functional as mf
from benchmarks.captured import captured
from benchmarks.inputs import routed
from benchmarks.timing import Line, command, compared, interleaved, said
from moecomm.ops.rows.gather import gather
from moecomm.ops.rows.weighted_sum import weighted_sum
from moecomm.ops.rows.weighted_sum_backward import weighted_sum_backward


class Sizes(NamedTuple):
    tokens: int
    dim: int
    experts: int
    k: int


ON_CPU = (Sizes(4096, 1024, 64, 8),)
ON_GPU = (Sizes(8192, 7168, 256, 8), Sizes(16384, 2048, 128, 8))
REPEATS = 15
COPY = "copy"
STATIC, GRAPH = "plan, static", "plan, static, in a CUDA graph"


def main() -> None:
    command("floors", measure, lambda device: {"sizes": [each._asdict() for each in (ON_GPU if device == "cuda" else ON_CPU)]}, __doc__)


def measure(device: str, memory: str) -> list[Line]:
    if device == "cuda":
        return [line for size in ON_GPU for line in said(ops(device, torch.bfloat16, size), memory)]
    return [line for size in ON_CPU for dtype in (torch.float32, torch.bfloat16) for line in said(ops(device, dtype, size), memory)]


def ops(device: str, dtype: torch.dtype, size: Sizes) -> list[Line]:
    x, experts, exact, grad = routed(size.tokens, size.dim, size.experts, size.k, dtype, device)
    x, weights = x.detach(), exact.detach()
    plan = mf.plan(experts, weights, size.experts, like=x)
    order, position = plan.row_order, plan.row_position
    rows = gather(x, order, position)  # [N, D], N = T * K
    check(x, rows, weights, grad, order, position)
    target = torch.empty_like(rows)
    cases = {
        "gather": partial(gather, x, order, position),
        "weighted_sum": partial(weighted_sum, rows, weights, order, position),
        "sum": partial(weighted_sum, rows, None, order, position),  # the backward of a gather
        "weighted_sum_backward": partial(weighted_sum_backward, grad, rows, weights, order, position),
        "plan": partial(mf.plan, experts, weights, size.experts, like=x),
    }
    if dtype != torch.float32:  # a layer's weights are float32
        cases["weighted_sum, weights of the same dtype"] = partial(weighted_sum, rows, weights.to(dtype), order, position)
    if device == "cuda":
        cases[STATIC] = partial(mf.plan, experts, weights, size.experts, like=x, max_rows=size.tokens)
        cases[GRAPH] = captured(cases[STATIC])
    times = interleaved({COPY: lambda: target.copy_(rows), **cases}, device, REPEATS)
    base = {"what": "op", "dtype": str(dtype).removeprefix("torch.")} | size._asdict()
    lines = [compared(times, op, COPY) | base for op in cases]
    summed = (1 + 1 / size.k) / 2  # of a copy's bytes: N rows read and T written, where a copy reads and writes N
    for op, bytes_of_a_copy in (("gather", 1.0), ("weighted_sum", summed), ("sum", summed)):
        lines.append(
            compared(times, COPY, op, scale=bytes_of_a_copy) | base | {"case": op, "to": "a copy's bandwidth", "what": "bandwidth"}
        )
    return lines


def check(x: Tensor, rows: Tensor, weights: Tensor, grad: Tensor, order: Tensor, position: Tensor) -> None:
    """Raise unless the ops give what plain torch does."""
    token, part = order.long() // position.shape[1], slice(0, 512)  # a part of the tokens, where float64 of all would not fit
    torch.testing.assert_close(rows, x[token])
    slots = rows[position[part].long()].double()  # [512, K, D]
    loose = {"rtol": 2e-2, "atol": 5e-2} if x.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    expected = torch.einsum("tk,tkd->td", weights[part].double(), slots)
    torch.testing.assert_close(weighted_sum(rows, weights, order, position)[part].double(), expected, **loose)
    torch.testing.assert_close(weighted_sum(rows, None, order, position)[part].double(), slots.sum(1), **loose)
    grad_rows, grad_weights = weighted_sum_backward(grad, rows, weights, order, position)
    torch.testing.assert_close(grad_rows, (weights.flatten()[order.long(), None] * grad[token]).to(x.dtype), **loose)
    dots = torch.einsum("td,tkd->tk", grad[part].double(), slots)
    torch.testing.assert_close(grad_weights[part].double(), dots, rtol=loose["rtol"], atol=1.0 if x.dtype == torch.bfloat16 else 1e-2)


if __name__ == "__main__":
    main()
