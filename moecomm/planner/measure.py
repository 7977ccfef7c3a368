"""calibrate: measure the numbers of a `Cluster` on the ranks of a group, in seconds. All ranks work at the same time, as in a training.

A layer of a transformer is run twice, forward and backward: with few tokens, for what the host takes, and with many. What is left of the
second beside host and matmuls is work that reads and writes. Ranks that share cores slow each other down: so the numbers are lower than
those of a rank alone, and a last matmul of one rank, while the others wait, says how much.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moecomm.layer.combine import combine
from moecomm.layer.dispatch import dispatch
from moecomm.layer.make_plan import plan
from moecomm.layer.route import route
from moecomm.ops.base.process_group import process_group
from moecomm.ops.exchange.collectives import all_gathered, start_all_gather, start_all_to_all, wait
from moecomm.parallel.group import GroupLike, resolve_group
from moecomm.planner.cluster import Cluster, Link, fit_link
from moecomm.planner.cost import DENSE_PASSES, HIDDEN_PASSES, ROW_PASSES
from moecomm.planner.model import Model

FEW, MANY = 16, 1024  # tokens of the layers that show what the host takes, and what the work takes
STREAM = 2**22  # float32 numbers of a long sum
EXCHANGES = 4  # timed one behind the other
REPEATS = 5
SIZES = (1 << 10, 1 << 20)  # bytes to each rank
WIDE = Model(layers=1, dim=1024, hidden=1024, experts=8, k=2, heads=8, kv_heads=8, head=128, vocabulary=1024, sequence=2048)


class Ranks(NamedTuple):
    """Who measures, on what, with which clock."""

    name: str  # of the group
    size: int
    device: str
    clock: Callable[[], float]


class Rates(NamedTuple):
    """What one rank reaches."""

    matmul: float  # FLOP/s
    grouped: float
    attention: float
    copy: float  # bytes/s
    stream: float
    launch: float  # seconds a layer


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
    inside, between = _links(ranks, node)
    spare = _spare(ranks, node, model, dtype)
    mine = torch.tensor([*rates, _memory(device, node)], dtype=torch.float64)
    mean = np.array([each.numpy() for each in _everyones(mine, ranks)]).mean(0)
    matmul, grouped, attention, copy, stream, launch, memory = (float(each) for each in mean)
    return Cluster(
        f"this machine's {device}" if node == ranks.size else f"these nodes' {device}",
        node, inside, between, memory, matmul, grouped, attention, copy, stream,
        launch=0.0 if device == "cuda" else launch,
        spare=spare,
        sources=(f"measured on {ranks.size} ranks",),
    )  # fmt: skip


def _everyones(mine: Tensor, ranks: Ranks) -> list[Tensor]:
    """The vector of each rank, on the host."""
    if ranks.size == 1:
        return [mine]
    mine = mine[None].to(ranks.device)
    return list(all_gathered(start_all_gather(mine, ranks.size, ranks.name), mine, ranks.size).to("cpu"))


def _seconds(run: Callable[[], object], ranks: Ranks) -> float:
    """Of the median of some runs that all ranks start together; on the slowest rank."""
    run()
    taken = []
    for _ in range(REPEATS):
        _everyones(torch.zeros(1), ranks)
        begun = _now(ranks)
        run()
        taken.append(_now(ranks) - begun)
    times = torch.stack(_everyones(torch.tensor(taken, dtype=torch.float64), ranks))  # [ranks, repeats]
    return float(times.amax(0).median())


def _now(ranks: Ranks) -> float:
    if ranks.device == "cuda":
        torch.cuda.synchronize()
    return ranks.clock()


class _Layer:
    """A layer as `tutorials/demo/model.py` has it, with the model's widths, on one rank: for what it takes beside its matmuls."""

    def __init__(self, model: Model, experts: int, device: str, dtype: torch.dtype) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device).mul_(shape[-1] ** -0.5).requires_grad_()

        d, width = model.dim, model.heads * model.head
        self.model, self.k = model, min(model.k, experts)
        self.norms = random(2, d)
        self.qkv, self.project, self.gate = random(3 * width, d), random(d, width), random(experts, d)
        self.into, self.out = random(experts, 2 * model.hidden, d), random(experts, d, model.hidden)

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, length, D] -> [B, length, D]."""
        normed = F.rms_norm(x, x.shape[-1:], self.norms[0])
        heads = F.linear(normed, self.qkv).unflatten(-1, (-1, 3, self.model.head))  # [B, length, heads, 3, head]
        q, k, v = heads.permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        x = x + F.linear(y.transpose(1, 2).flatten(2), self.project)
        tokens = F.rms_norm(x, x.shape[-1:], self.norms[1]).flatten(0, 1)  # [T, D]
        weights, experts = route(F.linear(tokens, self.gate).float(), self.k)
        routing = plan(experts, weights, self.gate.shape[0], "", like=tokens)
        rows = dispatch(tokens, routing)  # [N, D]
        gate, up = F.grouped_mm(rows, self.into.transpose(1, 2), offs=routing.offsets).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, self.out.transpose(1, 2), offs=routing.offsets)
        return x + combine(rows, routing).view_as(x)

    def flops(self, tokens: int, length: int) -> tuple[float, float, float]:
        """FLOPs forward and backward: of dense matmuls, of grouped ones, of attention."""
        d, width = self.model.dim, self.model.heads * self.model.head
        dense = 6 * tokens * d * (4 * width + self.gate.shape[0])
        return dense, 18 * tokens * self.k * d * self.model.hidden, 6 * tokens * length * width

    def moved(self, tokens: int, itemsize: int) -> float:
        """Bytes read and written beside the matmuls, as `cost.py` counts them."""
        d, rows = self.model.dim, self.k * tokens
        return itemsize * (tokens * DENSE_PASSES * d + rows * (ROW_PASSES * d + HIDDEN_PASSES * self.model.hidden))


def _rotated(x: Tensor) -> Tensor:
    """A rotation by an angle of one: the work of one by position."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * 0.54 - b * 0.84, a * 0.84 + b * 0.54), -1)


def _trained(run: Callable[[], Tensor]) -> Callable[[], None]:
    """``run``, and its backward."""

    def once() -> None:
        y = run()
        y.backward(torch.ones_like(y))

    return once


def _dense(model: Model, device: str, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """A matmul as that of queries, keys and values, forward and backward; and its FLOPs."""
    rows, d = max(MANY, model.sequence), model.dim
    x, weight = (torch.randn(*shape, dtype=dtype, device=device).requires_grad_() for shape in ((rows, d), (3 * d, d)))
    return _trained(lambda: F.linear(x, weight)), 18.0 * rows * d * d


def _rates(ranks: Ranks, model: Model, dtype: torch.dtype) -> Rates:
    """What each rank reaches while all work."""
    length = min(model.sequence, MANY)
    tokens, experts = MANY // length * length, min(model.experts, 8)
    layer = _Layer(model, experts, ranks.device, dtype)
    dense, flops = _dense(model, ranks.device, dtype)
    matmul = flops / _seconds(dense, ranks)

    rows = tokens * layer.k // experts
    offsets = torch.arange(1, experts + 1, dtype=torch.int32, device=ranks.device) * rows
    routed = torch.randn(experts * rows, model.dim, dtype=dtype, device=ranks.device).requires_grad_()
    products = torch.randn(experts * rows, model.hidden, dtype=dtype, device=ranks.device).requires_grad_()
    up = _trained(lambda: F.grouped_mm(routed, layer.into.transpose(1, 2), offs=offsets))
    down = _trained(lambda: F.grouped_mm(products, layer.out.transpose(1, 2), offs=offsets))
    of_experts = _seconds(up, ranks) + _seconds(down, ranks)
    grouped = 18 * experts * rows * model.dim * model.hidden / of_experts

    shape = tokens // length, model.heads, length, model.head
    q, k, v = (torch.randn(shape, dtype=dtype, device=ranks.device).requires_grad_() for _ in range(3))
    scores = _seconds(_trained(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)), ranks)
    attention = layer.flops(tokens, length)[2] / scores

    total, part = torch.zeros(STREAM, device=ranks.device), torch.ones(STREAM, device=ranks.device)
    stream = 12 * STREAM / _seconds(lambda: total.add_(part), ranks)

    x = torch.randn(1, FEW, model.dim, dtype=dtype, device=ranks.device).requires_grad_()
    small = _Layer(model, layer.k, ranks.device, dtype)  # with few weights
    launch = _seconds(_trained(lambda: small(x)), ranks)
    many = torch.randn(tokens // length, length, model.dim, dtype=dtype, device=ranks.device).requires_grad_()
    whole = _seconds(_trained(lambda: layer(many)), ranks)
    known = sum(flops / rate for flops, rate in zip(layer.flops(tokens, length), (matmul, grouped, attention), strict=True))
    hidden = launch if ranks.device == "cuda" else 0.0  # behind the GPU's work
    rest = max(whole - launch + hidden - known, 0.05 * whole)
    return Rates(matmul, grouped, attention, layer.moved(tokens, x.element_size()) / rest, stream, launch)


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
            _everyones(torch.zeros(1), ranks)
            begun = _now(ranks)
            if mine or together:
                dense()
            taken[together, repeat] = _now(ranks) - begun
            _everyones(torch.zeros(1), ranks)
    every = torch.stack(_everyones(torch.from_numpy(np.median(taken, 1)), ranks)).numpy()  # [ranks, 2]
    return max(1.0, float(every[:, 1].mean() / every[::node, 0].mean()))


def _links(ranks: Ranks, node: int) -> tuple[Link, Link]:
    """The links inside a node and between nodes, fitted to exchanges; of a group of one rank, links that take no time."""
    inside = between = Link(0.0, 0.0, float("inf"))
    if ranks.size == 1:
        return inside, between
    if ranks.size < dist.get_world_size():  # other ranks of the world do not come to make groups
        link = fit_link(*zip(*_exchanges(ranks, ranks.name, ranks.size), strict=True))
        return link, link
    first = range(0, ranks.size, node)
    if node > 1:
        groups = [[list(range(i, i + node)) for i in first]]
        if node > 2 and node % 2 == 0:
            groups.append([[i, i + 1] for i in range(0, ranks.size, 2)])
        inside = _fitted(ranks, groups)
    if ranks.size > node:
        between = _fitted(ranks, [[list(range(i, ranks.size, node)) for i in range(node)]])
    return inside, between


def _fitted(ranks: Ranks, divisions: list[list[list[int]]]) -> Link:
    """The link that explains the exchanges in the groups of each division of the world, which all groups make at the same time."""
    found: list[tuple[int, int, float]] = []
    for division in divisions:
        whole = len(division) == 1
        groups = [dist.group.WORLD if whole else dist.new_group(members) for members in division]
        own = next(group for group, members in zip(groups, division, strict=True) if dist.get_rank() in members)
        found += _exchanges(ranks, own.group_name, len(division[0]))  # type: ignore[union-attr]
        if not whole:
            dist.destroy_process_group(own)
    return fit_link(*zip(*found, strict=True))


def _exchanges(ranks: Ranks, group: str, size: int) -> list[tuple[int, int, float]]:
    """The messages, the bytes to each rank and the seconds of an exchange in ``group``, of two sizes."""
    found = []
    for bytes_to_each in SIZES:
        send = torch.zeros(size * bytes_to_each, dtype=torch.uint8, device=ranks.device)

        def run(send: Tensor = send, splits: tuple[int, ...] = (bytes_to_each,) * size) -> None:
            for _ in range(EXCHANGES):
                wait(start_all_to_all(send, splits, group))

        found.append((size - 1, bytes_to_each, _seconds(run, ranks) / EXCHANGES))
    return found


def _memory(device: str, node: int) -> float:
    """Bytes that a rank can use: of its GPU, or its part of the machine's memory."""
    if device == "cuda":
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / node)
