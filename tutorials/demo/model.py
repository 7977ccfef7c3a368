"""A byte-level Mixture-of-Experts transformer: an ordinary one but for `MoE`, which reads as it would on one process."""

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
    context: int = 256
    vocabulary: int = 256  # bytes


class Groups(NamedTuple):
    """Names of process groups: plain data, and so nothing that a compiled graph must look into."""

    experts: str | None = None  # the ranks that the experts are spread over
    tokens: str | None = None  # the ranks that the batch is spread over


class Transformer(nn.Module):
    def __init__(self, shape: Shape, groups: Groups) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.dim)
        self.blocks = nn.ModuleList(Block(shape, groups) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim)
        self.head = nn.Linear(shape.dim, shape.vocabulary, bias=False)
        self.register_buffer("turns", rotations(shape.context, shape.dim // shape.heads), persistent=False)  # [context, head / 2, 2]
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 if parameter is self.embed.weight else parameter.shape[-1] ** -0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, length] -> logits [B, length, vocabulary], the balance loss, and the rows of each local expert [layers, L]."""
        x = self.embed(tokens)  # [B, length, D]
        balance, loads = [], []
        for block in self.blocks:
            x, loss, load = block(x, self.turns)
            balance.append(loss)
            loads.append(load)
        return self.head(self.norm(x)).float(), torch.stack(balance).mean(), torch.stack(loads)


class Block(nn.Module):
    def __init__(self, shape: Shape, groups: Groups) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim)
        self.attention = Attention(shape)
        self.moe_norm = nn.RMSNorm(shape.dim)
        self.moe = MoE(shape, groups)

    def forward(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), turns)
        y, balance, load = self.moe(self.moe_norm(x).flatten(0, 1))  # [T, D], T = B * length
        return x + y.view_as(x), balance, load


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim, bias=False)
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, length, head] each
        y = F.scaled_dot_product_attention(rotate(q, turns), rotate(k, turns), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))  # [B, length, D]


class MoE(nn.Module):
    def __init__(self, shape: Shape, groups: Groups) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.groups = shape.experts, shape.top_k, groups
        self.gate = nn.Linear(shape.dim, shape.experts, bias=False)
        self.experts = Experts(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x).float()  # [T, E]
        weights, experts = mf.route(logits, self.top_k)  # [T, K] each
        plan = mf.plan(experts, weights, self.num_experts, self.groups.experts, like=x)
        rows = mf.dispatch(x, plan)  # [N, D]
        rows = self.experts(rows, plan.offsets)
        y = mf.combine(rows, plan)  # [T, D]
        balance = mf.load_balance_loss(logits.softmax(-1), experts, self.groups.tokens)
        return y, balance, plan.offsets.diff(prepend=plan.offsets.new_zeros(1))


class Experts(nn.Module):
    """SwiGLU experts. The parameters are of all E experts on one process, DTensors over the expert-parallel ranks on several."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.empty(shape.experts, 2 * shape.hidden, shape.dim))
        self.out = nn.Parameter(torch.empty(shape.experts, shape.dim, shape.hidden))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        into, out = ((w.to_local() if isinstance(w, DTensor) else w).to(rows.dtype) for w in (self.into, self.out))  # [L, ...]
        gate, up = F.grouped_mm(rows, into.transpose(1, 2), offs=offsets).chunk(2, -1)  # [N, hidden] each
        return F.grouped_mm(F.silu(gate) * up, out.transpose(1, 2), offs=offsets)  # [N, D]


def rotations(length: int, width: int) -> Tensor:
    """[length, width / 2, 2]: the cosine and the sine of each position's turn; RoFormer, arXiv:2104.09864."""
    angles = torch.arange(length)[:, None] * 10_000.0 ** -(torch.arange(0, width, 2) / width)
    return torch.stack((angles.cos(), angles.sin()), -1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x [..., length, width] turned by its positions."""
    cos, sin = turns[: x.shape[-2]].to(x.dtype).unbind(-1)  # [length, width / 2] each
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
