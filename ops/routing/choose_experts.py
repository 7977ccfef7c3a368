"""experts[t, j] = the expert with the j-th highest score of token t; ties: the lower id first; -1 where only scores of -inf are left.

Costs one read of scores [T, E], one write of experts [T, K], and K passes over a row in registers. NaN counts as the highest score.
No backward, since the result is integers: the gradient goes through a gather of the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.ops.base.library import block_of, compute_dtype, define, jit, tl

# An op, because torch.topk returns equal scores in an unspecified order that differs between devices.
SCHEMA = "choose(Tensor scores, int k) -> Tensor"


def choose_fake(scores: Tensor, k: int) -> Tensor:
    return torch.empty(scores.shape[0], k, dtype=torch.int64, device=scores.device)


def choose_cpu(scores: Tensor, k: int) -> Tensor:
    # Times in ms for K = 2 and K = 8, with T = 4096, float32 (torch 2.13, one EPYC core). torch.topk does not break ties.
    #   E = 64:  this loop 0.9 and 13, a stable sort 21, torch.topk 7 and 11.
    #   E = 256: this loop 7 and 31 to 39, a stable sort 90, torch.topk 7 and 24, topk of int64 keys (score, id) 30 and 46.
    left = scores.clone()
    experts = choose_fake(scores, k)
    for j in range(k):
        best, expert = left.max(1, keepdim=True)  # the first of equal scores
        experts[:, j : j + 1] = expert.masked_fill_(best == -torch.inf, -1)
        left.scatter_(1, expert.clamp_(min=0), -torch.inf)
    return experts


@jit(varies=("tokens",))
def _choose_kernel(
    scores, experts, tokens, num_experts, stride_t, stride_e,
    K: tl.constexpr, FLOAT: tl.constexpr, INT: tl.constexpr, HIGHEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK)
    inside = (t < tokens)[:, None] & (e < num_experts)[None, :]
    score = tl.load(scores + t[:, None] * stride_t + e.to(tl.int64)[None, :] * stride_e, mask=inside, other=float("-inf")).to(FLOAT)
    # Integer keys in the order of the scores. -0 equals 0, NaN is the highest; -inf and experts already chosen are the lowest.
    bits = tl.where(score == 0, tl.zeros_like(score), score).to(INT, bitcast=True)
    key = tl.where(bits < 0, bits ^ HIGHEST, bits)
    key = tl.where(score != score, HIGHEST, key)
    key = tl.where(score == float("-inf"), ~HIGHEST, key)  # [ROWS, BLOCK]
    for j in range(K):
        best = tl.max(key, axis=1)
        first = tl.min(tl.where(key == best[:, None], e[None, :], BLOCK), axis=1)
        tl.store(experts + t * K + j, tl.where(best == ~HIGHEST, -1, first).to(tl.int64), mask=t < tokens)
        key = tl.where(e[None, :] == first[:, None], ~HIGHEST, key)


def choose_triton(scores: Tensor, k: int) -> Tensor:
    tokens, num_experts = scores.shape
    experts = torch.empty(tokens, k, dtype=torch.int64, device=scores.device)
    if tokens:
        wide = scores.dtype == torch.float64
        block = block_of(num_experts, num_experts * 2)  # a whole row
        height = max(1, 1024 // block)
        _choose_kernel[(-(-tokens // height),)](
            scores, experts, tokens, num_experts, *scores.stride(), K=k, FLOAT=compute_dtype(scores.dtype),
            INT=tl.int64 if wide else tl.int32, HIGHEST=2**63 - 1 if wide else 2**31 - 1, ROWS=height, BLOCK=block,
        )  # fmt: skip
    return experts


choose = define(SCHEMA, choose_fake, choose_cpu, choose_triton)
