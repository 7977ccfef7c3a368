"""From a dense layer to a Mixture-of-Experts layer of your own, trained on one process and then, unchanged, on several.

    python tutorials/01_your_own_moe_layer.py
    torchrun --nproc-per-node 2 tutorials/01_your_own_moe_layer.py

moecomm has no layer to inherit from. It has functions, and a layer is a few lines between them.
"""

# %% The task
# Points come from eight clusters, and each cluster has a linear map of its own. One small network must squeeze eight maps into its
# hidden dim; experts can share them out, if the gate finds out which cluster a point is from.

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
# The usual one: every token passes through the same two matrices.


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(D, TOP_K * HIDDEN), nn.Linear(TOP_K * HIDDEN, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(F.silu(self.into(x))), x.new_zeros(())


# %% A Mixture-of-Experts layer
# The gate scores the experts, `route` chooses K of them for each token, and `plan` finds out who gets which token. `dispatch` brings the
# tokens to the experts: this rank gets the rows of its own experts, grouped, so that one grouped matrix product does the work.
# `combine` brings the results home and adds them up with the gate's weights. Gradients take the same way back.


class MoE(nn.Module):
    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__()
        self.gate = nn.Linear(D, EXPERTS, bias=False)
        into, out = torch.randn(EXPERTS, D, HIDDEN) / D**0.5, torch.randn(EXPERTS, HIDDEN, D) / HIDDEN**0.5
        # Each rank keeps its share of the experts: all of them, on one process.
        self.into, self.out = (nn.Parameter(w.chunk(ranks)[rank].clone()) for w in (into, out))  # [L, D, HIDDEN], [L, HIDDEN, D]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)  # [T, E]
        weights, experts = mf.route(logits, TOP_K)  # [T, K] each
        plan = mf.plan(experts, weights, EXPERTS)  # the default group: all ranks, or this process alone
        rows = mf.dispatch(x, plan)  # [N, D]
        rows = product(F.silu(product(rows, self.into, plan.offsets)), self.out, plan.offsets)  # [N, D]
        balance = mf.load_balance_loss(logits.softmax(-1), experts, group=None)
        return mf.combine(rows, plan), balance


def product(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's rows times its own matrix, all at once; torch multiplies groups in bfloat16."""
    return F.grouped_mm(rows.bfloat16(), weights.bfloat16(), offs=offsets).float()


# %% Training
# Nothing here knows of experts but one line: an expert's gradient is already the sum over all ranks' tokens, since they came to it;
# the gate is on every rank, and its gradients are still to be added up.


def train(layer: nn.Module, ranks: int, rank: int) -> float:
    """The error on fresh points after training; every rank sees its share of each batch."""
    step = torch.compile(layer, fullgraph=True)  # one graph, whatever the routing
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
# Both layers compute as much for a token: the dense one is as wide as the K experts together. On two ranks the numbers are
# those of one process, up to rounding.


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
