"""save_received: activation checkpointing that keeps what a layer received from other ranks, and nothing else.

Without a policy, checkpointing runs the exchanges and the host synchronization of a layer a second
time, in the backward pass. That is correct, because all ranks repeat them in the same order, but it
costs as much as in the forward pass. With this policy only local work is repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from moecomm.ops.exchange.start_op import STARTS
from moecomm.ops.routing.read_sizes import plan_sizes, read_sizes


def save_received(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy for `torch.utils.checkpoint.create_selective_checkpoint_contexts` that repeats no exchange and no host synchronization.

    Returns:
        MUST_SAVE for the functional collectives, moecomm's own and torch's (also DTensor's), and
        for the sizes of the plan. PREFER_RECOMPUTE for all other ops, such as the experts. Your own
        policy may ask this one first.

    Raises nothing.

    Backward: that of the layer without checkpointing, bit for bit.

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

    A layer keeps this:

    - the [R, D] tokens that it received
    - the [S, D] sums that came home; eager mode keeps them even if nothing needs them again, a
      compiled graph does not
    - R short messages

    Collectives that write into a given tensor, such as those of `torch.distributed`, are repeated,
    because their effect counts.
    """
    return CheckpointPolicy.MUST_SAVE if _received(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _received(op: Any) -> bool:
    """Whether the result of ``op`` comes from other ranks, or ``op`` is the host synchronization."""
    if not isinstance(op, torch._ops.OpOverload):
        return False  # a higher-order op
    if op.namespace == "_c10d_functional":
        return not op._schema.is_mutable
    return op in STARTS or op in (plan_sizes, read_sizes)
