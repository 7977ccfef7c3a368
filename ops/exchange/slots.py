"""(ids, weights)[r] = the K slots of received row r: their local experts, -1 for an expert on another rank, and their weights.

Costs K * (weight + 1, 2 or 4 bytes of id) bytes per (token, rank) pair, in one message. If slots are few, they came with the counts,
and nothing is sent. A pair that is padding has ids -1 and weights 0.
Its backward sends the gradient of the weights home, [R, K] -> [S, K], and adds up each token's pairs: `weighted_sum` without weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.ops.base.library import call
from moecomm.ops.exchange.all_to_all import start
from moecomm.ops.exchange.collectives import wait
from moecomm.ops.exchange.slices import define_function
from moecomm.ops.exchange.start_op import define_start
from moecomm.ops.exchange.there_and_home import home
from moecomm.ops.routing.slot_bytes import message_cpu, message_triton, unpack_slots, width_of
from moecomm.ops.routing.slots_with_counts import take_cpu, take_triton

# messages came with the counts; few, on the CPU, tells whether the slots are in them. Both are None if no slots were sent with the counts.
EARLY = "Tensor? messages, Tensor? few"
SEND = (
    f"slots_exchange(Tensor experts, Tensor weights, Tensor keys, Tensor order, int local, {EARLY}, Tensor? splits, SymInt received, "
    "str group) -> Tensor"
)
SLOTS = (
    f"exchange_slots(Tensor weights, Tensor experts, Tensor keys, Tensor order, Tensor position, int local, {EARLY}, Tensor? splits, "
    "SymInt received, str group) -> (Tensor, Tensor)"
)
WHAT = "the experts and weights of plan"


def send_fake(experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, local: int, *rest: Any) -> Tensor:
    *_, received, _ = rest
    return weights.new_empty(received, width_of(experts.shape[1], local, weights.dtype), dtype=torch.uint8)


def _early(messages: Tensor | None, few: Tensor | None) -> Tensor | None:
    """The messages, if the slots came in them, else None. ``few`` is on the CPU, so there is no host synchronization."""
    return messages if few is not None and few.numpy().tolist() == [True] else None


def send_cpu(
    experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, local: int, messages: Tensor | None, few: Tensor | None, *rest: Any
) -> Tensor:
    splits, received, group = rest
    early = _early(messages, few)
    if early is not None:
        return take_cpu(early, splits, width_of(experts.shape[1], local, weights.dtype))
    sent = message_cpu(experts, weights, keys, order, local, splits is None)  # equal splits include padding
    return start(sent, received, splits, 0, group, WHAT)


def send_triton(
    experts: Tensor, weights: Tensor, keys: Tensor, order: Tensor, local: int, messages: Tensor | None, few: Tensor | None, *rest: Any
) -> Tensor:
    splits, received, group = rest
    early = _early(messages, few)
    if early is not None:
        return take_triton(early, received, width_of(experts.shape[1], local, weights.dtype))
    return start(message_triton(experts, weights, keys, order, local, splits is None), received, splits, 0, group, WHAT)


slots_exchange = define_start(SEND, send_fake, send_cpu, send_triton)


class _ExchangeSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, experts: Tensor, keys: Tensor, order: Tensor, position: Tensor, local: int, *rest: Any) -> Any:
        _, _, splits, _, group = rest
        ctx.save_for_backward(order, position, splits)
        ctx.group = group
        message = wait(call(slots_exchange, experts, weights, keys, order, local, *rest))
        ids, there = call(unpack_slots, message, experts.shape[1], local, weights.dtype)
        ctx.mark_non_differentiable(ids)
        return there, ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        return call(home, grad, *ctx.saved_tensors, grad.shape[0], ctx.group, None, None), *(None,) * 10


exchange_slots = define_function(SLOTS, _ExchangeSlots)
