"""A call, or several, of each function in `mf.__all__`: what holds for every function is tested with these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moecomm.functional as mf
from moecomm.parallel.group import GroupLike

T, D, E, K = 5, 6, 4, 2


class Inputs(NamedTuple):
    """What the calls take: of the same shapes on all ranks, with other values on each."""

    x: Tensor  # [T, D]
    logits: Tensor  # [T, E]
    weights: Tensor  # [T, K]
    loss: Tensor  # []
    params: dict[str, Tensor]  # "gate" [E, D] and "experts.w" [2, D, 3], leaves with gradients
    experts: Tensor  # [T, K]
    placement: list[list[int]]  # two experts a rank; on two ranks, one of them on both


def inputs(rank: int, ranks: int) -> Inputs:
    seed = torch.Generator().manual_seed(rank)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seed).requires_grad_()

    params = {"gate": leaf(E, D), "experts.w": leaf(2, D, 3)}
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=seed)
    if rank == 1:
        params["gate"].grad = None
    experts = torch.stack([torch.randperm(E, generator=seed)[:K] for _ in range(T)])
    return Inputs(leaf(T, D), leaf(T, E), leaf(T, K), leaf(), params, experts, [[0, 1], [2, 0]] if ranks == 2 else [[0, 1]])


def plan(given: Inputs, group: GroupLike, **options: Any) -> mf.Plan:
    return mf.plan(given.experts, given.weights, E, group, like=given.x, **options)


def layer(given: Inputs, group: GroupLike, weighted: bool = True, **options: Any) -> Tensor:
    a_plan = plan(given, group, **options)
    return mf.combine(mf.dispatch(given.x, a_plan), a_plan, weighted=weighted)


def quantized(given: Inputs, group: GroupLike) -> Tensor:
    sent = mf.dispatch_quantized(given.x, plan(given, group), "mxfp8")
    rows = mf.dequantize(sent)
    sent.data.zero_()
    sent.scales.zero_()
    return rows


Call = Callable[[Inputs, GroupLike], Any]  # what it returns are the function's results, or what is made of them

CALLS: dict[str, list[Call]] = {
    "attach_loss": [lambda i, group: mf.attach_loss(i.x, i.loss, 0.5)],
    "clip_grad_norm_": [
        lambda i, group: mf.clip_grad_norm_(i.params, 1.0),
        lambda i, group: mf.clip_grad_norm_(i.params, 1.0, spread={"experts*": [group], "*": ""}),
        lambda i, group: mf.clip_grad_norm_(i.params, 1.0, spread={i.params["gate"]: "", "*": group}),
        lambda i, group: mf.clip_grad_norm_(i.params, 1.0, replicas={"experts*": (i.placement, group)}),
    ],
    "combine": [layer, lambda i, group: layer(i, group, max_rows=T), lambda i, group: layer(i, group, weighted=False, align=4)],
    "dequantize": [quantized],
    "dispatch": [lambda i, group: mf.dispatch({"x": i.x, "wide": i.x.unsqueeze(2)}, plan(i, group))],
    "dispatch_quantized": [quantized],
    "limit_by_capacity": [lambda i, group: mf.limit_by_capacity(i.experts, E, 2, group)],
    "load_balance_loss": [lambda i, group: mf.load_balance_loss(i.logits.softmax(-1), i.experts, group)],
    "plan": [
        lambda i, group: plan(i, group).weights,
        lambda i, group: (
            mf.plan(i.experts.clamp(max=len(i.placement)), i.weights, 1 + len(i.placement), group, placement=i.placement).weights
        ),
    ],
    "route": [
        lambda i, group: mf.route(i.logits, K),
        lambda i, group: mf.route(i.logits, K, score="sigmoid", bias=i.logits[0].detach()),
    ],
    "row_experts": [lambda i, group: i.x[:, 0].sum() + mf.row_experts(plan(i, group, align=4))],
    "row_weights": [lambda i, group: mf.row_weights(plan(i, group)), lambda i, group: mf.row_weights(plan(i, group, max_rows=T))],
    "slice_gather": [
        lambda i, group: mf.slice_gather(i.x, group),
        lambda i, group: mf.slice_gather(i.x, group, dim=1, grad="reduce"),
    ],
    "slice_reduce": [lambda i, group: mf.slice_reduce(i.x, group), lambda i, group: mf.slice_reduce(i.x, group, dim=1)],
    "slice_scatter": [lambda i, group: mf.slice_scatter(i.x, group), lambda i, group: mf.slice_scatter(i.x, group, dim=1)],
    "sum_gradient": [lambda i, group: mf.sum_gradient(i.x, group)],
    "sum_ranks": [lambda i, group: mf.sum_ranks(i.x, group)],
    "sync_grads_": [
        lambda i, group: mf.sync_grads_(i.params, group),
        lambda i, group: mf.sync_grads_(i.params, {"experts*": "", "*": group}, "sum"),
    ],
    "sync_params": [lambda i, group: mf.sync_params({"x": i.x, "loss": i.loss}, group)],
    "sync_params_": [lambda i, group: mf.sync_params_(i.params, group)],
    "sync_replica_grads_": [lambda i, group: mf.sync_replica_grads_(i.params["experts.w"], i.placement, group)],
    "sync_replicas_": [lambda i, group: mf.sync_replicas_(i.params["experts.w"], i.placement, group)],
    "update_bias": [lambda i, group: mf.update_bias(i.logits[0].detach(), i.experts, group=group)],
    "z_loss": [lambda i, group: mf.z_loss(i.logits)],
}
EAGER_ONLY = {"explain"}  # its docstring says so
DATA = {"Plan", "Quantized"}  # no functions
