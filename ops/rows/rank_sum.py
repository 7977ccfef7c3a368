"""total[i] = (parts[0, i] + parts[1, i] + ... + parts[P - 1, i]) / divisor, added in the order of the ranks, rounded once.

Costs one read of P * n elements and one write of n. Accumulates in float32 (float64 for float64; complex numbers by their parts).
Other ops use it in their backward; it has no backward of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.ops.base.library import compute_dtype, define, inlined, jit, tl

# Not parts.sum(0): from 5 ranks on its order depends on n, so a sum would depend on the tensors that were sent with it.
SCHEMA = "rank_sum(Tensor parts, int divisor, bool before) -> Tensor"
BLOCK = 1024


def rank_sum_fake(parts: Tensor, divisor: int, before: bool) -> Tensor:
    return parts.new_empty(parts.shape[1])


def rank_sum_cpu(parts: Tensor, divisor: int, before: bool) -> Tensor:
    wide = torch.promote_types(parts.dtype, torch.float32)
    total = torch.zeros(parts.shape[1], dtype=wide)
    for part in parts:
        total.add_(part.to(wide).div(divisor) if before else part)
    return (total if before else total.div_(divisor)).to(parts.dtype)


@inlined
def _divided(x, by, WIDE: tl.constexpr):
    return x / by if WIDE else tl.div_rn(x, by)  # a plain float32 division is approximate on NVIDIA


@jit
def _rank_sum_kernel(
    parts, total, n, ranks, divisor, BEFORE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.full([BLOCK], divisor, ACC)
    acc = tl.zeros([BLOCK], ACC)
    source = parts + i
    for _ in range(ranks):
        part = tl.load(source, mask=i < n, other=0).to(ACC)
        acc += _divided(part, by, WIDE) if BEFORE else part
        source += n
    tl.store(total + i, (acc if BEFORE else _divided(acc, by, WIDE)).to(total.dtype.element_ty), mask=i < n)


def rank_sum_triton(parts: Tensor, divisor: int, before: bool) -> Tensor:
    if parts.is_complex():
        pairs = torch.view_as_real(parts).flatten(1)  # [P, 2 * n]
        return torch.view_as_complex(rank_sum_triton(pairs, divisor, before).view(-1, 2))
    parts = parts.contiguous()
    ranks, n = parts.shape
    total = parts.new_empty(n)
    if n:
        wide = parts.dtype == torch.float64
        _rank_sum_kernel[(-(-n // BLOCK),)](
            parts, total, n, ranks, divisor, BEFORE=before, WIDE=wide, ACC=compute_dtype(parts.dtype), BLOCK=BLOCK
        )  # fmt: skip
    return total


rank_sum = define(SCHEMA, rank_sum_fake, rank_sum_cpu, rank_sum_triton)
