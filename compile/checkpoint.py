"""What activation checkpointing keeps of a layer: what came from other ranks, and nothing else.

Without a policy, checkpointing runs a layer's exchanges and its host sync a second time in the backward pass: right on every rank, for all
ranks repeat them in the same order, but as dear as in the forward pass. With this one they are not repeated, and only local work is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from moecomm.ops.exchange.start_op import STARTS
from moecomm.ops.routing.read_sizes import plan_sizes, read_sizes


def save_received(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy for `torch.utils.checkpoint.create_selective_checkpoint_contexts` that repeats no exchange and no host sync.

    It keeps the result of each functional collective, moecomm's own and torch's (DTensor's too), and the sizes of the plan: for a layer
    [R, D] tokens that came, [S, D] sums that came home (eager mode keeps them even where nothing needs them again; a compiled graph
    does not) and R short messages. The experts' activations are made again. A policy of your own may ask this one first.

    Collectives that write into a tensor they are given, as those of `torch.distributed` do, are repeated: their effect is what counts.

    Never raises. The backward pass is that of the layer without checkpointing, bit for bit.

    >>> from functools import partial
    >>> from moecomm.compile.checkpoint import save_received
    >>> from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
    >>> def layer(x):
    ...     a_plan = plan(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
    ...     return combine(dispatch(x, a_plan).exp(), a_plan)
    >>> contexts = partial(create_selective_checkpoint_contexts, save_received)
    >>> x = torch.zeros(2, 3, requires_grad=True)
    >>> checkpoint(layer, x, use_reentrant=False, context_fn=contexts).sum().backward()
    >>> x.grad
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    return CheckpointPolicy.MUST_SAVE if _received(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _received(op: Any) -> bool:
    """Whether ``op`` gives what came from other ranks, or is the host sync."""
    if not isinstance(op, torch._ops.OpOverload):
        return False  # a higher-order op
    if op.namespace == "_c10d_functional":
        return not op._schema.is_mutable
    return op in STARTS or op in (plan_sizes, read_sizes)
