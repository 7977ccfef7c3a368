"""Which methods is moecomm compared with? The published Mixture-of-Experts exchanges, written from scratch from their descriptions.

Each is ``layer(x, experts, weights, num_experts, compute) -> y``, and `moecomm` is the same layer by this library.

- x [T, D]: the tokens of this rank. experts [T, K], with -1 for a dropped slot. weights [T, K].
- ``compute(rows, ends, first)``: the user's experts on rows [N, D] that are grouped by local expert. The rows of expert ``first + i`` end
  before row ``ends[i]``, as grouped_mm takes them.

`k_fold` and `by_expert` work on the default process group or without any. `expert_loop` and `one_hot` work on one process, as published.

Each step uses the ATen call that was fastest on CPUs, where the project uses another one with the same result: index_select in place of
``x[index]``, index_add in place of scatter_add. Sums and products use the dtypes of the project.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn.functional import one_hot as encode

import moecomm.functional as mf

Compute = Callable[[Tensor, Tensor | Sequence[int], int], Tensor]
Layer = Callable[[Tensor, Tensor, Tensor, int, Compute], Tensor]


def moecomm(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, compute: Compute) -> Tensor:
    plan = mf.plan(experts, weights, num_experts, like=x)
    return mf.combine(compute(mf.dispatch(x, plan), plan.offsets, 0), plan)


def k_fold(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, compute: Compute) -> Tensor:
    """A row for each slot, sorted by expert, sent to its rank, put into the order of the local experts there, and all the way back.

    The all-to-all dispatcher of torchtitan (pytorch/torchtitan, torchtitan/models/common/token_dispatcher.py, August 2026): a stable
    argsort of the slots, an exchange of counts, two host reads, one all-to-all of rows each way, the weights multiplied in float32 at the
    sender, and a scatter-add into the tokens.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    flat = experts.flatten()
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)[1:]  # [E]
    order = flat.argsort(stable=True)  # the dropped, of key -1, come first
    if ranks == 1:
        order = order[flat.shape[0] - int(counts.sum()) :]  # [N]
        token = order // experts.shape[1]
        rows = compute(x.index_select(0, token), counts.cumsum(0).to(torch.int32), 0)
        return _add_up(x, rows, weights, order, token)
    there = torch.empty_like(counts)
    dist.all_to_all_single(there, counts, None, None, group=dist.group.WORLD)
    there = there.view(ranks, -1)  # [P, L]
    out, into = counts.view(ranks, -1).sum(1).tolist(), there.sum(1).tolist()
    order = order[flat.shape[0] - sum(out) :]
    token = order // experts.shape[1]
    received = all_to_all_single_autograd(x.index_select(0, token), into, out, dist.group.WORLD)  # by rank, then by expert
    by_expert = _rank_major(there)  # [N]
    rows = compute(received.index_select(0, by_expert), there.sum(0).cumsum(0).to(torch.int32), 0)
    sent = torch.empty_like(rows).index_copy(0, by_expert, rows)
    back = all_to_all_single_autograd(sent, out, into, dist.group.WORLD)
    return _add_up(x, back, weights, order, token)


def _rank_major(counts: Tensor) -> Tensor:
    """counts [P, L] of rows that lie by rank, then by expert -> for each row by expert, then by rank, where it lies: [N]."""
    lengths = counts.t().flatten()  # [L * P]
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).t().flatten()
    ends = lengths.cumsum(0)
    segment = torch.arange(lengths.shape[0], device=counts.device).repeat_interleave(lengths)
    return torch.arange(segment.shape[0], device=counts.device) + (starts - ends + lengths)[segment]


def _add_up(x: Tensor, rows: Tensor, weights: Tensor, order: Tensor, token: Tensor) -> Tensor:
    weighted = (rows.float() * weights.flatten().index_select(0, order).unsqueeze(1)).to(rows.dtype)
    return torch.zeros_like(x).index_add(0, token, weighted)


def by_expert(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, compute: Compute) -> Tensor:
    """A row for each slot, exchanged expert by expert, so that what comes is grouped by expert; all slots' rows, then a bmm with weights.

    FastMoE (He et al., "FastMoE: A Fast Mixture-of-Expert Training System", arXiv 2103.13262; laekov/fastmoe, fmoe/functions.py and
    cuda/global_exchange.h): an exchange of E counts a rank, a local scatter into the order of the experts, point-to-point messages for each
    (expert, rank), and their mirror. The messages of all experts are started before the first is waited for.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    flat = experts.flatten()
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)[1:]  # [E], of P x L
    there = counts
    if ranks > 1:
        there = torch.empty_like(counts)
        dist.all_to_all_single(there, counts, None, None, group=dist.group.WORLD)
    out, into = counts.tolist(), there.tolist()
    order = flat.argsort(stable=True)[flat.shape[0] - sum(out) :]
    rows = _Scatter.apply(x, order // experts.shape[1], out, into, ranks)
    rows = compute(rows, there.view(ranks, -1).sum(0).cumsum(0).to(torch.int32), 0)
    slots = _Gather.apply(rows, order, out, into, ranks, flat.shape[0])  # [T * K, D]
    return torch.bmm(weights.to(slots.dtype).unsqueeze(1), slots.view(*experts.shape, -1)).squeeze(1)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, out: list[int], into: list[int], ranks: int) -> Tensor:
        ctx.save_for_backward(token)
        ctx.counts, ctx.tokens = (out, into, ranks), x.shape[0]
        return _to_experts(x.index_select(0, token), out, into, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (token,) = ctx.saved_tensors
        rows = _from_experts(grad.contiguous(), *ctx.counts)
        return rows.new_zeros(ctx.tokens, rows.shape[1]).index_add_(0, token, rows), None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, out: list[int], into: list[int], ranks: int, slots: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.counts = (out, into, ranks)
        rows = _from_experts(rows.contiguous(), out, into, ranks)
        return rows.new_zeros(slots, rows.shape[1]).index_copy_(0, order, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return _to_experts(grad.index_select(0, order), *ctx.counts), None, None, None, None, None


def _to_experts(rows: Tensor, out: list[int], into: list[int], ranks: int) -> Tensor:
    """rows by (rank, expert), out[rank * L + expert] of each -> what comes by (expert, rank)."""
    if ranks == 1:
        return rows
    received = rows.new_empty(sum(into), rows.shape[1])
    _messages(dict(zip(_pairs(ranks, out), rows.split(out), strict=True)), _by_expert(received, into, ranks))
    return received


def _from_experts(rows: Tensor, out: list[int], into: list[int], ranks: int) -> Tensor:
    if ranks == 1:
        return rows
    received = rows.new_empty(sum(out), rows.shape[1])
    _messages(_by_expert(rows, into, ranks), dict(zip(_pairs(ranks, out), received.split(out), strict=True)))
    return received


def _pairs(ranks: int, counts: list[int]) -> list[tuple[int, int]]:
    return [(rank, expert) for rank in range(ranks) for expert in range(len(counts) // ranks)]


def _by_expert(rows: Tensor, counts: list[int], ranks: int) -> dict[tuple[int, int], Tensor]:
    """The part of each (rank, expert) of rows that lie by expert, then by rank; counts by rank, then by expert."""
    local = len(counts) // ranks
    pairs = [(rank, expert) for expert in range(local) for rank in range(ranks)]
    return dict(zip(pairs, rows.split([counts[rank * local + expert] for rank, expert in pairs]), strict=True))


def _messages(sent: dict[tuple[int, int], Tensor], received: dict[tuple[int, int], Tensor]) -> None:
    me, works = dist.get_rank(), []
    for (rank, expert), part in received.items():
        if part.shape[0] == 0:
            continue
        if rank == me:
            part.copy_(sent[rank, expert])
        else:
            works.append(dist.irecv(part, rank, tag=expert))
    works += [dist.isend(part, rank, tag=expert) for (rank, expert), part in sent.items() if rank != me and part.shape[0]]
    for work in works:
        work.wait()


def expert_loop(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, compute: Compute) -> Tensor:
    """One expert after the other: its tokens gathered, weighted and added into the result.

    The eager experts of Hugging Face transformers (huggingface/transformers, src/transformers/models/mixtral/modeling_mixtral.py): a
    one-hot mask of all slots, and for each expert that is hit `where`, an index and index_add.
    """
    y = torch.zeros_like(x)
    mask = encode(experts.masked_fill(experts < 0, num_experts), num_experts + 1).permute(2, 1, 0)[:num_experts]  # [E, K, T]
    for e in mask.sum((1, 2)).nonzero().flatten().tolist():
        slot, token = torch.where(mask[e])
        rows = compute(x.index_select(0, token), [token.shape[0]], e)
        y = y.index_add_(0, token, (rows * weights[token, slot, None]).to(x.dtype))
    return y


def one_hot(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, compute: Compute) -> Tensor:
    """Every expert has as many places as the fullest one needs; two einsums with [T, E, C] masks move the tokens there and back.

    GShard (Lepikhin et al., arXiv 2006.16668, algorithm 2) and DeepSpeed-MoE (Rajbhandari et al., arXiv 2201.05596; microsoft/DeepSpeed,
    deepspeed/moe/sharded_moe.py) with a capacity that drops nothing.
    """
    chosen = encode(experts + 1, num_experts + 1)[..., 1:].flatten(0, 1)  # [T * K, E]
    counts = chosen.cumsum(0)
    capacity = int(counts[-1].max())
    slot, expert = chosen.nonzero(as_tuple=True)
    where = (slot // experts.shape[1], expert, counts[slot, expert] - 1)
    combine = x.new_zeros(x.shape[0], num_experts, capacity).index_put(where, weights.flatten()[slot].to(x.dtype))  # [T, E, C]
    there = torch.einsum("tec,td->ecd", (combine != 0).to(x.dtype), x)
    ends = [capacity * (e + 1) for e in range(num_experts)]
    rows = compute(there.flatten(0, 1), ends, 0).view_as(there)
    return torch.einsum("tec,ecd->td", combine, rows)


MOECOMM = "moecomm"
ON_RANKS: dict[str, Layer] = {MOECOMM: moecomm, "k_fold": k_fold, "by_expert": by_expert}
ON_ONE: dict[str, Layer] = {**ON_RANKS, "expert_loop": expert_loop, "one_hot": one_hot}


def check(
    layer: Layer, dtype: torch.dtype, k: int, dim: int = 24, num_experts: int = 16, *, dropped: float = 0.2, device: str = "cpu"
) -> None:  # fmt: skip
    """Raise unless a layer is the dense float64 one, with its gradients, where slots are dropped and each expert scales its rows anew.

    The default process group's ranks have different numbers of tokens, and routings of their own.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    seed = torch.Generator().manual_seed(rank)
    x = torch.randn(29 + 7 * rank, dim, generator=seed).to(device, dtype).requires_grad_()
    experts = torch.rand(x.shape[0], num_experts, generator=seed).topk(k).indices
    experts = experts.masked_fill(torch.rand(experts.shape, generator=seed) < dropped, -1).to(device)
    weights = torch.rand(experts.shape, generator=seed).to(device).requires_grad_()
    grad = torch.randn(x.shape, generator=seed).to(device, dtype)
    scale = torch.randn(num_experts, dim, generator=torch.Generator().manual_seed(k)).to(device)
    first = rank * (num_experts // ranks)

    def compute(rows: Tensor, ends: Tensor | Sequence[int], start: int) -> Tensor:
        row = torch.arange(rows.shape[0], device=device)
        expert = first + start + torch.searchsorted(torch.as_tensor(ends, device=device), row, right=True)  # [N]
        return (rows * scale[expert]).to(rows.dtype)

    y = layer(x, experts, weights, num_experts, compute)
    found = y, *torch.autograd.grad(y, (x, weights), grad)
    exact, share = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    chosen = experts.unsqueeze(2) == torch.arange(num_experts, device=device)  # [T, K, E]
    truth = torch.einsum("tk,tke,ed,td->td", share, chosen.double(), scale.double(), exact)
    right = truth, *torch.autograd.grad(truth, (exact, share), grad.double())
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))
