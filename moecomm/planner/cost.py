"""How long a training step takes, by parts. Every function takes one split, or arrays [n] of many: the sizes are numbers or numpy's arrays.

The plan is that of `tutorials/demo/parallel.py`. Layers go over pp, attention heads over tp, experts over ep, their hidden dim over etp.
All parameters are sharded over the ranks that have the same part, gathered once a step, and their gradients are scattered once a step
(FSDP2). Outside the heads, each tp rank has a part of every sequence. Microbatches run in 1F1B (arXiv:2104.04473).

The parts add up, as if nothing overlapped. A step in which exchanges overlap with other work is faster than predicted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moecomm.ops.base.signature import LENGTH
from moecomm.ops.routing.slots_with_counts import most_pairs
from moecomm.planner.cluster import Cluster, exchange, gather, scatter
from moecomm.planner.model import Model, attention_matrices, parameters, value_head
from moecomm.planner.routing import Fullest
from moecomm.planner.splits import Split

HEADER = LENGTH * 8  # bytes of moecomm's counts and signature, to each rank, with room for few slots
WEIGHT, ID, WIDE_ID = 4, 1, 8  # bytes: a weight, an id among the experts of a rank, one as a router gives it
BLOCK = 128  # values of a row that share a scale in 8 bits
# Numbers read and written beside the matmuls, forward and backward together: as many times D for a token of a layer ...
DENSE_PASSES = 30  # two norms (10), rotations (8), two residual sums (6), the head's transpose (2), gradients that meet (4)
# ... and for a row of an expert, times D and times H.
ROW_PASSES, HIDDEN_PASSES = 8, 15  # gather, weighted sum and both backwards; SwiGLU (5) and its backward (10)
# What sharded parameters cost the host, in launches of a layer, measured with the demo: hooks around a layer in every microbatch ...
HOOKS = 0.6
SHARDED = 1.8  # ... and clipping and the optimizer once a step
UPDATE_PASSES = 10  # of a parameter: its gradient's norm and clipping (3), parameter, gradient, moments in (4) and out (3)
LOSS_PASSES = 8  # of a logit: to float32, log-softmax, its backward


class Way(NamedTuple):
    """How a step is run. In the cost model, each may be an array [n]."""

    microbatches: int
    fp8: bool  # whether rows travel to the experts, and their gradients, in 8 bits: wire="float8_e4m3"
    static: bool  # whether every size is a constant: plan(max_rows=)
    recompute: int  # 0 keeps everything for the backward pass, 1 what is dear to make again, 2 each layer's input and what arrived

    def to_dict(self) -> dict[str, Any]:
        return {
            "microbatches": self.microbatches,
            "wire": "fp8" if self.fp8 else "bf16",
            "plan": "static" if self.static else "dynamic",
            "recompute": RECOMPUTE[self.recompute],
        }


RECOMPUTE = ("none", "lean", "full")
NONE, LEAN, FULL = range(3)
STATIC_MARGIN = 1.25  # static mode has room for so many times the pairs of the fullest rank, at most for every token


class Times(NamedTuple):
    """Seconds of a step, by parts; arrays [n] for many splits."""

    dense: float  # attention, shared experts, dense layers, the ends, on the stage that takes longest
    experts: float  # on the fullest rank
    exchanges: float  # of tokens: ep, tp, cp, etp and between stages
    syncs: float  # gathers of parameters and scatters of gradients
    update: float  # sums of gradients, and the optimizer
    host: float  # what the host takes to launch the work, and to wait for sizes
    bubble: float  # the pipeline's wait

    def total(self) -> Any:
        return sum(self)


def tokens(model: Model, split: Split, way: Way) -> Any:
    """The tokens of a rank in a microbatch."""
    return model.batch * model.sequence / (split.stage() * way.microbatches)


def layers(model: Model, split: Split) -> Any:
    """The layers of the longest stage."""
    return np.ceil(model.layers / split.pp)


def sparse(model: Model, split: Split) -> Any:
    """How many of `layers` have experts, of the stage that has most of them."""
    return np.minimum(layers(model, split), model.layers - model.dense_layers)


def room(model: Model, split: Split, way: Way, full: Fullest) -> Any:
    """The (token, rank) pairs that go from a rank to the fullest one, or the room for them, as a share of its tokens."""
    return np.where(way.static, np.minimum(1.0, STATIC_MARGIN * full.reached), full.reached)


def dense_flops(model: Model, split: Split) -> Any:
    """FLOPs forward of a token, on a rank: the matmuls of all its layers, and its part of the output matrix."""
    counts = parameters(model)
    dense = np.minimum(layers(model, split), model.dense_layers)
    each = layers(model, split) * attention_matrices(model) + sparse(model, split) * (model.dim * model.experts + counts.shared)
    return 2.0 * (each + dense * 3 * model.dim * model.dense_hidden + model.vocabulary * model.dim)


def score_flops(model: Model, split: Split) -> Any:
    """FLOPs forward of a token's scores and their sums of values, in all layers of a rank: half the sequence is before a token."""
    return layers(model, split) * 1.0 * model.sequence * model.heads * (model.head + value_head(model))


def dense_compute(model: Model, cluster: Cluster, split: Split, way: Way) -> Any:
    """Seconds of a microbatch, forward and backward, beside the experts."""
    t = tokens(model, split, way)
    times = np.where(way.recompute == FULL, 4.0, 3.0)  # a backward pass is two forward passes
    moved = DENSE_PASSES * model.dim * layers(model, split) * model.itemsize + LOSS_PASSES * model.vocabulary * 4
    matmuls = dense_flops(model, split) / cluster.matmul + score_flops(model, split) / cluster.attention
    return t * (times * matmuls + moved / cluster.copy)


def expert_compute(model: Model, cluster: Cluster, split: Split, way: Way, full: Fullest) -> Any:
    """Seconds of a microbatch on the fullest rank, forward and backward: its layers' experts, and what puts rows in their order."""
    rows = tokens(model, split, way) * model.k * split.etp * full.rows * sparse(model, split)
    times = np.where(way.recompute == FULL, 4.0, 3.0)
    hidden = model.hidden / split.etp
    moved = (ROW_PASSES * model.dim + (HIDDEN_PASSES + 5 * (way.recompute == LEAN)) * hidden) * model.itemsize
    return rows * (times * 6.0 * model.dim * hidden / cluster.grouped + moved / cluster.copy)


def exchanges(model: Model, cluster: Cluster, split: Split, way: Way, full: Fullest) -> Any:
    """Seconds of a microbatch's exchanges of tokens, forward and backward."""
    t = tokens(model, split, way)
    row, again = model.dim * model.itemsize, way.recompute == FULL
    of_layer = np.where(split.tp > 1, (2 + again) * there_and_back(cluster, split.tp, t * row), 0.0)
    keys = model.kv_heads * (model.head + value_head(model)) * model.itemsize
    if model.kv_rank:
        keys = (model.kv_rank + model.rope_head) * model.itemsize
    of_keys = t * split.tp * np.maximum(keys / split.tp, keys / model.kv_heads)  # bytes
    gathered = there_and_back(cluster, split.cp, of_keys, split.tp) + again * gather(cluster, split.cp, of_keys, split.tp)
    of_layer = of_layer + np.where(split.cp > 1, gathered, 0.0)
    of_slots = gather(cluster, split.etp, t * model.k * WIDE_ID) + there_and_back(cluster, split.etp, t * model.k * WEIGHT)
    of_experts = np.where(split.etp > 1, 2 * there_and_back(cluster, split.etp, t * row) + of_slots, 0.0)
    of_experts = of_experts + np.where(split.ep > 1, routed(model, cluster, split, way, full), 0.0)
    of_experts = of_experts + exchange(cluster, split.stage(), model.experts * 8)  # the balance loss
    between = np.where(split.pp > 1, 2 * exchange(cluster, 2, t * row, split.stage()), 0.0)
    return layers(model, split) * of_layer + sparse(model, split) * of_experts + between


def there_and_back(cluster: Cluster, size: Any, bytes_of_each: Any, stride: Any = 1) -> Any:
    """Seconds of a gather of slices, and of its mirror: an exchange, after which each rank adds up what it has received."""
    sums = (size + 1) * bytes_of_each / cluster.copy
    return gather(cluster, size, bytes_of_each, stride) + exchange(cluster, size, bytes_of_each, stride) + sums + cluster.sliced


def sent_there(cluster: Cluster, ep: Any, to_each: Any, k: int, row: Any, stride: Any = 1) -> Any:
    """Seconds of a layer's exchanges forward up to the experts: counts, ids and weights where they are not few, tokens of ``row`` bytes."""
    most = to_each + 6 * np.sqrt(to_each)  # of all ranks to all others: six standard deviations are enough for 4096^2 of them
    few = most <= most_pairs(k * (ID + WEIGHT))
    slots = np.where(few, 0.0, exchange(cluster, ep, to_each * k * (ID + WEIGHT), stride))
    return exchange(cluster, ep, HEADER, stride) + slots + exchange(cluster, ep, to_each * row, stride)


def sent_home(cluster: Cluster, ep: Any, to_each: Any, row: Any, stride: Any = 1) -> Any:
    """Seconds of the exchange of the experts' sums."""
    return exchange(cluster, ep, to_each * row, stride)


def routed(model: Model, cluster: Cluster, split: Split, way: Way, full: Fullest) -> Any:
    """Seconds of a layer's exchanges over ep, forward and backward. 8 bits carry tokens and the gradients of sums; sums have 16."""
    to_each = tokens(model, split, way) * split.etp * room(model, split, way, full)
    row = model.dim * model.itemsize
    wire = np.where(way.fp8, model.dim + 4 * np.ceil(model.dim / BLOCK), row)
    there = sent_there(cluster, split.ep, to_each, model.k, wire, split.etp)
    back = sent_home(cluster, split.ep, to_each, wire, split.etp)  # the gradients of sums
    of_weights = exchange(cluster, split.ep, to_each * model.k * WEIGHT, split.etp)
    return there + back + 2 * sent_home(cluster, split.ep, to_each, row, split.etp) + of_weights


class Shards(NamedTuple):
    """Parameters of a rank while it computes, and over how many ranks they are sharded."""

    dense: Any  # those of attention and ends
    over: Any
    experts: Any
    experts_over: Any


def shards(model: Model, split: Split) -> Shards:
    """The parameters of the longest stage, the last, with the output matrix; the first has the embedding, which is as large."""
    counts, own, with_experts = parameters(model), layers(model, split), sparse(model, split)
    attention = own * counts.attention / split.tp
    whole = with_experts * (counts.router + counts.shared) + np.minimum(own, model.dense_layers) * counts.dense
    ends = np.where(split.pp > 1, model.vocabulary * model.dim, counts.ends)
    experts = with_experts * model.experts * counts.expert / (split.ep * split.etp)
    # with tp, attention is sharded over dp * cp and the rest over the whole stage: together as if over this many
    over = (attention + whole + ends) / (attention / (split.dp * split.cp) + (whole + ends) / split.stage())
    return Shards(attention + whole + ends, over, experts, split.edp)


def syncs(model: Model, cluster: Cluster, split: Split) -> Any:
    """Seconds of a step to gather parameters in the computation's numbers, and to scatter gradients in the stored ones."""
    parts, own = shards(model, split), layers(model, split)
    seconds: Any = 0.0
    for size, group, stride in ((parts.dense, split.stage(), 1), (parts.experts, split.edp, split.ep * split.etp)):
        piece = size / (own + 1) / group
        seconds = seconds + (own + 1) * gather(cluster, group, piece * model.itemsize, stride)
        seconds = seconds + (own + 1) * scatter(cluster, group, piece * model.stored, stride)
    return seconds


def update(model: Model, cluster: Cluster, split: Split, way: Way) -> Any:
    """Seconds of a step to write each microbatch's gradients and add them up, and of the optimizer on this rank's shards."""
    parts = shards(model, split)
    written = way.microbatches * model.itemsize + (way.microbatches - 1) * (model.itemsize + 2 * model.stored)
    of_shards = UPDATE_PASSES * model.stored * (parts.dense / parts.over + parts.experts / parts.experts_over)
    return ((parts.dense + parts.experts) * written + of_shards) / cluster.stream


def host(model: Model, cluster: Cluster, split: Split, way: Way) -> Any:
    """Seconds of a step that the host of a rank takes: to launch every layer of every microbatch, and to wait for sizes."""
    of_experts = np.where(way.static, 0.0, cluster.sync) + np.where(split.ep > 1, cluster.routed, 0.0)
    own = layers(model, split)
    of_layers = own * (1 + HOOKS) * cluster.launch + sparse(model, split) * of_experts
    return way.microbatches * of_layers + (own + 1) * SHARDED * cluster.launch


def predict(model: Model, cluster: Cluster, split: Split, way: Way, full: Fullest) -> Times:
    """The times of a step.

    Where ranks share cores, the others compute faster while one waits: for the fullest rank, or in the pipeline's bubble.
    """
    m = way.microbatches
    dense = m * dense_compute(model, cluster, split, way)
    mean = m * expert_compute(model, cluster, split, way, full._replace(rows=1.0))
    most = m * expert_compute(model, cluster, split, way, full)
    experts = np.maximum(mean, most / cluster.spare)
    sent, of_host = m * exchanges(model, cluster, split, way, full), host(model, cluster, split, way)
    busy = dense + experts + sent + of_host
    bubble = np.maximum(0.0, busy * ((m + split.pp - 1) / (m * cluster.spare) - 1))
    return Times(dense, experts, sent, syncs(model, cluster, split), update(model, cluster, split, way), of_host, bubble)
