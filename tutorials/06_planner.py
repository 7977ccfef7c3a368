"""Move experts while they train: count the loads, place, move, go on. A router that prefers other experts as time goes by stays balanced.

    torchrun --nproc-per-node 4 tutorials/06_planner.py

The script prints how full the fullest rank is, and draws it over the steps into runs/planner.png, with and without moves.
"""

# %% Why
# A router gives some experts more tokens than others, and the ranks wait for the one that has most. `place` gives the experts with most
# tokens replicas, and spreads them such that all ranks have about as many tokens. A training changes its router, so it has to be done
# again. `move_experts_` then sends only what changed: weights, and the optimizer's state of them.

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import moecomm.functional as mf
from moecomm.planner import imbalance, move_experts_, place

T, D, H, E, K, SLOTS, STEPS, EVERY = 256, 16, 32, 16, 2, 6, 60, 5  # T tokens of a rank, SLOTS experts on a rank, STEPS steps

# %% The layer
# The bias stands for a router that drifts: its favourites change slowly. It is the same on all ranks.


def drift(step: int) -> Tensor:
    """[E]: a wave of preference that goes round the experts once in 400 steps."""
    return 3 * torch.cos(2 * torch.pi * (torch.arange(E) / E - step / 400))


def layer(x: Tensor, gate: Tensor, into: Tensor, out: Tensor, placement: list[list[int]], step: int) -> tuple[Tensor, Tensor]:
    """x [T, D] -> [T, D], and the rows of each expert, [E], of this rank's tokens."""
    weights, experts = mf.route(x @ gate + drift(step), K)
    plan = mf.plan(experts, weights, E, placement=placement)
    rows = mf.dispatch(x, plan)
    expert = mf.row_experts(plan)  # [N]
    rows = torch.einsum("nh,nhd->nd", F.silu(torch.einsum("nd,ndh->nh", rows, into[expert])), out[expert])
    return mf.combine(rows, plan), torch.bincount(experts.flatten(), minlength=E)


# %% The loop
# The forty lines that matter. What is new to a training with replicas are the three lines from `place` on.


def train(moving: bool) -> tuple[list[float], list[float]]:
    """The imbalance and the loss of each step."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    placement = [[(rank * E // ranks + slot) % E for slot in range(SLOTS)] for rank in range(ranks)]  # in order: nothing is known yet
    torch.manual_seed(0)
    gate, into, out = torch.randn(D, E) / 4, torch.randn(E, D, H) / 4, torch.randn(E, H, D) / 6
    gate.requires_grad_()
    experts = [whole[placement[rank]].clone().requires_grad_() for whole in (into, out)]  # [SLOTS, ...]
    optimizer = torch.optim.AdamW([gate, *experts], lr=1e-3)
    seen, losses, loads = [], [], torch.zeros(E)
    for step in range(STEPS):
        torch.manual_seed(1000 * step + rank)
        x = torch.randn(T, D)
        y, counts = layer(x, gate, *experts, placement, step)
        loss = F.mse_loss(y, x.flip(1))
        (loss / ranks).backward()
        mf.sync_grads_([gate], None, reduce="sum")
        mf.sync_replica_grads_(experts, placement)
        optimizer.step()
        optimizer.zero_grad()

        dist.all_reduce(counts)  # the loads of all ranks: the placement is then the same on all
        seen.append(imbalance(counts, placement))
        losses.append(mf.slice_gather(loss.detach()[None], None).mean().item())
        loads = loads / 2 + counts
        if moving and step % EVERY == EVERY - 1:
            new = place(loads, ranks, SLOTS, current=placement)  # moves only what pays
            move_experts_(experts, optimizer, placement, new)
            placement = new
    return seen, losses


# %% With and without
# A move changes who computes, not what. The losses differ by the rounding of sums in another order.


def main() -> None:
    dist.init_process_group("gloo")
    still, expected = train(moving=False)
    moved, losses = train(moving=True)
    if dist.get_rank() == 0:
        differs = max(abs(loss - want) / want for loss, want in zip(losses, expected, strict=True))
        print(f"fullest rank / mean: {sum(still) / STEPS:.2f} without moves, {sum(moved) / STEPS:.2f} with them")
        print(f"largest relative difference of a loss: {differs:.0e}")
        draw({"one placement": still, f"placed every {EVERY} steps": moved}, Path("runs/planner.png"))
    dist.destroy_process_group()


def draw(lines: dict[str, list[float]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.2))
    for label, values in lines.items():
        axis.plot(values, label=label)
    axis.set(xlabel="step", ylabel="fullest rank / mean load", ylim=(1, None))
    axis.legend()
    figure.tight_layout()
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
