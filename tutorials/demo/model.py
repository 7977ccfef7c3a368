"""A byte-level Mixture-of-Experts transformer, written as for one process.

The same code runs on many ranks. In a group of one rank, moecomm's functions for slices and sums return their input unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import moecomm.functional as mf


class Shape(NamedTuple):
    experts: int = 8
    top_k: int = 2
    dim: int = 128
    heads: int = 4
    layers: int = 4
    hidden: int = 256  # of one expert
    shared: int = 0  # the hidden dim of a shared expert, which all tokens go through; 0 means no shared expert
    context: int = 256
    vocabulary: int = 256  # bytes


class Groups(NamedTuple):
    """Names of process groups. Names are plain data, so a compiled graph need not look into them. "" is only this process."""

    experts: str = ""  # the ranks that the experts are spread over
    hidden: str = ""  # the ranks that the hidden dim of each expert is split over
    heads: str = ""  # the ranks that the heads of the attention are split over
    tokens: str = ""  # the ranks that have these layers; together they have the whole batch
    ranks: int = 1  # the number of ranks in ``tokens``
    slice: bool = False  # whether all ranks of ``heads`` have the same tokens, and slice them only for the experts


BALANCE = 0.01  # the weight of the balance loss, which is the mean over the layers


class Transformer(nn.Module):
    def __init__(self, shape: Shape, groups: Groups) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Embedding(shape.vocabulary, shape.dim)
        self.blocks = nn.ModuleDict({str(i): Block(shape, groups) for i in range(shape.layers)})
        self.norm: nn.Module | None = Norm(shape.dim)
        self.head: nn.Module | None = nn.Linear(shape.dim, shape.vocabulary, bias=False)
        self.register_buffer("turns", rotations(shape.context, shape.dim // shape.heads), persistent=False)  # [context, head / 2, 2]
        self.loads: list[Tensor] = []  # for each forward pass, the rows of each local expert [layers, L]
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 if parameter is self.embed.weight else parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, length] -> logits [B, length, vocabulary]. Between pipeline stages, activations [B, length, D] replace either."""
        if self.embed is not None:
            x = self.embed(x)  # [B, length, D]
        loads = []
        for block in self.blocks.values():
            x, load = block(x, self.turns)
            loads.append(load)
        self.loads.append(torch.stack(loads))
        return x if self.head is None else self.head(self.norm(x)).float()


class Block(nn.Module):
    def __init__(self, shape: Shape, groups: Groups) -> None:
        super().__init__()
        self.groups = groups
        self.attention_norm = Norm(shape.dim)
        self.attention = Attention(shape, groups)
        self.moe_norm = Norm(shape.dim)
        self.moe = MoE(shape, groups)

    def forward(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), turns)
        tokens = x.flatten(0, 1)  # [B * length, D]
        if self.groups.slice:
            tokens = mf.slice_scatter(tokens, self.groups.heads)
        y, load = self.moe(self.moe_norm(tokens))  # [T, D]
        if self.groups.slice:
            y = mf.slice_gather(y, self.groups.heads, size=x.shape[0] * x.shape[1])
        return x + y.view_as(x), load


class Norm(nn.RMSNorm):
    """An RMSNorm that computes in the dtype of its input. Its weight may have another dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, local(self.weight, x), self.eps)


class Attention(nn.Module):
    """Causal self-attention. On one process, the parameters cover all heads. On several, they are DTensors over the tp ranks."""

    def __init__(self, shape: Shape, groups: Groups) -> None:
        super().__init__()
        self.groups, self.width = groups, shape.dim // shape.heads
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim, bias=False)  # the q, k and v of one head are adjacent
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = mf.sum_gradient(x, self.groups.heads) if self.groups.slice else mf.slice_gather(x, self.groups.heads, dim=1, grad="reduce")
        heads = F.linear(x, local(self.qkv.weight, x)).unflatten(-1, (-1, 3, self.width))  # [B, length, heads, 3, head]
        q, k, v = heads.permute(3, 0, 2, 1, 4)  # [B, heads, length, head] each
        y = F.scaled_dot_product_attention(rotate(q, turns), rotate(k, turns), v, is_causal=True)
        y = F.linear(y.transpose(1, 2).flatten(2), local(self.out.weight, x))  # [B, length, D]: the part of these heads
        return mf.sum_ranks(y, self.groups.heads) if self.groups.slice else mf.slice_reduce(y, self.groups.heads, dim=1)


class MoE(nn.Module):
    def __init__(self, shape: Shape, groups: Groups) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.groups = shape.experts, shape.top_k, groups
        self.balance = BALANCE / shape.layers / groups.ranks  # a part of one loss over all ranks, whose gradients are summed
        self.gate = nn.Linear(shape.dim, shape.experts, bias=False)
        self.experts = Experts(shape)
        self.shared = Shared(shape) if shape.shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x).float()  # [T, E]
        weights, experts = mf.route(logits, self.top_k)  # [T, K] each
        balance = mf.load_balance_loss(logits.softmax(-1), experts, self.groups.tokens)
        # The ranks that split the experts' hidden dim gather each other's tokens. In a group of one, x is already whole.
        every, weights = (mf.slice_gather(each, self.groups.hidden, grad="reduce") for each in (x, weights))
        plan = mf.plan(mf.slice_gather(experts, self.groups.hidden), weights, self.num_experts, self.groups.experts, like=every)
        rows = mf.dispatch(every, plan)  # [N, D]
        rows = self.experts(rows, plan.offsets, mf.row_weights(plan))
        y = mf.slice_reduce(mf.combine(rows, plan, weighted=False), self.groups.hidden)  # [T, D]
        if self.shared is not None:
            y = y + self.shared(x)  # depends on no exchange, so it can run during one
        return mf.attach_loss(y, balance, self.balance), plan.offsets.diff(prepend=plan.offsets.new_zeros(1))


class Experts(nn.Module):
    """SwiGLU experts. On one process, the parameters cover all E experts. On several, they are DTensors over the expert-parallel ranks."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.empty(shape.experts, 2, shape.hidden, shape.dim))
        self.out = nn.Parameter(torch.empty(shape.experts, shape.dim, shape.hidden))

    def forward(self, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """The rows' results, each times its weight: it is multiplied in here, where a row is narrow."""
        into, out = local(self.into, rows).flatten(1, 2), local(self.out, rows)  # [L, 2 * hidden, D], [L, D, hidden]
        gate, up = F.grouped_mm(rows, into.transpose(1, 2), offs=offsets).to(weights.dtype).chunk(2, -1)  # [N, hidden] each
        hidden = F.silu(gate) * up * weights.unsqueeze(1)  # rounded once
        return F.grouped_mm(hidden.to(rows.dtype), out.transpose(1, 2), offs=offsets)  # [N, D]


class Shared(nn.Module):
    """A SwiGLU expert that all tokens go through. It is the same on all ranks."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.into = nn.Linear(shape.dim, 2 * shape.shared, bias=False)
        self.out = nn.Linear(shape.shared, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.into(x).chunk(2, -1)
        return self.out(F.silu(gate) * up)


def local(weight: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a weight, in the dtype of ``like``, which it is multiplied with."""
    return (weight.to_local() if isinstance(weight, DTensor) else weight).to(like.dtype)


def rotations(length: int, width: int) -> Tensor:
    """[length, width / 2, 2]: the cosine and the sine of each position's rotation (RoFormer, arXiv:2104.09864)."""
    angles = torch.arange(length)[:, None] * 10_000.0 ** -(torch.arange(0, width, 2) / width)
    return torch.stack((angles.cos(), angles.sin()), -1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x [..., length, width], rotated by its positions."""
    cos, sin = turns[: x.shape[-2]].to(x.dtype).unbind(-1)  # [length, width / 2] each
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
