"""The router's scores: how `route` and the losses read logits, with -inf for an expert that a token may not choose."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from moecomm.errors import wrong_value

Score: TypeAlias = Literal["softmax", "sigmoid"]


def check_score(score: object) -> None:
    if score not in ("softmax", "sigmoid"):
        wrong_value("score", repr(score), '"softmax" or "sigmoid"')


def softmax(logits: Tensor) -> Tensor:
    """[T, E]: the softmax of logits [T, E], where a token whose logits are all -inf has zeros.

    A logit of -inf gets a gradient of 0.
    """
    none = logits.detach().amax(1, keepdim=True) == -torch.inf  # [T, 1]
    return logits.masked_fill(none, 0).softmax(1).masked_fill(none, 0)


def sigmoid(logits: Tensor) -> Tensor:
    """1 / (1 + exp(-logits)), with the same bits for a logit wherever it is in the tensor."""
    return _by_one_code(logits).sigmoid()


def log_sigmoid(logits: Tensor) -> Tensor:
    """log(1 / (1 + exp(-logits))), with the same bits for a logit wherever it is in the tensor.

    torch.nn.functional.logsigmoid cannot be traced where T is unbacked (torch 2.13).
    """
    if logits.device.type != "cpu":
        return -torch.logaddexp(-logits, torch.zeros_like(logits))
    size = logits.where(logits >= 0, -logits)  # with a derivative of 1 at 0, where that of relu is 0
    return -(-logits).relu() - _by_one_code(_by_one_code(-size).exp()).log1p()


def _by_one_code(x: Tensor) -> Tensor:
    """``x`` in a layout for which ATen computes each element by the same code.

    On a dense tensor of a CPU it computes all but the last few elements with vector instructions, whose functions differ in the
    last bit. A token's scores would then depend on how many tokens come after it.
    """
    return torch.stack((x, x), -1)[..., 0] if x.device.type == "cpu" else x


def shares(logits: Tensor, score: Score) -> Tensor:
    """[T, E]: each token's scores divided by their sum; zeros for a token whose logits are all -inf.

    The sum can round to zero. A softmax of the scores' logarithms needs no division by it.
    """
    return softmax(logits if score == "softmax" else log_sigmoid(logits))
