"""From FastMoE to moecomm: a table of FastMoE's concepts and the functions that replace them, and a training that uses all of them.

    python tutorials/03_from_fastmoe.py
    torchrun --nproc-per-node 4 tutorials/03_from_fastmoe.py

FastMoE: https://github.com/laekov/fastmoe. In FastMoE, a layer stores its groups, and a wrapper stores the groups of the parameters. In
moecomm, each call of a function names its group. Nothing is stored between two calls.
"""

# %% The table

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import moecomm.functional as mf

TABLE = """
FastMoE                                         moecomm
FMoE(num_expert=L, world_size=P)                plan(experts, weights, num_experts=L * P, group): counts the experts of all ranks
moe_group                                       the group of plan
MOEScatter, MOEGather                           dispatch(x, plan), combine(rows, plan); x may be a pytree
expert_fn(x, fwd_expert_count)                  your own code between the two; plan.offsets: where each expert's rows end
NaiveGate                                       route(logits, k)
GShardGate, SwitchGate                          limit_by_capacity, load_balance_loss; or update_bias, which needs no loss
slice_group (mp_group)                          slice_scatter before, slice_gather after; uneven sizes drop nothing
mask                                            -1 in experts: the slot is dropped
DistributedGroupedDataParallel(need_sync=True)  sync_params_(params, group), once
allreduce_params()                              sync_grads_(params, group), after each backward
  no_scale, reduce_after, fp32_allreduce        reduce="sum", scale="after", always
dp_group, gate_group, expert_dp_comm            the group of each call of sync_grads_
expert_dp_comm="none"                           no call: all experts of the moe_group differ
SmartMoE: experts move as loads change          moecomm.planner: place, move_experts_; with replicas and the optimizer's state
FasterMoE: shadowed experts                     replicas in the placement of plan, kept over steps; sync_replica_grads_
"""

# %% The layer
# This is FMoE.forward, written with functions. The ranks of the slice group have the same tokens. Each rank sends one slice to the
# experts: 13 tokens on 2 ranks become slices of 7 and 6.

D, HIDDEN, EXPERTS, TOP_K, TOKENS, STEPS = 16, 32, 8, 2, 26, 10


def product(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of each expert by its matrix. torch's grouped_mm needs bfloat16."""
    return F.grouped_mm(rows.bfloat16(), weights.bfloat16(), offs=offsets).float()


class Model(nn.Module):
    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__()
        self.dense, self.gate = nn.Linear(D, D), nn.Linear(D, EXPERTS, bias=False)
        into, out = torch.randn(EXPERTS, D, HIDDEN) / D**0.5, torch.randn(EXPERTS, HIDDEN, D) / HIDDEN**0.5
        self.experts = nn.ParameterList(w.chunk(ranks)[rank].clone() for w in (into, out))  # [L, D, HIDDEN], [L, HIDDEN, D]

    def forward(self, x: Tensor, moe_group: object, slice_group: object) -> Tensor:
        x = self.dense(x)  # [T, D], the same on all ranks of the slice group
        mine = mf.slice_scatter(x, slice_group)  # [T / slices, D]
        weights, experts = mf.route(self.gate(mine), TOP_K)
        plan = mf.plan(experts, weights, EXPERTS, moe_group)
        rows = mf.dispatch(mine, plan)  # [N, D]
        rows = product(F.silu(product(rows, self.experts[0], plan.offsets)), self.experts[1], plan.offsets)
        return x + mf.slice_gather(mf.combine(rows, plan), slice_group, size=x.shape[0])


# %% The training
# Each data-parallel half of the batch is on the two ranks of a slice group. The experts are spread over all four ranks. The gradients
# are added up as follows:
#
# - Dense layer: both ranks of a slice group compute the same half of the batch. Add up over the halves.
# - Gate: each rank computes a quarter of the tokens. Add up over all ranks.
# - Experts: their tokens come from all ranks, so their gradients are already complete.


def main() -> float:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    slices = 2 if ranks % 2 == 0 else 1
    halves = ranks // slices
    moe_group: object = None  # all ranks
    dp_group: object = None
    slice_group: object = None
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (halves, slices), mesh_dim_names=("dp", "slice"))
        dp_group, slice_group = mesh["dp"], mesh["slice"]
    torch.manual_seed(0)
    model = Model(ranks, rank)
    mf.sync_params_([*model.dense.parameters(), *model.gate.parameters()], None)  # need_sync
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    half = slice(rank // slices * TOKENS // halves, (rank // slices + 1) * TOKENS // halves)
    loss = torch.zeros(())
    for _ in range(STEPS):
        loss = F.mse_loss(model(x[half], moe_group, slice_group), y[half])
        optimizer.zero_grad()
        (loss / halves).backward()  # so the sum over the ranks is the mean over the halves
        mf.sync_grads_(model.dense, dp_group, reduce="sum")  # dp_group
        mf.sync_grads_(model.gate, None, reduce="sum")  # gate_group: all ranks of the stage
        optimizer.step()
    return mf.slice_gather(loss.detach()[None], None).mean().item()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    result = main()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(TABLE)
        print(f"all of it: mean squared error {result:.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()
