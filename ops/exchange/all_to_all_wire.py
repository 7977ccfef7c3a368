"""received = what each rank quantised for me, in their order: one message for values and scales, S -> R or R -> S.

Costs (token, rank) pairs x (D + the scales') bytes on the wire, of which `wire_formats.py` has the formats. On a GPU a kernel gathers and
quantises in one pass; on a CPU, which takes longer to compute than to copy, each token is quantised once and its bytes are gathered.
It is its own mirror, in the other direction, which `dispatch_combine_wire.py` joins to the backward.
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
