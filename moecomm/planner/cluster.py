"""What the planner knows of the machines: links, matmul rates and memory of each rank; and how long an exchange between ranks takes.

A link has three numbers: the seconds of an exchange of almost no bytes, the seconds of each message beyond that, and the bytes per second.
The links inside a node and between nodes carry data at the same time. An exchange takes the time of the slower one:

    latency + messages * (overhead + bytes / speed).

A group is (size, stride): its ranks are ``stride`` apart, as in a dim of `moe_mesh`. Sizes may be arrays of numpy, for many splits at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Link(NamedTuple):
    latency: float  # seconds
    overhead: float  # seconds a message
    speed: float  # bytes a second that a rank sends, while it receives as many


class Cluster(NamedTuple):
    """A kind of node. `PRESETS` has some, `calibrate` measures another."""

    name: str
    node: int  # ranks of a node
    inside: Link
    between: Link
    memory: float  # bytes a rank can use
    matmul: float  # FLOP/s of a rank's dense matmuls, as reached
    grouped: float  # FLOP/s of grouped matmuls, as reached
    attention: float  # FLOP/s of the scores of attention, as reached
    copy: float  # bytes/s that a rank reads and writes in a layer's work that is no matmul
    stream: float  # bytes/s that it reads and writes in long sums, as of gradients
    launch: float = 0.0  # seconds that the host of a rank takes for a layer, forward and backward, beside the work on its numbers
    routed: float = 0.0  # as many more where the layer's tokens travel, beside what the exchanges take
    sliced: float = 0.0  # and for a gather of slices with its mirror
    sync: float = 0.0  # seconds that a rank loses where its host waits for sizes: once a layer and microbatch, not in static mode
    gathers: float = 1.0  # the time of an all-gather to that of an all-to-all of as many bytes: above 1 for gloo
    scatters: float = 1.0  # the same of a reduce-scatter, the backend's own
    spare: float = 1.0  # how many times as fast a rank computes while all others wait: above 1 where ranks share cores
    sources: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"inside": self.inside._asdict(), "between": self.between._asdict()}


def _shared(cluster: Cluster, size: Any, stride: Any) -> Any:
    """How many ranks of a group one node has."""
    return np.minimum(size, np.maximum(1, cluster.node // stride))


def exchange(cluster: Cluster, size: Any, bytes_to_each: Any, stride: Any = 1) -> Any:
    """Seconds of an all-to-all with as many bytes from each rank to each other rank of a group; nothing in a group of one.

    >>> slow = Link(1.0, 0.5, 10.0)
    >>> float(exchange(PRESETS["h100"]._replace(inside=slow), 2, 100))
    11.5
    """
    here = _shared(cluster, size, stride)
    seconds: Any = 0.0
    for link, others in ((cluster.inside, here - 1), (cluster.between, size - here)):
        taken = link.latency + others * (link.overhead + bytes_to_each / link.speed)
        seconds = np.maximum(seconds, np.where(others > 0, taken, 0.0))
    return seconds


def gather(cluster: Cluster, size: Any, bytes_of_each: Any, stride: Any = 1) -> Any:
    """Seconds of an all-gather."""
    return cluster.gathers * _whole(cluster, size, bytes_of_each, stride)


def scatter(cluster: Cluster, size: Any, bytes_of_each: Any, stride: Any = 1) -> Any:
    """Seconds of its mirror, a reduce-scatter."""
    return cluster.scatters * _whole(cluster, size, bytes_of_each, stride)


def _whole(cluster: Cluster, size: Any, bytes_of_each: Any, stride: Any) -> Any:
    """Seconds until each rank has every rank's bytes. A node needs another node's bytes once, over all its links."""
    here = _shared(cluster, size, stride)
    nodes = size / here
    inside = cluster.inside.latency + (here - 1) * cluster.inside.overhead + (size - nodes) * bytes_of_each / cluster.inside.speed
    across = (size - here) / here * bytes_of_each / cluster.between.speed
    between = cluster.between.latency + (nodes - 1) * cluster.between.overhead + across
    return np.maximum(np.where(here > 1, inside, 0.0), np.where(nodes > 1, between, 0.0))


def fit_link(messages: Sequence[float], sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The link of least relative error, squared, over measured exchanges of ``messages`` with ``sizes`` bytes each.

    A number that would be negative is nothing.

    >>> fit_link([1, 1, 7, 7], [0, 1000, 0, 1000], [3.0, 5.0, 9.0, 23.0])  # 2 + messages * (1 + bytes / 500)
    Link(latency=2.0, overhead=1.0, speed=500.0)
    """
    count, size, times = (np.array(each, float) for each in (messages, sizes, seconds))
    columns = np.stack([np.ones_like(count), count, count * size], 1) / times[:, None]
    kept = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(columns[:, kept], np.ones_like(times), rcond=None)[0]
        if (found > 0).all():
            break
        kept.pop(int(found.argmin()))
    values = dict(zip(kept, found.tolist(), strict=True))
    rounded = [float(f"{value:.9g}") for value in (values.get(0, 0.0), values.get(1, 0.0), 1 / values[2] if 2 in values else np.inf)]
    return Link(*rounded)


MATMUL, GROUPED, ATTENTION, COPY = 0.7, 0.65, 0.5, 0.85  # shares of the datasheet's peak
HOPPER_LINKS = (
    "8 H100 or H200 a node: NVLink 4, 900 GB/s of a GPU both ways together (NVIDIA, HGX H100 8-GPU)",
    "a 400 Gb/s InfiniBand port a GPU (NVIDIA, DGX H100 User Guide)",
    "85 % of either line rate reached (DeepEP V1: 153 of 160 GB/s NVLink, 43 to 58 of 50 GB/s RDMA)",
    "latency 8.4 us, and 3.4 by NVLink or 9.6 by network (NCCL, src/graph/tuning.cc: ring, Simple)",
    "overhead of a message 0.2 us by NVLink, 1 us by network: assumed, without a source",
)
SHARES = (
    "grouped matmuls reach 65 % of the peak (grouped_mm with SwiGLU experts on an H100, as in docs/benchmarks.md: 640 of 989 TFLOP/s)",
    "dense matmuls reach 70 %, attention 50 %, copies 85 %: assumed, without a source",
    "a host synchronization costs 30 us: assumed, without a source; launches hide behind the GPU's work",
    "90 % of the memory is for the model: assumed, without a source",
)
NETWORK = Link(latency=18.0e-6, overhead=1.0e-6, speed=0.85 * 50e9)


def _gpu(
    name: str, peak: float, memory: float, bandwidth: float, link: float, sources: Sequence[str], share: float = 1.0
) -> Cluster:  # fmt: skip
    """A node of 8 GPUs: ``peak`` FLOP/s in bfloat16 without sparsity, of which ``share`` times what `SHARES` says is reached."""
    return Cluster(
        name,
        node=8,
        inside=Link(latency=11.8e-6, overhead=0.2e-6, speed=0.85 * link),
        between=NETWORK,
        memory=0.9 * memory,
        matmul=MATMUL * share * peak,
        grouped=GROUPED * share * peak,
        attention=ATTENTION * share * peak,
        copy=COPY * bandwidth,
        stream=COPY * bandwidth,
        sync=30e-6,
        sources=(*sources, *SHARES),
    )


PRESETS = {
    "h100": _gpu(
        "h100", 989e12, 80e9, 3.35e12, 450e9,
        ("H100 SXM: 989 TFLOP/s bfloat16 without sparsity, 80 GB, 3.35 TB/s (NVIDIA, H100 datasheet)", *HOPPER_LINKS),
    ),
    "h200": _gpu(
        "h200", 989e12, 141e9, 4.8e12, 450e9,
        ("H200 SXM: 989 TFLOP/s bfloat16 without sparsity, 141 GB, 4.8 TB/s (NVIDIA, H200 datasheet)", *HOPPER_LINKS),
    ),
    "b200": _gpu(
        "b200", 2250e12, 180e9, 7.7e12, 900e9,
        (
            "B200: 2250 TFLOP/s bfloat16 without sparsity, 180 GB, 7.7 TB/s (NVIDIA, HGX B200 datasheet: 4.5 PFLOP/s with sparsity)",
            "NVLink 5, 1.8 TB/s of a GPU both ways together (the same); network and shares as of Hopper: assumed",
            *HOPPER_LINKS[1:],
        ),
    ),
    "mi300x": _gpu(
        "mi300x", 1307e12, 192e9, 5.3e12, 7 * 64e9,
        (
            "MI300X: 1307 TFLOP/s bfloat16 without sparsity, 192 GB, 5.3 TB/s (AMD, Instinct MI300X data sheet)",
            "7 Infinity Fabric links of 64 GB/s a direction, one to each other GPU of the node (the same)",
            "matmuls reach 45 % of the peak (Ambati et al., 2025); so all shares below are times 0.65",
            "network, latencies and overheads as of Hopper: assumed",
            *HOPPER_LINKS[1:],
        ),
        share=0.65,
    ),
}  # fmt: skip
