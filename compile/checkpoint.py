"""save_received and save_matmuls: what activation checkpointing keeps of a layer. contexts: nothing is kept that no backward needs.

Without a policy, checkpointing runs the exchanges and the host synchronization of a layer a second
time, in the backward pass. That is correct, because all ranks repeat them in the same order, but it
costs as much as in the forward pass. With these policies only local work is repeated, and with
`save_matmuls` no matmul either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from moecomm.compile.overlap import is_matmul
from moecomm.ops.exchange.start_op import STARTS
from moecomm.ops.routing.read_sizes import plan_sizes, read_sizes

Policy = Callable[..., CheckpointPolicy]


def save_received(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy for `contexts` that repeats no exchange and no host synchronization.

    Returns:
        MUST_SAVE for the functional collectives, moecomm's own and torch's (also DTensor's), and
        for the sizes of the plan. PREFER_RECOMPUTE for all other ops, such as the experts. Your own
        policy may ask this one first.

    Raises nothing.

    Backward: that of the layer without checkpointing, bit for bit.

    >>> from functools import partial
    >>> from moecomm.compile.checkpoint import contexts, save_received
    >>> from torch.utils.checkpoint import checkpoint
    >>> def layer(x):
    ...     a_plan = plan(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
    ...     return combine(dispatch(x, a_plan).exp(), a_plan)
    >>> x = torch.zeros(2, 3, requires_grad=True)
    >>> checkpoint(layer, x, use_reentrant=False, context_fn=partial(contexts, save_received)).sum().backward()
    >>> x.grad
    tensor([[1., 1., 1.],
            [1., 1., 1.]])

    A layer keeps this:

    - the [R, D] tokens that it received
    - the [S, D] sums that came home, if what follows in the region needs them
    - R short messages

    Collectives that write into a given tensor, such as those of `torch.distributed`, are repeated,
    because their effect counts.
    """
    return CheckpointPolicy.MUST_SAVE if _received(op) else CheckpointPolicy.PREFER_RECOMPUTE


def save_matmuls(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy for `contexts` that repeats no exchange, no host synchronization and no matmul: cheap work alone is repeated.

    It is for layers whose experts multiply `row_weights` in, so that ``combine(rows, plan, weighted=False)`` needs no rows. Such
    a layer keeps the tokens that came from other ranks, [R, D], and the result of the experts' first matmul, [N, 2 H] for
    SwiGLU. The gather of the rows [N, D] and the activation [N, H] are made again. The result of the last matmul is not kept.

    Returns:
        MUST_SAVE for what `save_received` saves and for the matmuls of torch: mm, addmm, bmm, baddbmm and the grouped and
        scaled ones; linear, matmul and einsum consist of these. PREFER_RECOMPUTE for all other ops, attention and matmuls of
        your own kernels among them: your own policy may ask this one first.

    Raises nothing.

    Backward: that of the layer without checkpointing, bit for bit.

    >>> from functools import partial
    >>> from torch.utils.checkpoint import checkpoint
    >>> from moecomm.compile.checkpoint import contexts, save_matmuls
    >>> into, out = torch.ones(2, 3, 4, requires_grad=True), torch.ones(2, 4, 3, requires_grad=True)
    >>> def layer(x):
    ...     a_plan = plan(torch.tensor([[1], [0]]), torch.full((2, 1), 0.5), num_experts=2)
    ...     hidden = torch.bmm(dispatch(x, a_plan).unsqueeze(1), into).relu() * row_weights(a_plan)[:, None, None]  # a row for each
    ...     return combine(torch.bmm(hidden, out).squeeze(1), a_plan, weighted=False)
    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> checkpoint(layer, x, use_reentrant=False, context_fn=partial(contexts, save_matmuls)).sum().backward()
    >>> x.grad
    tensor([[6., 6., 6.],
            [6., 6., 6.]])
    """
    return CheckpointPolicy.MUST_SAVE if _received(op) or is_matmul(op) else CheckpointPolicy.PREFER_RECOMPUTE


def contexts(policy: Policy) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What `torch.utils.checkpoint.checkpoint` takes as ``context_fn``: ``partial(contexts, policy)``.

    It does what torch's ``create_selective_checkpoint_contexts`` does, and keeps less in eager mode. Torch keeps every result
    that the policy saves. This lets go those that were made after the last tensor that a backward needs. The backward pass
    computes again up to that tensor, and no further. So an experts' last matmul and the sums that came home are neither kept
    nor made again, if they stand at the end of the region. A compiled graph does that by itself.

    Args:
        policy: `save_received`, `save_matmuls`, or one of your own, as torch takes it.

    Returns:
        Two contexts, for the forward pass and for what the backward pass computes again.

    Raises:
        RuntimeError: in the backward pass, a saved result was changed in place.

    Integers that a backward needs, such as a plan's indices, are kept as they are. Another backward pass through the same region
    (``retain_graph``), or one without checkpoint's early stop, computes again what is no longer there, exchanges too.
    """
    if get_proxy_mode() is not None:  # a compiler traces: its partitioner follows the policy
        return create_selective_checkpoint_contexts(policy)
    kept: dict[Any, Any] = {}
    return _Forward(kept, policy), _Again(kept)


class _Region(TorchDispatchMode):
    """Runs ops one by one, and sees which tensors autograd saves; ``kept`` has results by op and number of the call."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # a compiled function in the region is one op

    def __init__(self, kept: dict[Any, Any]) -> None:
        super().__init__()
        self.kept = kept

    def __enter__(self) -> Any:
        self.calls: Counter[Any] = Counter()
        checkpoints = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if checkpoints is None:
            raise RuntimeError("contexts(policy) was entered by itself; it must be the context_fn of torch.utils.checkpoint.checkpoint")
        pack, unpack = checkpoints

        def save(tensor: Tensor) -> Any:
            if tensor.dtype in (torch.int32, torch.int64):  # combine saves its indices after its exchange
                return tensor
            self.saved()
            return pack(tensor)

        self.hooks = saved_tensors_hooks(save, lambda packed: packed if isinstance(packed, Tensor) else unpack(packed))
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.hooks.__exit__(*exception)
        del self.hooks  # which hold this

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in SAC_IGNORED_OPS:
            return op(*args, **(kwargs or {}))
        self.calls[op] += 1
        return self.run((op, self.calls[op]), op, args, kwargs or {})

    def saved(self) -> None:
        """Autograd saves a tensor now."""

    def run(self, call: Any, op: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class _Forward(_Region):
    def __init__(self, kept: dict[Any, Any], policy: Policy) -> None:
        super().__init__(kept)
        self.policy = policy
        self.late: list[Any] = []  # the calls since autograd saved a tensor

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for call in self.late:
            del self.kept[call]

    def saved(self) -> None:
        self.late.clear()

    def run(self, call: Any, op: Any, args: Any, kwargs: Any) -> Any:
        result = op(*args, **kwargs)
        context = SelectiveCheckpointContext(is_recompute=False)
        context.op_output = result  # torch 2.11 has no argument for it
        if self.policy(context, op, *args, **kwargs) in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE):
            own = tree_map_only(Tensor, _detached, result)
            self.kept[call] = own, _versions(own)
            self.late.append(call)
        return result


class _Again(_Region):
    def run(self, call: Any, op: Any, args: Any, kwargs: Any) -> Any:
        if call not in self.kept:
            return op(*args, **kwargs)
        result, versions = self.kept.pop(call)
        if _versions(result) != versions:
            raise RuntimeError(f"moecomm: the result of {op} was changed in place, but checkpointing keeps it for the backward pass")
        return result


def _detached(tensor: Tensor) -> Tensor:
    """The same memory and the same count of changes in place, without the backward that autograd writes into the tensor itself."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):  # what a mode sees is below that key
        return tensor.detach()


def _versions(result: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _received(op: Any) -> bool:
    """Whether the result of ``op`` comes from other ranks, or ``op`` is the host synchronization."""
    if not isinstance(op, torch._ops.OpOverload):
        return False  # a higher-order op
    if op.namespace == "_c10d_functional":
        return not op._schema.is_mutable
    return op in STARTS or op in (plan_sizes, read_sizes)
