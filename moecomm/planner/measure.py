"""calibrate: measure the numbers of a `Cluster` on the ranks of a group, in seconds. All ranks work at the same time, as in a training.

A layer of a transformer is run forward and backward: with few tokens, for what the host takes, on each rank alone and with experts on all
ranks; and with many tokens. What is left of that beside host and matmuls is work that reads and writes. Ranks that share cores slow each
other down: so the numbers are lower than those of a rank alone, and a matmul of one rank, while the others wait, says how much.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moecomm.ops.base.process_group import process_group
from moecomm.parallel.group import GroupLike, resolve_group
from moecomm.parallel.slices import slice_gather, slice_reduce
from moecomm.planner.clock import REPEATS, Ranks, everyones, now, seconds
from moecomm.planner.cluster import Cluster, exchange, gather
from moecomm.planner.layer import Layer, trained
from moecomm.planner.links import links, to_all_to_all
from moecomm.planner.model import Model

FEW, MANY = 16, 1024  # tokens of the layers that show what the host takes, and what the work takes
STREAM = 2**22  # float32 numbers of a long sum
EXCHANGES = 6  # of a layer with few tokens: counts, tokens and sums forward, both gradients and those of the weights backward
WIDE = Model(layers=1, dim=1024, hidden=1024, experts=8, k=2, heads=8, kv_heads=8, head=128, vocabulary=1024, sequence=2048)


class Rates(NamedTuple):
    """What a rank reaches, and the seconds that its host takes."""

    matmul: float  # FLOP/s
    grouped: float
    attention: float
    copy: float  # bytes/s
    stream: float
    launch: float  # a layer
    routed: float  # a layer with experts on all ranks
    sliced: float  # a gather of slices with its mirror


def calibrate(
    group: GroupLike = None,
    model: Model | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Cluster:
    """Measure this machine, or these: links, matmul rates, memory. Every rank of the group must call it; all get the same numbers.

    Args:
        group: the ranks that a training will have. Ranks of a node are consecutive, as torchrun starts them, LOCAL_WORLD_SIZE at a time.
            In a group of fewer ranks than the world, one link stands for those inside a node and between nodes.
        model: matmuls and layers have its widths, since small ones are slower. None: widths of 1024.
        device: "cpu", or "cuda" for each rank's current GPU. There, what the host takes counts as hidden behind the GPU's work.
        dtype: of the computation. None: bfloat16 on a GPU, float32 on a CPU.
        clock: gives the time in seconds.

    Returns:
        A `Cluster`, the same on every rank: the mean of the ranks' rates, and links fitted to exchanges of two sizes between two ranks of
        a node and between all.

    It takes some seconds. It makes process groups of the nodes, of pairs and across nodes, and destroys them.

    Example:
        >>> small = Model(layers=1, dim=32, hidden=32, experts=4, k=2, heads=2, kv_heads=2, head=16, vocabulary=64, sequence=32)
        >>> here = calibrate(model=small)
        >>> here.matmul > 0, here.launch > 0
        (True, True)
    """
    ranks = Ranks(*resolve_group(group), device, clock)
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    model = model or WIDE
    node = min(ranks.size, int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)))
    rates = _rates(ranks, model, dtype)
    inside, between = links(ranks, node)
    gathers, scatters = to_all_to_all(ranks)
    memory = float(torch.stack(everyones(torch.tensor([_memory(device, node)], dtype=torch.float64), ranks)).mean())
    name = f"this machine's {device}" if node == ranks.size else f"these nodes' {device}"
    found = Cluster(
        name, node, inside, between, memory, *rates[:5],
        gathers=gathers,
        scatters=scatters,
        spare=_spare(ranks, node, model, dtype),
        sources=(f"measured on {ranks.size} ranks",),
    )  # fmt: skip
    if device == "cuda":
        return found
    sent, gathered = float(exchange(found, ranks.size, 0)), float(gather(found, ranks.size, 0))
    routed, sliced = rates.routed - rates.launch - EXCHANGES * sent, rates.sliced - gathered - sent
    return found._replace(launch=rates.launch, routed=max(0.0, routed), sliced=max(0.0, sliced))


def _dense(model: Model, device: str, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """A matmul as that of queries, keys and values, forward and backward; and its FLOPs."""
    rows, d = max(MANY, model.sequence), model.dim
    x, weight = (torch.randn(*shape, dtype=dtype, device=device).requires_grad_() for shape in ((rows, d), (3 * d, d)))
    return trained(lambda: F.linear(x, weight)), 18.0 * rows * d * d


def _rates(ranks: Ranks, model: Model, dtype: torch.dtype) -> Rates:
    """What each rank reaches while all work."""
    length = min(model.sequence, MANY)
    tokens, experts = MANY // length * length, min(model.experts, 8)
    layer = Layer(model, experts, ranks.device, dtype)
    dense, flops = _dense(model, ranks.device, dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=ranks.device).requires_grad_()

    rows = tokens * layer.k // experts
    offsets = torch.arange(1, experts + 1, dtype=torch.int32, device=ranks.device) * rows
    received, products = random(experts * rows, model.dim), random(experts * rows, model.hidden)
    q, k, v = (random(tokens // length, model.heads, length, model.head) for _ in range(3))
    total, part = torch.zeros(STREAM, device=ranks.device), torch.ones(STREAM, device=ranks.device)
    few, many = random(1, FEW, model.dim), random(tokens // length, length, model.dim)
    small = Layer(model, layer.k, ranks.device, dtype)  # with few weights
    spread = Layer(model, layer.k, ranks.device, dtype, ranks.name, ranks.size)
    matmul, up, down, attention, stream, launch, routed, sliced, whole = seconds(
        ranks,
        dense,
        trained(lambda: F.grouped_mm(received, layer.into.transpose(1, 2), offs=offsets)),
        trained(lambda: F.grouped_mm(products, layer.out.transpose(1, 2), offs=offsets)),
        trained(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        lambda: total.add_(part),
        trained(lambda: small(few)),
        trained(lambda: spread(few)),
        trained(lambda: slice_reduce(slice_gather(few[0], ranks.name, grad="reduce"), ranks.name)),
        trained(lambda: layer(many)),
    )
    of_dense, of_experts, of_attention = layer.flops(tokens, length)
    experts_took = (up + down) * of_experts / (18 * experts * rows * model.dim * model.hidden)
    known = matmul * of_dense / flops + experts_took + attention
    host = 0.0 if ranks.device == "cuda" else launch  # there it is behind the GPU's work
    rest = max(whole - host - known, 0.05 * whole)
    return Rates(
        flops / matmul,
        of_experts / experts_took,
        of_attention / attention,
        layer.moved(tokens, many.element_size()) / rest,
        12 * STREAM / stream,
        launch,
        routed,
        sliced / 2,
    )


def _spare(ranks: Ranks, node: int, model: Model, dtype: torch.dtype) -> float:
    """How many times as fast the first rank of a node computes while the others wait; the two cases take turns."""
    if node == 1:
        return 1.0
    dense, _ = _dense(model, ranks.device, dtype)
    mine = process_group(ranks.name).rank() % node == 0
    taken = np.zeros((2, REPEATS))  # alone, and together
    dense()
    for repeat in range(REPEATS):
        for together in (0, 1):
            everyones(torch.zeros(1), ranks)
            begun = now(ranks)
            if mine or together:
                dense()
            taken[together, repeat] = now(ranks) - begun
            everyones(torch.zeros(1), ranks)
    every = torch.stack(everyones(torch.from_numpy(np.median(taken, 1)), ranks)).numpy()  # [ranks, 2]
    return max(1.0, float(every[:, 1].mean() / every[::node, 0].mean()))


def _memory(device: str, node: int) -> float:
    """Bytes that a rank can use: of its GPU, or its part of the machine's memory."""
    if device == "cuda":
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / node)
