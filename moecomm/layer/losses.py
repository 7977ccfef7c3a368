"""Losses and biases that balance the router: load_balance_loss, z_loss, update_bias, attach_loss.

`attach_loss` attaches a loss to an activation, so that the backward pass reaches the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from moecomm.errors import check_experts, check_floating, check_tensor, differ, wrong_type, wrong_value
from moecomm.layer.capacity import count_slots, slot_keys
from moecomm.layer.scores import Score, check_score, shares
from moecomm.ops.exchange.collectives import all_reduced
from moecomm.ops.rows import attach_loss as ops
from moecomm.parallel.dtensor import alike_over, check_replicated, placed_mean, routed_like, to_local, token_groups
from moecomm.parallel.group import ALONE, Group, GroupLike, resolve_group
from moecomm.parallel.slices import slice_gather


def load_balance_loss(probabilities: Tensor, experts: Tensor, group: GroupLike = None, *, score: Score | None = None) -> Tensor:
    """The auxiliary load-balancing loss of Switch and GShard: E * sum over e of f_e * p_e.

    f_e is the fraction of all slots that expert e has. p_e is the mean probability of expert e. Both are taken over the
    tokens of all ranks of the group (arXiv 2101.03961). The loss is 1 where all experts get the same share, and E where
    one expert gets everything. Over a group it is the loss of the whole batch; a single rank may be unbalanced.

    Args:
        probabilities: [T, E], floating dtype: the router's logits, with ``score``. Or else the router's probabilities: the
            loss is 1 in balance only if each token's values sum to 1. T may differ between ranks and may be 0.
        experts: [T, K], integer dtype: the experts that `route` chose, before `limit_by_capacity`. After that limit the
            loss would not see the slots over capacity. A slot of -1 counts for no expert. A token without any expert is
            ignored, and its row of ``probabilities`` gets a gradient of 0.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.
        score: None, or the ``score`` that `route` got, if ``probabilities`` are logits. The probabilities are then the
            logits' "softmax", or their "sigmoid" scores divided by the sum of the token's scores. They are right for any
            finite logits, also where all scores of a token round to zero. A logit of -inf has the probability 0 and a
            gradient of 0, also if all logits of the token are -inf. Torch's own softmax, or a division by the sum, would
            give NaN there.

    Returns:
        A float32 scalar (float64 for float64 probabilities), the same on all ranks; 0 without tokens. All computation is in
        that dtype. For DTensors see below.

    Raises:
        TypeError, ValueError: an argument is wrong on this rank, or a DTensor has an unsupported placement. Raised
            before anything is sent.

    Example:
        >>> probabilities = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        >>> load_balance_loss(probabilities, torch.tensor([[0], [1]]))
        tensor(1.)
        >>> load_balance_loss(probabilities, torch.tensor([[0], [0]]))
        tensor(1.2500)
        >>> logits = torch.tensor([[-90.0, -91.0], [-torch.inf, -torch.inf]])  # sigmoids of 0 in float32; a padding token
        >>> load_balance_loss(logits, route(logits, 1, score="sigmoid")[1], score="sigmoid")
        tensor(1.4621)

    Backward: to ``probabilities``, through p only. The gradient is that of the sum of all ranks' losses. If the gradients
    of parameters are averaged over the ranks, as in data parallelism, they are those of the group's one loss.

    Cost: one all-gather of 2 E + 1 numbers, and one exchange of the same size in the backward; no host synchronization.

    DTensors:

    - Each is Shard(0) over its tokens. It may also be Replicate on a mesh dim that the group does not span.
    - The result is a DTensor: one number for the whole mesh, the same as on one process.
    - If the group contains all ranks with different tokens, the result is the group's loss, Replicate.
    - Otherwise it is the mean over the groups, Partial over the mesh dims along which they differ.
    - The gradient is that of this one number. Do not average it over the ranks.
    - If the group consists of all ranks of one or more mesh dims, the backward sends nothing: the incoming gradient is
      then the same on all of them.
    """
    ranks = resolve_group(group)
    like = routed_like({"probabilities": probabilities, "experts": experts}, ranks)
    if score is not None:
        check_score(score)
    if like is None:
        return _balance(probabilities, experts, ranks, "reduce", score)
    covered, alike = alike_over(like, ranks)
    # If all ranks of the group have the one loss, they also have its gradient: each rank takes the slice for its own part.
    loss = _balance(to_local(probabilities), to_local(experts), ranks, "slice" if covered else "reduce", score)
    return placed_mean(loss, like.device_mesh, alike)


def _balance(probabilities: Tensor, experts: Tensor, ranks: Group, grad: Literal["slice", "reduce"], score: Score | None) -> Tensor:
    check_tensor("probabilities", probabilities, "[T, E]", dims=2)
    check_floating("probabilities", probabilities, "mf.load_balance_loss(probabilities, experts)")
    _check_experts_of("probabilities", probabilities, experts)
    num_experts = probabilities.shape[1]
    dtype = torch.promote_types(probabilities.dtype, torch.float32)
    slots = count_slots(experts, num_experts)
    ignored = (slots.keys == num_experts).all(1)  # [T]
    counted = probabilities.to(dtype).masked_fill(ignored.unsqueeze(1), 0 if score is None else -torch.inf)
    sums = (counted if score is None else shares(counted, score)).sum(0)  # [E]
    tokens = (~ignored).sum(0, keepdim=True).to(dtype)
    stats = torch.cat((slots.counts.to(dtype), sums, tokens))  # [2 E + 1], sent as one message
    if ranks.size > 1:
        stats = slice_gather(stats.unsqueeze(0), ranks.name, grad=grad).sum(0)
    counts, sums, tokens = stats.split((num_experts, num_experts, 1))
    fractions = counts / counts.sum().clamp(min=1)
    return num_experts * (fractions * sums / tokens.clamp(min=1)).sum()


def _check_experts_of(argument: str, value: Tensor, experts: Tensor) -> None:
    """Raise unless ``experts`` are those of the tokens of ``value``."""
    check_experts(experts)
    if differ(experts.shape[0], value.shape[0]):
        wrong_value("experts", f"of shape {list(experts.shape)}", f"of {argument}' T = {value.shape[0]} tokens")
    if experts.device != value.device:
        wrong_value("experts", f"on {experts.device}", f"on {argument}' device, {value.device}")


def z_loss(logits: Tensor, experts: Tensor | None = None, group: GroupLike = "") -> Tensor:
    """The router z-loss of ST-MoE: the mean over tokens of logsumexp(logits)^2.

    It keeps the logits small (arXiv 2202.08906).

    Args:
        logits: [T, E], floating dtype. A logit of -inf marks an expert that the token may not choose; its gradient is 0. A
            token whose logits are all -inf is ignored. T may differ between ranks and may be 0.
        experts: [T, K], integer dtype, or None: the experts that `route` chose. A token without any expert, with -1 in all
            slots, is ignored, and its logits get a gradient of 0.
        group: "" for the mean over this rank's tokens. Or, as in `load_balance_loss`, for the mean over all ranks' tokens:
            a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group. Ranks with
            different numbers of counted tokens need it: the mean of their means is not the mean over the batch.

    Returns:
        A scalar, 0 without tokens. It is computed and returned in float32 (float64 for float64 logits). For DTensors see
        below.

    Raises:
        TypeError, ValueError: an argument is wrong on this rank, or a DTensor has an unsupported placement. Raised before
            anything is sent.

    Example:
        >>> z_loss(torch.zeros(3, 4))  # log(4)^2
        tensor(1.9218)
        >>> z_loss(torch.tensor([[0.0, 0.0], [5.0, 5.0]]), torch.tensor([[1], [-1]]))  # the second token is padding
        tensor(0.4805)

    Backward: to ``logits``. Over a group, the gradient is that of the sum of all ranks' losses, as in `load_balance_loss`: if
    the gradients of parameters are averaged over the ranks, they are those of the group's one loss.

    Cost: sends nothing for a plain tensor and the group "". Over a group: one all-gather of 2 numbers, and one exchange of
    the same size in the backward; no host synchronization.

    DTensors: on each mesh dim the placement is Shard(0) over the tokens, or Replicate. ``experts`` are placed alike, and
    ``group`` is "". The result is a DTensor: the mean over the tokens of the mesh, the same as on one process. It is Partial
    where the tokens are sharded, like DTensor's own means. For each such mesh dim one all-reduce of one number counts the
    tokens.
    """
    ranks = resolve_group(group)
    like = routed_like({"logits": logits, "experts": experts}, ALONE)
    total, tokens = _z(to_local(logits), None if experts is None else to_local(experts))
    if like is None:
        if ranks.size > 1:
            stats = torch.stack((total, tokens.to(total.dtype)))
            total, tokens = slice_gather(stats.unsqueeze(0), ranks.name, grad="reduce").sum(0).unbind()
        return total / tokens.clamp(min=1)
    if ranks.size > 1:
        wrong_value("group", f"of {ranks.size} ranks", '"", as a DTensor tells itself which ranks have other tokens')
    for other in token_groups(like):
        tokens = all_reduced(tokens, other.name)
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in like.placements]
    return DTensor.from_local(total / tokens.clamp(min=1), like.device_mesh, placements, run_check=False)


def _z(logits: Tensor, experts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of logsumexp(logits)^2 over the counted tokens, and the number of these tokens."""
    check_tensor("logits", logits, "[T, E]", dims=2)
    check_floating("logits", logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = (logits == -torch.inf).all(1)  # [T]
    if experts is not None:
        _check_experts_of("logits", logits, experts)
        ignored = ignored | (slot_keys(experts, logits.shape[1]) == logits.shape[1]).all(1)
    logits = logits.masked_fill(ignored.unsqueeze(1), 0)
    highest = logits.detach().amax(1)  # [T]
    # torch.logsumexp cannot be traced where T is unbacked (torch 2.13).
    z = ((logits - highest.unsqueeze(1)).exp().sum(1).log() + highest).masked_fill(ignored, 0)  # [T]
    return z.square().sum(), (~ignored).sum()


@torch.no_grad()
def update_bias(bias: Tensor, experts: Tensor, speed: float = 1e-3, group: GroupLike = None) -> Tensor:
    """The next `route` bias of auxiliary-loss-free balancing: ``bias + speed * sign(mean load - load)``.

    The bias rises by ``speed`` for experts below the mean load, and falls by ``speed`` for experts above it. The load of an
    expert is its number of slots on all ranks of the group (arXiv 2408.15664, with a speed of 0.001). Call it once a step,
    after the optimizer's step: ``bias.copy_(update_bias(bias, experts, group=group))``.

    Args:
        bias: [E], floating dtype, the same on all ranks. Prefer float32: a lower precision may lose a small step.
        experts: [T, K], integer dtype: the experts that `route` chose. A slot of -1 counts for no expert: a token without
            any expert changes nothing. T may differ between ranks and may be 0.
        speed: the size of the step.
        group: a ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or None for the default group.

    Returns:
        [E], with the dtype of ``bias``, the same on all ranks. The input is not modified. If ``bias`` is a DTensor, the
        result is a DTensor with the same placements.

    Raises:
        TypeError, ValueError: an argument is wrong on this rank, or a DTensor has an unsupported placement. Raised
            before anything is sent.
        ValueError: both are DTensors, and the mesh of ``experts`` holds other tokens than the group's ranks.
            These ranks would get different biases.

    Example:
        >>> update_bias(torch.zeros(3), torch.tensor([[0], [0], [1], [2], [0], [1]]), speed=0.5)
        tensor([-0.5000,  0.0000,  0.5000])

    DTensors: the local shards go in. ``experts`` is Shard(0) over its tokens. It may also be Replicate on a mesh dim that
    the group does not span. ``bias`` is Replicate on each mesh dim.

    Backward: none.

    Cost: one all-reduce of E counts; no host synchronization. The counts are integers, so their sum is exact.
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
    behind = load.sum() - bias.shape[0] * load  # integers: the bias of an expert exactly at the mean does not change
    return bias + speed * behind.sign().to(bias.dtype)


def attach_loss(x: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``x`` and attach ``loss`` to it: the backward pass through the result gives ``loss`` the gradient ``scale``.

    The effect is as if ``scale * loss`` were added to the loss that is differentiated. So no layer has to pass its own loss
    through the model. A pipeline stage sends on one activation. The backward pass through it includes the last stage's
    loss and ``scale`` times each loss attached on the way.

        y = attach_loss(combine(rows, plan), load_balance_loss(probabilities, experts, group), 0.01 / ranks)
        return x + y

    Args:
        x: floating dtype, any shape: any activation between ``loss`` and the loss that is differentiated.
        loss: a scalar, floating dtype.
        scale: the gradient of ``loss``. It does not depend on the gradient of ``x``: if the last loss is scaled for low
            precision, multiply ``scale`` by the same factor.

    Returns:
        A tensor with the values and the memory of ``x``, which autograd does not take for a view. If you change it in
        place, the memory of ``x`` changes as well: do not use ``x`` afterwards, as after `torch.Tensor.detach`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype or shape.

    Example:
        >>> x, loss = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
        >>> attach_loss(x, loss, scale=0.5).sum().backward()
        >>> x.grad, loss.grad
        (tensor([1., 1.]), tensor(0.5000))

    Backward: ``x`` gets its gradient unchanged. ``loss`` gets ``scale`` once for each backward pass that reaches the
    result, and nothing if none does.

    Cost: sends nothing.

    Scaling: if the last loss is divided, divide ``scale`` by the same number. Examples are a division by the ranks whose
    gradients are summed, or by accumulated microbatches. The schedules of torch.distributed.pipelining divide all gradients
    by the number of microbatches afterwards, those of attached losses included. The model then trains on the mean over the
    microbatches.

    DTensors: ``x``, ``loss`` or both may be DTensors. Whatever the placements of ``loss``, its gradient is the one number
    ``scale`` on all ranks, as if the loss were added to another DTensor.
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
