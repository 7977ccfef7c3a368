"""From a dense layer to a Mixture-of-Experts layer of your own, trained on one process and then, unchanged, on several.

    python tutorials/01_your_own_moe_layer.py
    torchrun --nproc-per-node 2 tutorials/01_your_own_moe_layer.py

moecomm has no layer class. It has functions, and you write a layer in a few lines between them.
"""

# %% The task
# Points come from eight clusters. Each cluster has its own linear map. One small network must fit all eight maps into its hidden dim.
# Experts can divide the maps among themselves, if the gate learns which cluster a point is from.

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import moecomm.functional as mf

D, HIDDEN, EXPERTS, TOP_K, STEPS = 16, 32, 8, 2, 300
torch.manual_seed(0)
centres, maps = 3 * torch.randn(8, D), torch.randn(8, D, D) / D**0.5


def points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    cluster = torch.randint(8, (count,), generator=generator)
    noise = torch.randn(count, D, generator=generator)  # [T, D]
    return centres[cluster] + noise, torch.einsum("td,tde->te", noise, maps[cluster])


# %% A dense layer
# Every token passes through the same two matrices.


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(D, TOP_K * HIDDEN), nn.Linear(TOP_K * HIDDEN, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(F.silu(self.into(x))), x.new_zeros(())


# %% A Mixture-of-Experts layer
# The gate scores the experts. `route` chooses K experts for each token, and `plan` decides which rank gets which token. `dispatch` sends
# the tokens: each rank gets the rows of its own experts, grouped by expert, ready for one grouped matrix product. `combine` sends the
# results back and adds them up; each row was multiplied by the gate's weight on the way. Gradients travel the same way in reverse.


class MoE(nn.Module):
    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__()
        self.gate = nn.Linear(D, EXPERTS, bias=False)
        into, out = torch.randn(EXPERTS, D, HIDDEN) / D**0.5, torch.randn(EXPERTS, HIDDEN, D) / HIDDEN**0.5
        # Each rank keeps its share of the experts. One process keeps all of them.
        self.into, self.out = (nn.Parameter(w.chunk(ranks)[rank].clone()) for w in (into, out))  # [L, D, HIDDEN], [L, HIDDEN, D]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)  # [T, E]
        weights, experts = mf.route(logits, TOP_K)  # [T, K] each
        plan = mf.plan(experts, weights, EXPERTS)  # default group: all ranks, or only this process
        rows = mf.dispatch(x, plan)  # [N, D]
        hidden = F.silu(product(rows, self.into, plan.offsets)) * mf.row_weights(plan).unsqueeze(1)  # [N, HIDDEN]
        balance = mf.load_balance_loss(logits.softmax(-1), experts, group=None)
        return mf.combine(product(hidden, self.out, plan.offsets), plan, weighted=False), balance


def product(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of each expert by its matrix, in one call. torch's grouped_mm needs bfloat16."""
    return F.grouped_mm(rows.bfloat16(), weights.bfloat16(), offs=offsets).float()


# %% Training
# Only the line that picks `shared` knows about experts. An expert's gradient is complete: the tokens of all ranks came to it.
# The gate is on every rank, so `sync_grads_` adds up its gradients.


def train(layer: nn.Module, ranks: int, rank: int) -> float:
    """Train, and return the error on new points. Each rank sees its share of each batch."""
    step = torch.compile(layer, fullgraph=True)  # one graph for any routing
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, y = (share.chunk(ranks)[rank] for share in points(512, generator))
        z, balance = step(x)
        loss = F.mse_loss(z, y) + 0.01 * balance
        optimizer.zero_grad()
        (loss / ranks).backward()
        shared = layer.gate.parameters() if isinstance(layer, MoE) else layer.parameters()
        mf.sync_grads_(shared, None, reduce="sum")
        optimizer.step()
    x, y = (share.chunk(ranks)[rank] for share in points(4096, generator))
    with torch.no_grad():
        error = F.mse_loss(layer(x)[0], y)
    return mf.slice_gather(error[None], None).mean().item()


# %% The comparison
# Both layers do the same amount of work per token: the dense layer is as wide as K experts together. Two ranks give the numbers of
# one process, up to rounding.


def main() -> dict[str, float]:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    errors = {}
    for name in ("dense", "moe"):
        torch.manual_seed(2)
        errors[name] = train(Dense() if name == "dense" else MoE(ranks, rank), ranks, rank)
        if rank == 0:
            print(f"{name:>5}: mean squared error {errors[name]:.4f}")
    return errors


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
