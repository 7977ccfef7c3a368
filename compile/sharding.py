"""DTensor sharding rules of the local ops: rows sharded over the hidden dim stay so, forward and backward, and nothing is sent.

Importing this module registers the rules with DTensor. `dispatch` and `combine` take local shards
and need no rules. The rules are for callers that pass DTensors to ``moecomm.ops.rows.gather``,
``weighted_sum`` or ``weighted_sum_backward``. On each dim of the mesh the weights and the index
maps are Replicate, and the rows are:

=========================  =============================================================
op                         rows in -> out
=========================  =============================================================
``gather``                 Replicate, Shard(1) or Partial -> the same
``weighted_sum``           Replicate, Shard(1) or Partial -> the same
``weighted_sum_backward``  grad and rows Shard(1) -> grad_rows Shard(1), grad_weights Partial
                           grad Partial, rows Replicate -> both Partial
                           grad Replicate, rows Partial -> grad_rows Replicate, grad_weights Partial
=========================  =============================================================

Rows or tokens that are Shard(0) raise an error: an index map counts a rank's own rows, and DTensor
would gather all rows first.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from moecomm.errors import wrong_value
from moecomm.ops.rows.gather import gather
from moecomm.ops.rows.weighted_sum import weighted_sum
from moecomm.ops.rows.weighted_sum_backward import weighted_sum_backward

Rules = list[tuple[list[Placement], list[Placement | None]]]  # the placements of outputs and of inputs, on one mesh dim
WHOLE, SLICE, PART = Replicate(), Shard(1), Partial()


@register_sharding(gather)
def gather_rules(x: Any, order: Any, position: Any) -> Rules:
    _check(x=x)
    return [([rows], [rows, WHOLE, WHOLE]) for rows in (WHOLE, SLICE, PART)]


@register_sharding(weighted_sum)
def weighted_sum_rules(rows: Any, weights: Any, order: Any, position: Any) -> Rules:
    _check(rows=rows)
    factors = None if weights is None else WHOLE
    return [([y], [y, factors, WHOLE, WHOLE]) for y in (WHOLE, SLICE, PART)]


@register_sharding(weighted_sum_backward)
def weighted_sum_backward_rules(grad: Any, rows: Any, weights: Any, order: Any, position: Any) -> Rules:
    _check(grad=grad, rows=rows)
    rest = [WHOLE, WHOLE, WHOLE]
    return [
        ([WHOLE, WHOLE], [WHOLE, WHOLE, *rest]),
        ([SLICE, PART], [SLICE, SLICE, *rest]),
        ([PART, PART], [PART, WHOLE, *rest]),
        ([WHOLE, PART], [WHOLE, PART, *rest]),
    ]


def _check(**specs: Any) -> None:
    """Raise ValueError if one of the tensors is sharded over its rows."""
    for argument, spec in specs.items():
        for i, placement in enumerate(spec.placements):
            if placement == Shard(0):
                wrong_value(argument, f"{placement!r} on dim {i} of its mesh", "Replicate(), Shard(1) or Partial() there")
