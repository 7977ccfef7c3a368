"""norms[i] = sqrt(sum of the squares of tensors[i]), right also where the sum of squares is beyond float32.

Costs one read of the tensors, on CPUs a second one of those of which the squares overflow. No backward: it measures gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.ops.base.library import define

SCHEMA = "norms(Tensor[] tensors) -> Tensor"  # of one dtype; the norms are float64


def norms_fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.float64)


def norms_cpu(tensors: list[Tensor]) -> Tensor:
    # For 6 million float32 elements: 2.5 ms in float32, 40 ms in float64 (torch 2.13, one EPYC core).
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.promote_types(tensors[0].dtype, torch.float32))).double()
    for i in (~norms.isfinite()).nonzero().flatten().tolist():
        norms[i] = torch.linalg.vector_norm(tensors[i], dtype=torch.float64)
    return norms


def norms_cuda(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64))  # the host does not know which ones overflow


norms = define(SCHEMA, norms_fake, norms_cpu, norms_cuda)
