"""The layers of `one_process.py` as users write them with moecomm: what the tests of the ways of parallelism are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, mse_loss, silu

import moecomm.functional as mf
from moecomm.layer.placement import Placement
from moecomm.parallel.group import GroupLike
from tests import one_process
from tests.one_process import BALANCE, Sizes


def experts_by_row(rows: Tensor, into: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """rows [N, D] through their experts, into [L, H, D] and out [L, D, H]: in any dtype, and traceable, where grouped_mm is neither."""
    expert = torch.searchsorted(offsets, torch.arange(rows.shape[0], dtype=offsets.dtype, device=rows.device), right=True)  # [N]
    return torch.einsum("ndh,nh->nd", out[expert], silu(torch.einsum("nhd,nd->nh", into[expert], rows)))


def experts_by_group(rows: Tensor, into: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """The same by torch's own op, which a compiler takes on CPUs in bfloat16 alone, D and H being multiples of 8."""
    hidden = silu(grouped_mm(rows, into.transpose(1, 2), offs=offsets))  # [N, H]
    return grouped_mm(hidden, out.transpose(1, 2), offs=offsets)


def moe(
    x: Tensor, gate: Tensor, into: Tensor, out: Tensor, k: int, group: GroupLike, tokens: GroupLike, placement: Placement | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, D] of this rank through the experts of ``group``, and the balance loss over all ranks of ``tokens``."""
    logits = x @ gate.T  # [T, E]
    weights, experts = mf.route(logits, k)
    plan = mf.plan(experts, weights, gate.shape[0], group, placement=placement, like=x)
    computed = experts_by_group if x.dtype == torch.bfloat16 else experts_by_row
    rows = computed(mf.dispatch(x, plan), into, out, plan.offsets)
    return mf.combine(rows, plan), mf.load_balance_loss(logits.softmax(-1), experts, tokens)


MoE = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # x [T, D], gate, into, out -> [T, D], the balance loss


def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor, sizes: Sizes, moe: MoE) -> Tensor:
    """`one_process.loss` of this rank's part of the batch, with another MoE layer in the place of its own."""
    balances = []
    for i in range(sizes.layers):
        own = {name.removeprefix(f"{i}."): p for name, p in parameters.items() if name.startswith(f"{i}.")}
        x = x + one_process.dense(x, own["dense.into"], own["dense.out"])
        z, balance = moe(x.flatten(0, 1), own["gate"], own["experts.into"], own["experts.out"])
        x = x + z.view_as(x)
        balances.append(balance)
    return mse_loss(x @ parameters["head"].T, y) + BALANCE * torch.stack(balances).sum()
