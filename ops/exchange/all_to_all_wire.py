"""received = the pairs that each rank quantized for me, in rank order: values and scales in one message, S -> R or R -> S.

Costs (token, rank) pairs x (D + the scales') bytes on the wire; `wire_formats.py` defines the formats. On a GPU one kernel gathers
and quantizes in one pass. On a CPU, which computes more slowly than it copies, each token is quantized once and its bytes are gathered.
Its mirror is itself in the other direction; `dispatch_combine_wire.py` joins the two to the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.ops.exchange.all_to_all import start
from moecomm.ops.exchange.start_op import define_start
from moecomm.ops.rows.quantize import quantize_cpu, quantize_triton
from moecomm.ops.rows.wire_formats import width

SCHEMA = "wire_exchange(Tensor x, Tensor? order, int k, str wire, int direction, Tensor? splits, SymInt size, str group) -> Tensor"
WHAT = "quantised tokens of dispatch or gradients of combine", "quantised sums of combine or gradients of dispatch"  # by direction


def wire_fake(x: Tensor, order: Tensor | None, k: int, wire: str, direction: int, splits: Tensor | None, size: int, group: str) -> Tensor:
    return x.new_empty(size, width(x.shape[1], wire), dtype=torch.uint8)


def wire_cpu(x: Tensor, order: Tensor | None, k: int, wire: str, direction: int, splits: Tensor | None, size: int, group: str) -> Tensor:
    return start(quantize_cpu(x, order, k, wire), size, splits, direction, group, WHAT[direction])


def wire_triton(x: Tensor, order: Tensor | None, k: int, wire: str, direction: int, splits: Tensor | None, size: int, group: str) -> Tensor:
    return start(quantize_triton(x, order, k, wire), size, splits, direction, group, WHAT[direction])


wire_exchange = define_start(SCHEMA, wire_fake, wire_cpu, wire_triton)
