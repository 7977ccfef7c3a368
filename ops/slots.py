"""(ids, weights)[r] = what travels beside a received row: its token's K slots' local experts, -1 where one lives elsewhere, and weights.

Costs K * (weight + 1, 2 or 4 bytes of id) bytes a (token, rank) pair, in one message. A pair that is padding has ids -1 and weights 0.
Its backward sends the gradient of the weights home, [R, K] -> [S, K], and adds up each token's pairs: `weighted_sum` without weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moecomm.ops.exchange import start, wait
from moecomm.ops.library import LIBRARY, define
from moecomm.ops.pairs import home
from moecomm.ops.starts import define_start

SEND = (
    "slots_exchange(Tensor experts, Tensor weights, Tensor keys, Tensor order, int local, Tensor? splits, SymInt received, str group) "
    "-> Tensor"
)
UNPACK = "unpack_slots(Tensor message, int k, int local, ScalarType dtype) -> (Tensor, Tensor)"
SLOTS = (
    "exchange_slots(Tensor weights, Tensor experts, Tensor keys, Tensor order, Tensor position, int local, Tensor? splits, "
    "SymInt received, str group) -> (Tensor, Tensor)"
)


def _id_dtype(local: int) -> torch.dtype:
    """The narrowest dtype of a local expert's id."""
    return torch.int8 if local <= 2**7 else torch.int16 if local <= 2**15 else torch.int32


def _width(k: int, local: int, dtype: torch.dtype) -> int:
    return k * (dtype.itemsize + _id_dtype(local).itemsize)


def send_fake(
    experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, local: int, splits: Tensor | None, received: int, group: str
) -> Tensor:
    return weights.new_empty(received, _width(experts.shape[1], local, weights.dtype), dtype=torch.uint8)


def message_fake(experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, local: int, padded: bool) -> Tensor:
    return weights.new_empty(order.shape[0], _width(experts.shape[1], local, weights.dtype), dtype=torch.uint8)


def message(experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, local: int, padded: bool) -> Tensor:
    """What is sent of each pair."""
    k = experts.shape[1]
    if padded:  # the pairs of order -1: the slots of one more token, that has no experts
        experts, weights, keys = pad(experts, (0, 0, 0, 1), value=-1), pad(weights, (0, 0, 0, 1)), pad(keys, (0, 0, 0, 1))
        order = torch.where(order < 0, keys.numel() - k, order)
    token = torch.div(order, k, rounding_mode="floor")
    first = keys.flatten().index_select(0, order).unsqueeze(1) * local  # [S, 1] the first expert of the rank it goes to
    ids = experts.index_select(0, token).to(torch.int32) - first  # [S, K]
    ids = torch.where((ids >= 0) & (ids < local), ids, -1).to(_id_dtype(local))
    return torch.cat((weights.index_select(0, token).view(torch.uint8), ids.view(torch.uint8)), 1)


def send(
    experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, local: int, splits: Tensor | None, received: int, group: str
) -> Tensor:
    sent = message(experts, weights, keys, order, local, splits is None)  # equal splits have padding
    return start(sent, received, splits, 0, group, "the experts and weights of plan")


def unpack_fake(message: Tensor, k: int, local: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return message.new_empty(message.shape[0], k, dtype=torch.int32), message.new_empty(message.shape[0], k, dtype=dtype)


def unpack(message: Tensor, k: int, local: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weights, ids = message.split((k * dtype.itemsize, k * _id_dtype(local).itemsize), 1)
    ids = ids.clone(memory_format=torch.contiguous_format).view(_id_dtype(local))
    return ids.to(torch.int32, copy=True), weights.clone(memory_format=torch.contiguous_format).view(dtype)


slots_exchange = define_start(SEND, send_fake, send, send)
unpack_slots = define(UNPACK, unpack_fake, unpack, unpack)


class _ExchangeSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, experts: Tensor, keys: Tensor, order: Tensor, position: Tensor, *rest: Any) -> Any:
        local, splits, received, group = rest
        ctx.save_for_backward(order, position, splits)
        ctx.group = group
        message = wait(slots_exchange(experts, weights, keys, order, local, splits, received, group))
        ids, there = unpack_slots(message, experts.shape[1], local, weights.dtype)
        ctx.mark_non_differentiable(ids)
        return there, ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        return home(grad, *ctx.saved_tensors, grad.shape[0], ctx.group), *(None,) * 8


def _exchange_slots(*args: Any) -> tuple[Tensor, Tensor]:
    return _ExchangeSlots.apply(*args)


LIBRARY.define(SLOTS, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("exchange_slots", _exchange_slots, "CompositeImplicitAutograd")
exchange_slots = torch.ops.moecomm.exchange_slots.default
