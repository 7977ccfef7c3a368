"""--split auto: measure this machine in seconds, predict every split of the ranks that fits the model, and take the fastest."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch

from moecomm.planner import Cluster, Model, Row, Split, Way, assess, calibrate
from tutorials.demo.model import Shape
from tutorials.demo.parallel import compute_dtype
from tutorials.demo.splits import microbatches, misfits, of_ranks


def choose(options: Namespace, shape: Shape) -> tuple[Namespace, list[Row], Cluster]:
    """The options with the split that is predicted to be fastest, every prediction, the fastest first, and what was measured.

    Every rank must call it, and gets the same.
    """
    dtype = compute_dtype(options)
    model = model_of(shape, options.batch, dtype)
    cluster = calibrate(None, model, options.device, dtype)
    rows = sorted(assess(model, cluster, list(candidates(options, shape))), key=lambda row: (row.seconds, row.split))
    fitting = [row for row in rows if row.memory.total() <= cluster.memory] or rows
    best = fitting[0].split
    return Namespace(**vars(options) | {"pp": best.pp, "tp": best.tp, "ep": best.ep, "etp": best.etp}), fitting, cluster


def model_of(shape: Shape, batch: int, dtype: torch.dtype) -> Model:
    """The demo's model, as the planner knows one."""
    return Model(
        layers=shape.layers, dim=shape.dim, hidden=shape.hidden, experts=shape.experts, k=shape.top_k,
        heads=shape.heads, kv_heads=shape.heads, head=shape.dim // shape.heads, vocabulary=shape.vocabulary, shared=shape.shared,
        sequence=shape.context, batch=batch, itemsize=dtype.itemsize,
    )  # fmt: skip


def candidates(options: Namespace, shape: Shape) -> Iterator[tuple[Split, Way]]:
    """Yield every split of --ranks that the model takes, with the demo's number of microbatches."""
    for split, fitting in of_ranks(options, options.ranks):
        if not any(misfits(fitting, shape)):
            yield split, Way(microbatches(split.pp), fp8=False, static=False, recompute=0)


def said(options: Namespace, rows: list[Row], cluster: Cluster) -> str:
    """What was taken, and from what."""
    best, worst = rows[0], rows[-1]
    return (
        f"measured: {cluster.matmul / 1e9:.1f} GFLOP/s a rank, {1e3 * cluster.launch:.1f} ms a layer for the host, "
        f"links of {1e6 * cluster.inside.latency:.0f} us and {cluster.inside.speed / 1e9:.2f} GB/s\n"
        f"of {len(rows)} splits the fastest is predicted to take {1e3 * best.seconds:.0f} ms a step, "
        f"the slowest {1e3 * worst.seconds:.0f} ms: --pp {options.pp} --tp {options.tp} --ep {options.ep} --etp {options.etp}"
    )
