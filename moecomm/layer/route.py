"""route: choose each token's experts and their weights from the router's logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moecomm.errors import check_floating, check_int, check_tensor, wrong_type, wrong_value
from moecomm.layer.scores import Score, check_score, log_sigmoid, sigmoid, softmax
from moecomm.ops.base.library import call
from moecomm.ops.routing.choose_experts import choose
from moecomm.parallel.dtensor import check_whole, placed, to_local


def route(
    logits: Tensor,
    k: int,
    *,
    score: Score = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: Literal["top2", "max"] = "top2",
) -> tuple[Tensor, Tensor]:
    """Choose for each token the K experts with the highest scores, and compute their weights.

    Args:
        logits: [T, E], floating dtype. An expert whose logit is -inf is never chosen. If a token has fewer than K others, its
            last slots are dropped (id -1, weight 0). So a row of -inf drops the whole token, for example padding. Logits of
            -inf get a gradient of 0.
        k: K, the experts per token.
        score: the score of a logit: its "softmax" over the E experts, or its "sigmoid".
        normalize: whether a token's K weights are divided by their sum. The softmax is then a softmax over the K chosen
            experts: softmax before top-k with renormalization and softmax after top-k are the same function. With K = 1
            all weights are then ``scale``, and ``logits`` get no gradient.
        scale: a factor for all weights, applied after ``normalize``.
        bias: [E], floating dtype: added to the scores for the choice only; gets no gradient. `update_bias` makes the next
            one. Auxiliary-loss-free balancing, arXiv 2408.15664.
        num_groups: G: the experts form G equal groups of consecutive ids, such as the experts of a node.
        top_groups: a token may have experts in this many groups, those with the highest group scores. Group-limited
            (node-limited) routing, arXiv 2405.04434 and 2412.19437.
        group_score: the score of a group: the sum of the "top2" of its experts' scores, as in DeepSeek-V3, or their "max", as
            in DeepSeek-V2.

    Returns:
        ``weights`` [T, K], float32 (float64 for float64 logits); all computation is in that dtype.
        ``experts`` [T, K], int64, torch's index dtype, by descending score.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Example:
        >>> logits = torch.tensor([[0.25, 0.5, 0.25, 1.0], [1.0, 3.0, 2.0, 2.0]]).log()
        >>> weights, experts = route(logits, k=2)
        >>> experts
        tensor([[3, 1],
                [1, 2]])
        >>> weights
        tensor([[0.6667, 0.3333],
                [0.6000, 0.4000]])

    Published models:

    - Switch: ``route(logits, 1, normalize=False)``
    - Mixtral: ``route(logits, 2)``
    - DeepSeek-V2: ``route(logits, 6, normalize=False, scale=16.0, num_groups=8, top_groups=3, group_score="max")``
    - DeepSeek-V3: ``route(logits, 8, score="sigmoid", scale=2.5, bias=bias, num_groups=8, top_groups=4)``

    Backward: from the weights to ``logits``. The choice itself has no gradient.

    Ties: of equal scores the lower id comes first, on every device. Without a bias the logits are compared: they can differ
    where scores round to the same number.

    NaN: it counts as the highest score, as in `torch.topk`. A token with a NaN among its logits has a NaN among its weights.
    Other tokens are not affected.

    DTensors: on each mesh dim ``logits`` is Shard(0) or Replicate. The results have the same placements.
    """
    if isinstance(logits, DTensor):
        check_whole("logits", logits)
        weights, experts = route(
            logits.to_local(), k, score=score, normalize=normalize, scale=scale, bias=None if bias is None else to_local(bias),
            num_groups=num_groups, top_groups=top_groups, group_score=group_score,
        )  # fmt: skip
        return placed(weights, logits), placed(experts, logits)
    check_score(score)
    _check_weighting(normalize, scale)
    _check(logits, k, bias, num_groups, top_groups, group_score)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        ranked = logits
        if bias is not None or num_groups > 1:
            # One NaN logit makes the token's whole softmax NaN. Only the expert with the NaN shall rank highest.
            scores = _scores(logits, score).nan_to_num(0)  # [T, E]
            scores = torch.where(logits.isfinite(), scores if bias is None else scores + bias.to(logits.dtype), logits)
            ranked = logits if bias is None else scores
            if num_groups > 1:
                eligible = _eligible(scores, num_groups, top_groups, group_score)  # [T, G]
                ranked = ranked.unflatten(1, (num_groups, -1)).masked_fill(~eligible.unsqueeze(2), -torch.inf).flatten(1)
        experts = call(choose, ranked, k)  # [T, K]
        dropped = experts < 0
        index = experts.clamp(min=0)
    if normalize:
        chosen = logits.gather(1, index).masked_fill(dropped, -torch.inf).masked_fill(dropped[:, :1], 0)  # of a token without any: 0
        # A sum of scores can round to zero. A softmax of their logarithms needs no division by it.
        weights = (chosen if score == "softmax" else log_sigmoid(chosen)).softmax(1)
    elif score == "softmax":
        weights = _scores(logits, score).gather(1, index)
    else:
        weights = _scores(logits.gather(1, index), score)
    return (weights * scale).masked_fill(dropped, 0), experts


def _scores(logits: Tensor, score: Score) -> Tensor:
    return sigmoid(logits) if score == "sigmoid" else softmax(logits)


def _eligible(scores: Tensor, num_groups: int, top_groups: int, group_score: str) -> Tensor:
    """[T, G] bool: the groups in which a token may have experts, from scores [T, E]."""
    size = scores.shape[1] // num_groups
    best = scores.unflatten(1, (num_groups, size)).topk(1 if group_score == "max" else min(2, size)).values  # [T, G, 1 or 2]
    masked = best == -torch.inf
    total = best.masked_fill(masked, 0).sum(2).masked_fill(masked[:, :, 0], -torch.inf)  # [T, G]
    groups = call(choose, total, top_groups)  # [T, top_groups]
    return (groups.unsqueeze(2) == torch.arange(num_groups, device=scores.device)).any(1)


def _check_weighting(normalize: bool, scale: float) -> None:
    if not isinstance(normalize, bool):
        wrong_type("normalize", type(normalize).__name__, "a bool")
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        wrong_type("scale", type(scale).__name__, "a number")


def _check(logits: Tensor, k: int, bias: Tensor | None, num_groups: int, top_groups: int, group_score: str) -> None:
    check_tensor("logits", logits, "[T, E]", dims=2)
    check_floating("logits", logits)
    num_experts = logits.shape[1]
    for name, value in (("k", k), ("num_groups", num_groups), ("top_groups", top_groups)):
        check_int(name, value)
    if group_score not in ("top2", "max"):
        wrong_value("group_score", repr(group_score), '"top2" or "max"')
    if num_groups < 1 or num_experts % num_groups:
        wrong_value("num_groups", num_groups, f"a positive divisor of logits' E = {num_experts}")
    if not 1 <= top_groups <= num_groups:
        wrong_value("top_groups", top_groups, f"between 1 and num_groups = {num_groups}")
    eligible = num_experts // num_groups * top_groups
    if not 1 <= k <= eligible:
        fewer = "Choose fewer: k=min(k, logits.shape[1])" if num_groups == top_groups else "Allow more groups: top_groups=num_groups"
        wrong_value("k", k, f"between 1 and {eligible}, the experts that a token may choose from", "" if k < 1 else fewer)
    if bias is None:
        return
    check_tensor("bias", bias, "[E]", dims=1)
    check_floating("bias", bias)
    if bias.shape[0] != num_experts:
        wrong_value("bias", f"of shape {list(bias.shape)}", f"of shape [{num_experts}], logits' E = {num_experts}")
    if bias.device != logits.device:
        wrong_value("bias", f"on {bias.device}", f"on logits' device, {logits.device}")
