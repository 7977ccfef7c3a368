"""Do the ranks stay equally full while a router changes, and what does that cost?

    python -m benchmarks.placement --trace gate_trace.npz

The trace is the gate of a real training: counts [snapshots, layers, P, E], one every 10 iterations. Each way of `benchmarks/balancers.py`
chooses from one snapshot and is measured at the next. Without ``--trace`` it is a generated one of like skew and drift. Then a layer on 2
and 4 gloo ranks is timed, with Zipf loads that drift, with and without moves. With 2 cores, 4 ranks share them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import silu

import moecomm.functional as mf
from benchmarks.balancers import SHADOWING, WAYS, Rows, fullest, moved, shadowed, shadows
from benchmarks.timing import RESULTS, Line, made_on
from moecomm.planner import imbalance, move_experts_, place
from tests.spawn import run_ranks

# What predicts the seconds of a step of the trace's layers on a GPU: of the experts alone, as all else is the same for all ways.
DIM, HIDDEN, RATE, LINK = 2048, 1408, 400e12, 50e9  # bfloat16 flop/s reached, and bytes/s between two ranks
ROW_SECONDS = 3 * 2 * 3 * DIM * HIDDEN / RATE  # SwiGLU, forward and backward
WEIGHTS = 3 * DIM * HIDDEN
EXPERT_BYTES = WEIGHTS * 14  # bfloat16 weights; float32 masters and both moments
EVERY = 10  # iterations between snapshots
SHADOW_SECONDS = WEIGHTS * 2 * 2 / LINK  # the weights there and the gradients back, in bfloat16, in each step

RANKS, EXPERTS, REPLICAS, TOKENS, STEPS, PLACED = (2, 4), 16, 2, 2048, 30, 5  # replicas: of a rank, beyond an equal part of the experts


def generated(snapshots: int = 60, layers: int = 2, ranks: int = 16, experts: int = 32, seed: int = 0) -> NDArray[np.int64]:
    """[snapshots, layers, P, E]: counts whose logarithms drift; one expert of a layer has about 6 ranks' mean load."""
    random = np.random.default_rng(seed)
    logs = random.normal(0, 1.6, (layers, experts))
    logs[:, 0] = logs.max(1) + 1
    counts = []
    for _ in range(snapshots):
        logs += random.normal(0, 0.03, logs.shape)
        shares = np.exp(logs) / np.exp(logs).sum(1, keepdims=True)
        counts.append([random.multinomial(16384, share, size=ranks) for share in shares])
    return np.array(counts)


def replayed(counts: NDArray[np.int64]) -> list[Line]:
    """A line for each way: imbalance, and what moved in each snapshot's 10 iterations, over all layers and snapshots."""
    snapshots, layers, ranks, experts = counts.shape
    mean = counts[0, 0].sum() / ranks
    lines = []
    for name, way in WAYS.items():
        ratios, shares, seconds, taken = [], [], [], 0.0
        for layer in range(layers):
            rows: Rows = np.resize(np.arange(experts), (ranks, way.slots)).tolist()
            for now in range(snapshots - 1):
                start = time.process_time()
                after = way.choose(counts[now, layer], rows)
                taken += time.process_time() - start
                received = moved(after, rows)
                ratios.append(fullest(counts[now + 1, layer], after))
                shares.append(sum(received) / (ranks * way.slots))
                seconds.append(ratios[-1] * mean * ROW_SECONDS + max(received) * EXPERT_BYTES / LINK / EVERY)
                rows = after
        lines.append(summary(name, way.source, way.slots, ratios, shares, seconds, EXPERT_BYTES * way.slots / EVERY))
        lines[-1] |= {"milliseconds to choose": 1e3 * taken / len(ratios)}
        lines[-1] |= {"over time": np.median(np.array(ratios).reshape(layers, -1), 0).tolist()}
        print(name, {key: value for key, value in lines[-1].items() if key != "over time"}, flush=True)
    return [*lines, shadowing(counts)]


def shadowing(counts: NDArray[np.int64]) -> Line:
    """FasterMoE chooses in each step, from that step's counts: it needs no prediction, and sends weights in every step."""
    snapshots, layers, ranks, experts = counts.shape
    rows: Rows = np.arange(experts).reshape(ranks, -1).tolist()
    ratios, shares, seconds = [], [], []
    for layer in range(layers):
        for now in range(1, snapshots):
            chosen = shadows(counts[now, layer], rows, ROW_SECONDS, SHADOW_SECONDS)
            loads = shadowed(counts[now, layer], rows, chosen)
            ratios.append(float(loads.max() / loads.mean()))
            shares.append(len(chosen) / len(rows[0]))
            seconds.append(float(loads.max()) * ROW_SECONDS + len(chosen) * SHADOW_SECONDS)
    line = summary(*SHADOWING, len(rows[0]), ratios, shares, seconds, WEIGHTS * 2 * 2 * len(rows[0]))
    return line | {"over time": np.median(np.array(ratios).reshape(layers, -1), 0).tolist()}


def summary(
    name: str, source: str, slots: int, ratios: list[float], shares: list[float], seconds: list[float], whole: float
) -> Line:  # fmt: skip
    """``whole``: the bytes that a rank receives in an iteration if all its slots move in each snapshot."""
    return {
        "what": "replay", "case": name, "source": source, "slots": slots, "median": float(np.median(ratios)),
        "mean": float(np.mean(ratios)), "90 %": float(np.quantile(ratios, 0.9)), "moved": float(np.mean(shares)),
        "bytes": float(np.mean(shares)) * whole, "milliseconds": 1e3 * float(np.mean(seconds)),
    }  # fmt: skip


def drawn(step: int, rank: int) -> Tensor:
    """[TOKENS, 2]: experts by a Zipf law of exponent 1.2, whose order of experts turns by one in 10 steps."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    shares = (torch.arange(EXPERTS) + 1.0) ** -1.2
    return (torch.multinomial(shares.expand(TOKENS, -1), 2, generator=generator) + step // 10) % EXPERTS


def steps_here(moving: bool) -> list[tuple[float, float, float]]:
    """Of each step: seconds, this rank's CPU seconds, and the imbalance. Placing and moving belong to the step before."""
    rank, ranks, dim, hidden = dist.get_rank(), dist.get_world_size(), 128, 256
    slots = EXPERTS // ranks + REPLICAS
    rows = [[(p * EXPERTS // ranks + slot) % EXPERTS for slot in range(slots)] for p in range(ranks)]
    torch.manual_seed(0)
    whole = torch.randn(EXPERTS, dim, hidden) / 16, torch.randn(EXPERTS, hidden, dim) / 16
    experts = [each[rows[rank]].clone().requires_grad_() for each in whole]
    optimizer = torch.optim.AdamW(experts, lr=1e-4)
    x, loads, measured = torch.randn(TOKENS, dim), torch.zeros(EXPERTS), []
    for step in range(STEPS):
        chosen = drawn(step, rank)
        dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        plan = mf.plan(chosen, torch.full(chosen.shape, 0.5), EXPERTS, placement=rows)
        parts = mf.dispatch(x, plan).split(plan.offsets.diff(prepend=plan.offsets.new_zeros(1)).tolist())
        out = torch.cat([silu(part @ into) @ back for part, into, back in zip(parts, *experts, strict=True)])
        mf.combine(out, plan).square().mean().backward()
        mf.sync_replica_grads_(experts, rows)
        optimizer.step()
        optimizer.zero_grad()
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        dist.all_reduce(counts)
        loads = loads / 2 + counts
        ratio = imbalance(counts, rows)
        if moving and step % PLACED == PLACED - 1:
            new = place(loads, ranks, slots, current=rows)
            move_experts_(experts, optimizer, rows, new)
            rows = new
        measured.append((time.perf_counter() - start, time.process_time() - busy, ratio))
    return measured


def timed(ranks: int, repeats: int = 3) -> list[Line]:
    """A line each, with and without moves: medians over repeats of a whole run's means, of the slowest rank in each step."""
    found: dict[bool, list[NDArray[np.float64]]] = {False: [], True: []}
    for _ in range(repeats):
        for moving in found:
            found[moving].append(np.array(run_ranks(steps_here, ranks, moving, timeout=200)).max(0).mean(0))  # [ranks, steps, 3] -> [3]
    lines = []
    for moving, runs in found.items():
        seconds, busy, ratio = np.median(np.array(runs), 0).tolist()
        name = f"moved every {PLACED} steps" if moving else "never moved"
        base = {"what": "a layer", "ranks": ranks, "case": name}
        lines.append(base | {"milliseconds": 1e3 * seconds, "CPU milliseconds": 1e3 * busy, "mean": ratio})
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    trace = parser.parse_args().trace
    load, start = os.getloadavg()[0], time.monotonic()
    counts = generated() if trace is None else np.load(trace)["counts"].astype(np.int64)
    lines = [line for ranks in RANKS for line in timed(ranks)] + replayed(counts)
    about = made_on("cpu") | {"on": "cpu", "load before": load, "seconds": time.monotonic() - start}
    about |= {"trace": "generated" if trace is None else trace.name, "shape": list(counts.shape), "even milliseconds": even(counts)}
    (RESULTS / "placement_cpu.json").write_text(json.dumps({"about": about, "lines": lines}, indent=1) + "\n")


def even(counts: NDArray[np.int64]) -> float:
    """The milliseconds of a step of ranks that are equally full."""
    return 1e3 * float(counts[0, 0].sum()) / counts.shape[2] * ROW_SECONDS


if __name__ == "__main__":
    main()
