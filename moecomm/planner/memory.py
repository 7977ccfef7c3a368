"""The most memory that a rank needs in a training step, by parts. As in `cost.py`, sizes are numbers or arrays [n] of many splits.

What a layer keeps for its backward pass is counted as the demo's layer keeps it in eager mode: the inputs of its matmuls, norms and
products. A token of a rank keeps these numbers in a layer, D for the model's width:

    the layer's input, and the input of the second norm                                          2 D
    the input of the attention's matmuls, gathered over tp                                       D * tp
    queries, keys and values, and queries and keys again after their rotation                    heads' widths
    the heads' result                                                                            heads' width
    the input of the gate                                                                        D
    rows in the experts' order                                                                   D a row
    up projection, silu, product, and the product times the row's weight                         5 H a row
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moecomm.planner.cost import FULL, LEAN, Way, layers, room, shards, sparse, tokens
from moecomm.planner.model import Model, value_head
from moecomm.planner.routing import Fullest
from moecomm.planner.splits import Split


class Memory(NamedTuple):
    """Bytes of the rank that needs most, by parts; arrays [n] for many splits."""

    parameters: float  # its shards, as stored
    gradients: float  # as stored: its shards, or whole while several microbatches add to them
    optimizer: float  # Adam's two moments of its shards
    activations: float  # kept for the backward passes of the microbatches in flight
    buffers: float  # parameters gathered for the computation, and what one layer's backward needs for itself

    def total(self) -> Any:
        return sum(self)


def kept_by_attention(model: Model, split: Split, way: Way) -> Any:
    """Numbers that a layer keeps of a token beside its experts."""
    d, head, value = model.dim, model.head, value_head(model)
    heads, keys = model.heads, np.maximum(model.kv_heads, split.tp)  # a tp rank has at least one head of keys
    if model.kv_rank:
        latent, keys = model.query_rank + model.kv_rank + model.rope_head, model.heads
    else:
        latent = 0
    of_heads = latent + 2 * (heads + keys) * head + keys * value + heads * value
    return np.where(way.recompute == FULL, 1.0 * d, 2.0 * d + np.where(split.tp > 1, split.tp, 1.0) * d + of_heads)


def kept_by_experts(model: Model, split: Split, way: Way, full: Fullest) -> Any:
    """Numbers that a layer's experts keep of a rank's token, on the fullest rank."""
    d, hidden = model.dim, model.hidden / split.etp
    rows = model.k * split.etp * full.rows
    received = np.where(split.ep > 1, split.ep * split.etp * room(model, split, way, full), np.where(split.etp > 1, split.etp, 0.0)) * d
    everything = d + rows * (d + 5 * hidden) + 3 * model.shared + 3 * model.experts
    lean = d + received + rows * 2 * hidden + 3 * model.experts
    return np.select([way.recompute == FULL, way.recompute == LEAN], [received, lean], everything)


def activations(model: Model, split: Split, way: Way, full: Fullest, stage: Any) -> Any:
    """Bytes that stage number ``stage`` keeps in 1F1B: it has as many microbatches in flight as stages come after it, and one."""
    t, own = tokens(model, split, way), layers(model, split)
    in_flight = np.minimum(way.microbatches, split.pp - stage)
    dense_own = np.minimum(own, model.dense_layers)
    mlp = np.where(way.recompute == FULL, 0.0, model.dim + 4.0 * model.dense_hidden)
    each = own * kept_by_attention(model, split, way) + dense_own * mlp
    each = each + sparse(model, split) * kept_by_experts(model, split, way, full)
    return t * model.itemsize * in_flight * each


def buffers(model: Model, split: Split, way: Way, full: Fullest, last: Any) -> Any:
    """Bytes of gathered parameters, of a layer's backward, and, on the last stage, of logits: as they are, float32, log-softmax."""
    parts, t = shards(model, split), tokens(model, split, way)
    gathered = (parts.dense + parts.experts) * model.itemsize
    rows = model.k * split.etp * full.rows
    layer = t * model.itemsize * (rows * (model.dim + 3 * model.hidden / split.etp) + 2 * model.dim)
    again = (
        t
        * model.itemsize
        * (kept_by_attention(model, split, way._replace(recompute=0)) + kept_by_experts(model, split, way._replace(recompute=0), full))
    )  # what a layer that keeps little makes again
    of_layer = np.where(way.recompute == 0, layer, layer + again)
    logits = t * model.vocabulary * (model.itemsize + 8)
    received = np.where(
        way.static & (split.ep > 1), 2 * t * split.etp * split.ep * room(model, split, way, full) * model.dim * model.itemsize, 0.0
    )
    between = np.where(
        split.pp > 1, 1.0 * way.microbatches * t * model.dim * model.itemsize, 0.0
    )  # PipelineStage's, to receive each one in
    return gathered + received + between + np.where(last, np.maximum(of_layer, logits) + logits / 2, of_layer)


def peak(model: Model, split: Split, way: Way, full: Fullest) -> Memory:
    """The memory of the first pipeline stage or of the last, whichever needs more: the first keeps most, the last has the logits."""
    parts = shards(model, split)
    own = parts.dense / parts.over + parts.experts / parts.experts_over
    whole = np.where(way.microbatches > 1, parts.dense + parts.experts, own)
    first, last = (
        (activations(model, split, way, full, stage), buffers(model, split, way, full, end))
        for stage, end in ((0, split.pp == 1), (split.pp - 1, True))
    )
    more = first[0] + first[1] >= last[0] + last[1]
    kept, other = (np.where(more, a, b) for a, b in zip(first, last, strict=True))
    return Memory(own * model.stored, whole * model.stored, 2 * own * model.stored, kept, other)
