"""What keeps a router in balance: load_balance_loss, z_loss and update_bias; and attach_loss, which brings a loss into a backward pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from moecomm.errors import check_experts, check_floating, check_tensor, differ, wrong_type, wrong_value
from moecomm.layer.capacity import count_slots
from moecomm.ops.exchange.collectives import all_reduced
from moecomm.ops.rows import attach_loss as ops
from moecomm.parallel.dtensor import alike_over, check_replicated, check_whole, placed_mean, routed_like, to_local, token_groups
from moecomm.parallel.group import Group, GroupLike, resolve_group
from moecomm.parallel.slices import slice_gather


def load_balance_loss(probabilities: Tensor, experts: Tensor, group: GroupLike = None) -> Tensor:
    """The auxiliary loss of Switch and GShard: E * sum over e of f_e * p_e; 1 where all experts get as much, E where one gets all.

    f_e is the part of the slots that expert e has, and p_e the mean of its probabilities, both over the tokens of all ranks of the group:
    arXiv 2101.03961. Over a group the loss is that of the whole batch, which need not be balanced on each rank.

    Args:
        probabilities: [T, E], of a floating dtype: what the router gives each expert, ``logits.softmax(-1)``. Sigmoid scores go in as
            ``scores / scores.sum(-1, keepdim=True)``, since the loss is 1 in balance only where a token's add up to 1. T may differ from
            rank to rank and may be 0.
        experts: [T, K], of an integer dtype: the experts that `route` chose, before `limit_by_capacity`, whose limit would hide from the
            loss what is over it. A slot of -1 counts for no expert, and a token without any expert counts for nothing.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.

    Returns a scalar, float32 (float64 for float64 probabilities), the same on all ranks; 0 without tokens.

    Of DTensors, each of Shard(0) over its tokens or, where the group does not span the mesh dim, Replicate: a DTensor, since it is one
    number for the mesh, as one process has it: that loss, Replicate, where the group's ranks are all those that have different tokens;
    else the mean over the groups, Partial over the mesh dims along which they differ.

    Costs one all-gather of 2 E + 1 numbers, and one exchange of as many in the backward; no host sync. Of DTensors, the backward sends
    nothing where the group's ranks are all of one or more mesh dims: the gradient that comes is the same on all of them.

    Backward: to ``probabilities``, through p alone. It is the gradient of the sum of all ranks' losses, as of all that ranks compute:
    averaged over the ranks, as data parallelism does, the gradients of parameters are those of the one loss of the group. Of DTensors it
    is the gradient of the one number, which is not to be averaged.

    Raises TypeError or ValueError for an argument that is wrong on this rank, or a DTensor that is placed otherwise, before anything is
    sent.

    >>> probabilities = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    >>> load_balance_loss(probabilities, torch.tensor([[0], [1]]))
    tensor(1.)
    >>> load_balance_loss(probabilities, torch.tensor([[0], [0]]))
    tensor(1.2500)
    """
    ranks = resolve_group(group)
    like = routed_like({"probabilities": probabilities, "experts": experts}, ranks)
    if like is None:
        return _balance(probabilities, experts, ranks, "reduce")
    covered, alike = alike_over(like, ranks)
    # Where all ranks of the group have the one loss they have its gradient, too, and each takes what is for its own addend.
    loss = _balance(to_local(probabilities), to_local(experts), ranks, "slice" if covered else "reduce")
    return placed_mean(loss, like.device_mesh, alike)


def _balance(probabilities: Tensor, experts: Tensor, ranks: Group, grad: Literal["slice", "reduce"]) -> Tensor:
    check_tensor("probabilities", probabilities, "[T, E]", dims=2)
    check_floating("probabilities", probabilities)
    check_experts(experts)
    if differ(experts.shape[0], probabilities.shape[0]):
        wrong_value("experts", f"of shape {list(experts.shape)}", f"of probabilities' T = {probabilities.shape[0]} tokens")
    if experts.device != probabilities.device:
        wrong_value("experts", f"on {experts.device}", f"on probabilities' device, {probabilities.device}")
    num_experts = probabilities.shape[1]
    dtype = torch.promote_types(probabilities.dtype, torch.float32)
    slots = count_slots(experts, num_experts)
    routed = (slots.keys < num_experts).any(1)  # [T]
    sums = probabilities.to(dtype).masked_fill(~routed.unsqueeze(1), 0).sum(0)  # [E]
    stats = torch.cat((slots.counts.to(dtype), sums, routed.sum(0, keepdim=True).to(dtype)))  # [2 E + 1]: one message
    if ranks.size > 1:
        stats = slice_gather(stats.unsqueeze(0), ranks.name, grad=grad).sum(0)
    counts, sums, tokens = stats.split((num_experts, num_experts, 1))
    fractions = counts / counts.sum().clamp(min=1)
    return num_experts * (fractions * sums / tokens.clamp(min=1)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """The router z-loss of ST-MoE: the mean over tokens of logsumexp(logits)^2, which keeps logits small: arXiv 2202.08906.

    Args:
        logits: [T, E], of a floating dtype. A logit of -inf is an expert that the token may not have; a token of -inf alone counts for
            nothing.

    Returns a scalar, float32 (float64 for float64 logits), in which it is computed: this rank's mean, 0 without tokens. Sends nothing.

    Of a DTensor, of Shard(0) over its tokens or Replicate on each mesh dim: a DTensor, the mean over the tokens of the mesh, as one process
    has it, and as DTensor's own means Partial where the tokens are sharded. How many count is one all-reduce of one number for each such
    mesh dim.

    Backward: to ``logits``.

    Raises TypeError or ValueError where ``logits`` is no such tensor, or a DTensor that is placed otherwise, before anything is sent.

    >>> z_loss(torch.zeros(3, 4))  # log(4)^2
    tensor(1.9218)
    """
    if not isinstance(logits, DTensor):
        total, tokens = _z(logits)
        return total / tokens.clamp(min=1)
    check_whole("logits", logits)
    total, tokens = _z(to_local(logits))
    for group in token_groups(logits):
        tokens = all_reduced(tokens, group.name)
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in logits.placements]
    return DTensor.from_local(total / tokens.clamp(min=1), logits.device_mesh, placements, run_check=False)


def _z(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of what z_loss is the mean of, and over how many tokens."""
    check_tensor("logits", logits, "[T, E]", dims=2)
    check_floating("logits", logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    masked = (logits == -torch.inf).all(1)  # [T]
    logits = logits.masked_fill(masked.unsqueeze(1), 0)
    highest = logits.detach().amax(1)  # [T]
    # Not torch.logsumexp, which cannot be traced where T is unbacked (torch 2.13).
    z = ((logits - highest.unsqueeze(1)).exp().sum(1).log() + highest).masked_fill(masked, 0)  # [T]
    return z.square().sum(), (~masked).sum()


@torch.no_grad()
def update_bias(bias: Tensor, experts: Tensor, speed: float = 1e-3, group: GroupLike = None) -> Tensor:
    """The next `route` bias of auxiliary-loss-free balancing: raised by ``speed`` for experts below the mean load, lowered above it.

    ``bias + speed * sign(mean load - load)``, where an expert's load is how many slots it has on all ranks of the group: arXiv 2408.15664,
    whose speed is 0.001. Called once a step, after the optimizer's: ``bias.copy_(update_bias(bias, experts, group=group))``.

    Args:
        bias: [E], of a floating dtype, the same on all ranks; float32 is best, as a small step may be lost in a lower precision.
        experts: [T, K], of an integer dtype: the experts that `route` chose; a slot of -1 is no expert's load. T may differ from rank to
            rank and may be 0.
        speed: the size of the step.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.

    DTensors go in as their local shards: experts of Shard(0) over its tokens or, where the group does not span the mesh dim, Replicate;
    ``bias`` of Replicate on each mesh dim.

    Returns [E], of bias' dtype, the same on all ranks; ``bias`` itself is not changed. Where it is a DTensor, one that is placed alike.

    Costs one all-reduce of E counts, which are integers and so exact, and no host sync. No backward.

    Raises TypeError or ValueError for an argument that is wrong on this rank, or a DTensor that is placed otherwise, before anything is
    sent; ValueError where both are DTensors and experts' mesh has other tokens than the group's, as its ranks would get different biases.

    >>> update_bias(torch.zeros(3), torch.tensor([[0], [0], [1], [2], [0], [1]]), speed=0.5)
    tensor([-0.5000,  0.0000,  0.5000])
    """
    ranks = resolve_group(group)
    like = routed_like({"experts": experts}, ranks)
    if isinstance(bias, DTensor):
        check_replicated("bias", bias, like, ranks)
        local = update_bias(to_local(bias), to_local(experts), speed, group)
        return DTensor.from_local(local, bias.device_mesh, bias.placements, run_check=False)
    experts = to_local(experts)
    check_tensor("bias", bias, "[E]", dims=1)
    check_floating("bias", bias)
    check_experts(experts)
    if experts.device != bias.device:
        wrong_value("experts", f"on {experts.device}", f"on bias' device, {bias.device}")
    if not isinstance(speed, int | float) or isinstance(speed, bool):
        wrong_type("speed", type(speed).__name__, "a number")
    load = count_slots(experts, bias.shape[0]).counts  # [E]
    if ranks.size > 1:
        load = all_reduced(load, ranks.name)
    behind = load.sum() - bias.shape[0] * load  # in integers: an expert at the mean stays
    return bias + speed * behind.sign().to(bias.dtype)


def attach_loss(x: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """``x``, and in its backward pass ``loss`` gets the gradient ``scale``: as if ``scale * loss`` were added to what is differentiated.

    So a layer needs to hand no loss of its own through the model: a pipeline stage sends on one activation, and the backward pass that
    comes back through it is that of the last stage's loss plus ``scale`` times the losses attached on the way.

        y = attach_loss(combine(rows, plan), load_balance_loss(probabilities, experts, group), 0.01 / ranks)
        return x + y

    Where the last loss is divided (by the ranks whose gradients are summed, by accumulated microbatches), divide ``scale`` alike. The
    schedules of torch.distributed.pipelining divide all gradients by the microbatches afterwards, and so those of attached losses too:
    what is trained is the mean over the microbatches.

    Args:
        x: of any shape and a floating dtype: any activation on the way from ``loss`` to what is differentiated.
        loss: a scalar, of a floating dtype. Either of the two may be a DTensor; whatever the placements of a loss that is one, its gradient
            is the one number ``scale`` on all ranks, as where it is added to another DTensor.
        scale: the gradient of ``loss``. It does not depend on the gradient of ``x``: a loss scaled for low precision needs it scaled alike.

    Returns ``x``, as a view; the zero-bubble schedules take no view as a stage's output, so do not make it the last step of one. Sends
    nothing.

    Backward: to ``x``, its gradient; to ``loss``, ``scale``, once for each backward pass that reaches the result, and nothing where none
    does.

    Raises TypeError or ValueError for an argument that is none of these.

    >>> x, loss = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    >>> attach_loss(x, loss, scale=0.5).sum().backward()
    >>> x.grad, loss.grad
    (tensor([1., 1.]), tensor(0.5000))
    """
    check_tensor("x", x, "of any shape")
    check_floating("x", x)
    check_tensor("loss", loss, "[]", dims=0)
    check_floating("loss", loss)
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        wrong_type("scale", type(scale).__name__, "a number")
    if isinstance(loss, DTensor):
        loss = loss.to_local(grad_placements=[Replicate()] * loss.device_mesh.ndim)
    return ops.attach_loss(x, loss, scale)
