"""route: each token's experts and their weights, from the router's logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moecomm.errors import check_floating, check_tensor, wrong_type, wrong_value
from moecomm.ops.routing.choose_experts import choose
from moecomm.parallel.dtensor import check_whole, placed, to_local


def route(
    logits: Tensor,
    k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: Literal["top2", "max"] = "top2",
) -> tuple[Tensor, Tensor]:
    """Each token's K experts, those with the highest scores, and their weights.

    Args:
        logits: [T, E], of a floating dtype. An expert whose logit is -inf is never chosen: where fewer than K others are left, the
            token's last slots are dropped (id -1, weight 0). So a row of -inf is a token that goes nowhere, such as padding. A DTensor
            is Shard(0) or Replicate on each mesh dim, and so are then the results.
        k: K, the experts a token.
        score: what a logit becomes: its "softmax" over the E experts, or its "sigmoid".
        normalize: whether a token's K weights are divided by their sum. The softmax then is that over the K chosen experts alone: softmax
            before top-k, renormalised, and softmax after top-k are the same function. With K = 1 all weights then are ``scale``, and no
            gradient reaches ``logits``.
        scale: a factor of all weights, after ``normalize``.
        bias: [E], of a floating dtype: added to the scores for the choice, and only for it; gets no gradient. `update_bias` makes the
            next one. Auxiliary-loss-free balancing, arXiv 2408.15664.
        num_groups: G, where the experts stand in G equal groups, one behind the other, such as those of a node.
        top_groups: in how many groups, those with the highest group scores, a token may have its experts. Group-limited
            (node-limited) routing, arXiv 2405.04434 and 2412.19437.
        group_score: of a group's experts' scores, the sum of the "top2", as in DeepSeek-V3, or the "max", as in DeepSeek-V2.

    Returns ``weights`` [T, K], float32 (float64 for float64 logits; all is computed in that dtype), and ``experts`` [T, K], int64, as
    torch indexes with it, by descending score. Of equal scores the lower id comes first, on every device; without a bias it is the
    logits that are compared, which differ where scores round to the same number. NaN counts as the highest, as in `torch.topk`: a
    token with a NaN among its logits has a NaN among its weights, and other tokens are as they were.

    Backward: from the weights to ``logits``; none through the choice.

    Raises TypeError or ValueError for an argument that is wrong.

    As in the published models:

    - Switch: ``route(logits, 1, normalize=False)``
    - Mixtral: ``route(logits, 2)``
    - DeepSeek-V2: ``route(logits, 6, normalize=False, scale=16.0, num_groups=8, top_groups=3, group_score="max")``
    - DeepSeek-V3: ``route(logits, 8, score="sigmoid", scale=2.5, bias=bias, num_groups=8, top_groups=4)``

    >>> logits = torch.tensor([[0.25, 0.5, 0.25, 1.0], [1.0, 3.0, 2.0, 2.0]]).log()
    >>> weights, experts = route(logits, k=2)
    >>> experts
    tensor([[3, 1],
            [1, 2]])
    >>> weights
    tensor([[0.6667, 0.3333],
            [0.6000, 0.4000]])
    """
    if isinstance(logits, DTensor):
        check_whole("logits", logits)
        weights, experts = route(
            logits.to_local(), k, score=score, normalize=normalize, scale=scale, bias=None if bias is None else to_local(bias),
            num_groups=num_groups, top_groups=top_groups, group_score=group_score,
        )  # fmt: skip
        return placed(weights, logits), placed(experts, logits)
    _check(logits, k, score, bias, num_groups, top_groups, group_score)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        ranked = logits
        if bias is not None or num_groups > 1:
            scores = _scores(logits, score).nan_to_num(0)  # [T, E]: one NaN makes a token's softmax all NaN, but is itself to be chosen
            scores = torch.where(logits.isfinite(), scores if bias is None else scores + bias.to(logits.dtype), logits)
            ranked = logits if bias is None else scores
            if num_groups > 1:
                eligible = _eligible(scores, num_groups, top_groups, group_score)  # [T, G]
                ranked = ranked.unflatten(1, (num_groups, -1)).masked_fill(~eligible.unsqueeze(2), -torch.inf).flatten(1)
        experts = choose(ranked, k)  # [T, K]
        dropped = experts < 0
        index = experts.clamp(min=0)
    if normalize:
        chosen = _finite(logits.gather(1, index).masked_fill(dropped, -torch.inf))
        # A sum of scores can round to zero; their logarithms need no division.
        weights = (chosen if score == "softmax" else _log_sigmoid(chosen)).softmax(1)
    elif score == "softmax":
        weights = _scores(logits, score).gather(1, index)
    else:
        weights = _scores(logits.gather(1, index), score)
    return (weights * scale).masked_fill(dropped, 0), experts


def _scores(logits: Tensor, score: str) -> Tensor:
    return logits.sigmoid() if score == "sigmoid" else _finite(logits).softmax(1)


def _log_sigmoid(logits: Tensor) -> Tensor:
    """log(1 / (1 + exp(-logits))); torch.nn.functional.logsigmoid cannot be traced where T is unbacked (torch 2.13)."""
    return -torch.logaddexp(-logits, torch.zeros_like(logits))


def _finite(logits: Tensor) -> Tensor:
    """With the lowest number for -inf: the same softmax, but no NaN, forward or backward, in a row of nothing else."""
    return logits.clamp(min=torch.finfo(logits.dtype).min)


def _eligible(scores: Tensor, num_groups: int, top_groups: int, group_score: str) -> Tensor:
    """[T, G] bool: whether a token may have experts in a group, by scores [T, E]."""
    size = scores.shape[1] // num_groups
    best = scores.unflatten(1, (num_groups, size)).topk(1 if group_score == "max" else min(2, size)).values  # [T, G, 1 or 2]
    masked = best == -torch.inf
    total = best.masked_fill(masked, 0).sum(2).masked_fill(masked[:, :, 0], -torch.inf)  # [T, G]
    groups = choose(total, top_groups)  # [T, top_groups]
    return (groups.unsqueeze(2) == torch.arange(num_groups, device=scores.device)).any(1)


def _check(logits: Tensor, k: int, score: str, bias: Tensor | None, num_groups: int, top_groups: int, group_score: str) -> None:
    check_tensor("logits", logits, "[T, E]", dims=2)
    check_floating("logits", logits)
    num_experts = logits.shape[1]
    for name, value in (("k", k), ("num_groups", num_groups), ("top_groups", top_groups)):
        if not isinstance(value, int) or isinstance(value, bool):
            wrong_type(name, type(value).__name__, "an int")
    if score not in ("softmax", "sigmoid"):
        wrong_value("score", repr(score), '"softmax" or "sigmoid"')
    if group_score not in ("top2", "max"):
        wrong_value("group_score", repr(group_score), '"top2" or "max"')
    if num_groups < 1 or num_experts % num_groups:
        wrong_value("num_groups", num_groups, f"a positive divisor of logits' E = {num_experts}")
    if not 1 <= top_groups <= num_groups:
        wrong_value("top_groups", top_groups, f"between 1 and num_groups = {num_groups}")
    eligible = num_experts // num_groups * top_groups
    if not 1 <= k <= eligible:
        wrong_value("k", k, f"between 1 and {eligible}, the experts that a token may choose from")
    if bias is None:
        return
    check_tensor("bias", bias, "[E]", dims=1)
    check_floating("bias", bias)
    if bias.shape[0] != num_experts:
        wrong_value("bias", f"of shape {list(bias.shape)}", f"of shape [{num_experts}], logits' E = {num_experts}")
    if bias.device != logits.device:
        wrong_value("bias", f"on {bias.device}", f"on logits' device, {logits.device}")
