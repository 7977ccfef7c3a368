"""Send each token across the network once per node, with two plans: one over the nodes, and one inside a node.

    torchrun --nproc-per-node 4 tutorials/05_two_levels.py

Both plans use the same three functions. Four processes simulate two nodes of two ranks. The script prints how much the layer differs from
one process, and how many tokens cross between the nodes.
"""

# %% Why
# A plan sends a token once to each rank that has one of its experts. If eight ranks of another node have one, the token crosses the network
# eight times. The network has a ninth of the speed between the ranks of a node. DeepEP has kernels for this case: they send the token once
# to the node, and from there to the ranks. This tutorial does the same with two plans. The "experts" of the first plan are nodes.

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moecomm.functional as mf

T, D, H, E, K, NODES, INSIDE = 12, 8, 16, 16, 6, 2, 2  # T tokens of each rank, NODES nodes of INSIDE ranks
Experts = Callable[[Tensor, Tensor], Tensor]  # rows [N, D], offsets [L] -> [N, D]

# %% The layer


def one_level(x: Tensor, weights: Tensor, experts: Tensor, compute: Experts, mesh: DeviceMesh) -> Tensor:
    plan = mf.plan(experts, weights, E, None, like=x)
    return mf.combine(compute(mf.dispatch(x, plan), plan.offsets), plan)


def two_levels(x: Tensor, weights: Tensor, experts: Tensor, compute: Experts, mesh: DeviceMesh) -> Tensor:
    """x [T, D], weights and experts [T, K] -> [T, D]. The mesh is ("nodes", "inside"); each rank has E / 4 experts, in order."""
    nodes = mesh.size(0)
    node = torch.div(experts, E // nodes, rounding_mode="floor")  # [T, K]: the node of each slot's expert; -1 stays -1
    ids = torch.arange(nodes)
    reached = torch.where((node.unsqueeze(2) == ids).any(1), ids, -1)  # [T, nodes]: each node of a token, once

    # Rank i of a node sends to rank i of the other nodes. The experts and weights of a token travel with it. The gradient of a weight
    # comes from the one node that has its slot's expert. The other nodes give zero.
    there = mf.plan(reached, torch.ones_like(reached, dtype=x.dtype), nodes, mesh["nodes"], like=x)
    sent = mf.dispatch({"x": x, "experts": experts, "weights": weights}, there)

    # Inside the node: send to the ranks of the experts that are on this node.
    first = mesh.get_local_rank("nodes") * (E // nodes)
    local = sent["experts"] - first
    local = torch.where((local >= 0) & (local < E // nodes), local, -1)
    plan = mf.plan(local, sent["weights"], E // nodes, mesh["inside"], like=sent["x"])
    y = mf.combine(compute(mf.dispatch(sent["x"], plan), plan.offsets), plan)  # this node's part of each token's sum

    return mf.combine(y, there)


# %% The same on one process
# Both run in float64, so only the order of sums differs. Every rank creates all weights, and keeps those of its own experts.


def experts_of(into: Tensor, out: Tensor) -> Experts:
    def compute(rows: Tensor, offsets: Tensor) -> Tensor:
        ends = torch.arange(rows.shape[0], dtype=torch.int32)
        expert = torch.searchsorted(offsets, ends, right=True)  # [N]; grouped_mm has no float64 kernel
        return torch.einsum("nh,nhd->nd", F.silu(torch.einsum("nd,ndh->nh", rows, into[expert])), out[expert])

    return compute


def crossing(experts: Tensor) -> tuple[int, int]:
    """The number of copies of this rank's tokens that leave its node: with one level, and with two."""
    sent = mf.plan(experts, torch.ones(experts.shape), E, None).splits[0].view(NODES, INSIDE)  # pairs to each rank
    others = [node for node in range(NODES) if node != dist.get_rank() // INSIDE]
    reached = torch.stack([(experts // (E // NODES) == other).any(1) for other in others], 1)
    return int(sent[others].sum()), int(reached.sum())


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (NODES, INSIDE), mesh_dim_names=("nodes", "inside"))
    torch.manual_seed(0)
    ranks, rank = NODES * INSIDE, dist.get_rank()
    x, gate, grad = (torch.randn(shape, dtype=torch.float64) for shape in ((ranks * T, D), (D, E), (ranks * T, D)))
    into, out = torch.randn(E, D, H, dtype=torch.float64) / D**0.5, torch.randn(E, H, D, dtype=torch.float64) / H**0.5

    def trained(layer: Callable[..., Tensor], part: slice, held: slice, where: DeviceMesh | str) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x[part], gate, into[held], out[held])]
        weights, experts = mf.route(leaves[0] @ leaves[1], K)
        y = layer(leaves[0], weights, experts, experts_of(*leaves[2:]), where)
        return [y.detach(), *torch.autograd.grad((y * grad[part]).sum(), leaves)]

    def alone(x: Tensor, weights: Tensor, experts: Tensor, compute: Experts, group: str) -> Tensor:
        plan = mf.plan(experts, weights, E, group)
        return mf.combine(compute(mf.dispatch(x, plan), plan.offsets), plan)

    mine, held = slice(rank * T, (rank + 1) * T), slice(rank * E // ranks, (rank + 1) * E // ranks)
    y, grad_x, grad_gate, grad_into, grad_out = trained(alone, slice(None), slice(None), "")
    compiled = torch.compile(two_levels, fullgraph=True, backend="aot_eager")
    for name, layer in (("one level", one_level), ("two levels", two_levels), ("two levels, compiled", compiled)):
        got = trained(layer, mine, held, mesh)
        dist.all_reduce(got[2])  # the gate's gradient is the sum over all tokens
        want = [y[mine], grad_x[mine], grad_gate, grad_into[held], grad_out[held]]
        worst = torch.stack([(a - b).abs().max() for a, b in zip(got, want, strict=True)]).max()
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if rank == 0:
            print(f"{name} differs from one process by {worst:.1e}")

    _, experts = mf.route(x[mine] @ gate, K)
    counts = torch.tensor(crossing(experts))
    dist.all_reduce(counts)
    if rank == 0:
        print(f"copies of {ranks * T} tokens that cross between nodes: {counts[0]} with one plan, {counts[1]} with two")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
