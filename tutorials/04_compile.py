"""What torch.compile makes of a layer: how to print the report, what it finds, and what activation checkpointing costs.

python tutorials/04_compile.py
torchrun --nproc-per-node 2 tutorials/04_compile.py
python -m moecomm.compile.report tutorials/04_compile.py:step
"""

# %% A layer

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moecomm.functional as mf
from moecomm.compile.checkpoint import contexts, save_matmuls
from moecomm.compile.report import Report, report

D, HIDDEN, EXPERTS, TOP_K, TOKENS = 32, 64, 8, 2, 128


class MoE(nn.Module):
    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.gate = nn.Linear(D, EXPERTS, bias=False)
        self.into = nn.Parameter(torch.randn(EXPERTS // ranks, D, HIDDEN) / D**0.5)
        self.out = nn.Parameter(torch.randn(EXPERTS // ranks, HIDDEN, D) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = mf.route(self.gate(x), TOP_K)  # [T, K] each
        plan = mf.plan(experts, weights, EXPERTS, like=x)
        rows = mf.dispatch(x, plan).bfloat16()  # [N, D]
        hidden = F.grouped_mm(rows, self.into.bfloat16(), offs=plan.offsets).float()  # [N, HIDDEN]
        hidden = (F.silu(hidden) * mf.row_weights(plan).unsqueeze(1)).bfloat16()
        return mf.combine(F.grouped_mm(hidden, self.out.bfloat16(), offs=plan.offsets).float(), plan, weighted=False)


# %% The clean layer
# The clean layer has no graph break, no recompile and one host sync. In `plan`, the host reads how many rows there are. On several ranks
# the report lists each exchange, forward and backward, with the bytes that this rank receives.

# %% What a report finds
# This layer looks at its own result, as people do while debugging. `.item()` causes a second host sync, and the branch on its value
# breaks the graph in two. The report lists both, with the line.


class Curious(MoE):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.abs().max().item() > 100:  # a host sync, and a graph break
            print("large")
        return y


# %% Activation checkpointing
# A checkpointed layer does not keep the experts' activations: the backward pass recomputes them. Without a policy, it also repeats the
# exchanges and the host sync. `save_received` keeps what came from other ranks, and so repeats none of them. `save_matmuls` keeps the
# results of matmuls too, and repeats cheap work alone.


class Checkpointed(MoE):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Selective(MoE):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False, context_fn=partial(contexts, save_matmuls))


# %% All four


def main() -> dict[str, Report]:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    reports = {}
    for kind in (MoE, Curious, Checkpointed, Selective):
        torch.manual_seed(rank)
        reports[kind.__name__] = report(kind(ranks), torch.randn(TOKENS, D))
        if rank == 0:
            print(reports[kind.__name__], end="\n\n")
    return reports


def step() -> Tensor:
    """The function that the report's command line runs. It makes its own inputs and compiles the layer itself."""
    torch.manual_seed(0)
    return torch.compile(MoE(dist.get_world_size() if dist.is_initialized() else 1), fullgraph=True)(torch.randn(TOKENS, D))


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
