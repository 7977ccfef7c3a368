"""Train a Mixture-of-Experts layer in parallel in every way, on four processes. Each way is compared with one process.

    torchrun --nproc-per-node 4 tutorials/02_parallelism.py

The script prints how much each way differs from one process. It draws which rank holds what: runs/parallelism.png.
"""

# %% The layer
# All ways use the same layer. They differ in three inputs: a rank's tokens, its weights, and the group of the plan.

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import moecomm.functional as mf
from moecomm.mesh import MoEMesh, moe_mesh
from moecomm.parallel.group import GroupLike

T, D, H, E, K, RANKS = 24, 8, 16, 8, 2, 4
ALONE = ""  # the group of only this process: its plan sends nothing


def layer(x: Tensor, gate: Tensor, into: Tensor, out: Tensor, group: GroupLike, placement: list[list[int]] | None = None) -> Tensor:
    """An MoE layer: x [T, D] -> [T, D], with the weights into [L, D, H] and out [L, H, D] of this rank's experts."""
    weights, experts = mf.route(x @ gate, K)
    plan = mf.plan(experts, weights, E, group, placement=placement)
    rows = mf.dispatch(x, plan)  # [N, D]
    expert = mf.row_experts(plan)  # [N]; grouped_mm has no float64 kernel
    hidden = F.silu(torch.einsum("nd,ndh->nh", rows, into[expert])) * mf.row_weights(plan).unsqueeze(1)  # [N, H]
    return mf.combine(torch.einsum("nh,nhd->nd", hidden, out[expert]), plan, weighted=False)


# %% One process
# One process has the whole batch and all weights. The loss is a sum over the tokens, so the gradients of parts of the batch add up.

torch.manual_seed(0)
X, GATE, G = (torch.randn(shape, dtype=torch.float64) for shape in ((T, D), (D, E), (T, D)))
INTO, OUT = torch.randn(E, D, H, dtype=torch.float64) / D**0.5, torch.randn(E, H, D, dtype=torch.float64) / H**0.5


def leaf(part: Tensor) -> Tensor:
    return part.detach().clone().requires_grad_()


def one_process(layers: int = 1) -> list[Tensor]:
    """The reference: the output, and the gradients of the gate and of the experts' weights."""
    x, gate, into, out = X, leaf(GATE), leaf(INTO), leaf(OUT)
    for _ in range(layers):
        x = layer(x, gate, into, out, ALONE)
    (x * G).sum().backward()
    return [x.detach(), gate.grad, into.grad, out.grad]


# %% Data parallel
# Every rank has all experts and a quarter of the tokens. The ranks send only gradients.


def data(mesh: MoEMesh) -> list[Tensor]:
    rank, gate, into, out = dist.get_rank(), leaf(GATE), leaf(INTO), leaf(OUT)
    y = layer(X.chunk(RANKS)[rank], gate, into, out, ALONE)
    (y * G.chunk(RANKS)[rank]).sum().backward()
    mf.sync_grads_([gate, into, out], None, reduce="sum")
    return [mf.slice_gather(y.detach(), None), gate.grad, into.grad, out.grad]


# %% Expert parallel, and repeated over expert-data ranks
# Each ep rank has a part of the experts, and the tokens travel to them. So an expert's gradient covers all tokens of the ep group. The edp
# ranks have the same experts, and add up their gradients.


def expert(mesh: MoEMesh) -> list[Tensor]:
    rank, ep = dist.get_rank(), mesh.expert["ep"]
    gate, into, out = leaf(GATE), leaf(mf.slice_scatter(INTO, ep)), leaf(mf.slice_scatter(OUT, ep))
    y = layer(X.chunk(RANKS)[rank], gate, into, out, ep)
    (y * G.chunk(RANKS)[rank]).sum().backward()
    mf.sync_grads_({"gate": gate, "into": into, "out": out}, {"gate": None, "*": mesh.expert["edp"]}, reduce="sum")
    return [mf.slice_gather(y.detach(), None), gate.grad, mf.slice_gather(into.grad, ep), mf.slice_gather(out.grad, ep)]


# %% Tensor parallel experts
# Each rank has all tokens, and a part of every expert's hidden dim. The ranks compute parts of a sum.


def tensor(mesh: MoEMesh) -> list[Tensor]:
    etp = mesh.expert["etp"]
    gate, into, out = leaf(GATE), leaf(mf.slice_scatter(INTO, etp, dim=2)), leaf(mf.slice_scatter(OUT, etp, dim=1))
    y = mf.sum_ranks(layer(mf.sum_gradient(X, etp), mf.sum_gradient(gate, etp), into, out, ALONE), etp)
    (y * G).sum().backward()
    return [y.detach(), gate.grad, mf.slice_gather(into.grad, etp, dim=2), mf.slice_gather(out.grad, etp, dim=1)]


# %% Slices
# All ranks have the same tokens, as after a tensor-parallel dense layer. Each rank sends one slice to the experts. Then all ranks gather
# the whole again.


def slices(mesh: MoEMesh) -> list[Tensor]:
    tp, ep = mesh.dense["tp"], mesh.expert["ep"]
    gate, into, out = leaf(GATE), leaf(mf.slice_scatter(INTO, ep)), leaf(mf.slice_scatter(OUT, ep))
    y = mf.slice_gather(layer(mf.slice_scatter(X, tp), gate, into, out, ep), tp, size=T)
    (y * G).sum().backward()
    mf.sync_grads_([gate], tp, reduce="sum")
    return [y.detach(), gate.grad, mf.slice_gather(into.grad, ep), mf.slice_gather(out.grad, ep)]


# %% Placement
# You choose which rank holds which experts. Busy experts can be on two ranks: here 0, 1, 2 and 6. The gradients of both replicas are
# added up.

PLACEMENT = [[7, 0, 3], [2, 5, 1], [4, 1, 6], [6, 0, 2]]


def placed(mesh: MoEMesh) -> list[Tensor]:
    rank, mine = dist.get_rank(), PLACEMENT[dist.get_rank()]
    gate, into, out = leaf(GATE), leaf(INTO[mine]), leaf(OUT[mine])
    y = layer(X.chunk(RANKS)[rank], gate, into, out, None, PLACEMENT)
    (y * G.chunk(RANKS)[rank]).sum().backward()
    mf.sync_grads_([gate], None, reduce="sum")
    mf.sync_replica_grads_([into, out], PLACEMENT, None)
    order = [e for row in PLACEMENT for e in row]
    first = [order.index(e) for e in range(E)]
    return [mf.slice_gather(y.detach(), None), gate.grad, *(mf.slice_gather(w.grad, None)[first] for w in (into, out))]


# %% Pipeline
# The pipeline has two stages of two expert-parallel ranks. Each stage has its own gate, and its ranks add up the gate's gradients.


class Stage(nn.Module):
    def __init__(self, ep: GroupLike) -> None:
        super().__init__()
        self.ep = ep
        self.gate, self.into, self.out = (nn.Parameter(w) for w in (GATE.clone(), mf.slice_scatter(INTO, ep), mf.slice_scatter(OUT, ep)))

    def forward(self, x: Tensor) -> Tensor:
        return layer(x, self.gate, self.into, self.out, self.ep)


def pipeline(mesh: MoEMesh) -> list[Tensor]:
    pp, ep = mesh.dense["pp"], mesh.expert["ep"]
    module, mine = Stage(ep), ep.get_local_rank()
    stage = PipelineStage(module, pp.get_local_rank(), pp.size(), torch.device("cpu"), group=pp.get_group())
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda y, g: (y * g).sum(), scale_grads=False)
    x, g = X.chunk(ep.size())[mine], G.chunk(ep.size())[mine]
    y = schedule.step(x) if stage.is_first else schedule.step(target=g)
    y = mf.slice_gather(y.detach(), ep) if stage.is_last else torch.zeros_like(X)
    mf.sync_grads_({"gate": module.gate}, ep, reduce="sum")
    grads = [module.gate.grad, mf.slice_gather(module.into.grad, ep), mf.slice_gather(module.out.grad, ep)]
    # The reference uses the same weights in both layers, so its gradients are the sum over the stages.
    return [mf.slice_gather(y[None], pp).sum(0), *(mf.slice_gather(grad[None], pp).sum(0) for grad in grads)]


# %% All of them
# Each way has a function, a mesh, a number of layers, and what each rank holds: tokens, experts, and a part of the experts' hidden dim.


def part(whole: int, parts: int, mine: int) -> range:
    return range(whole * mine // parts, whole * (mine + 1) // parts)


WAYS: dict[str, tuple[Callable[[MoEMesh], list[Tensor]], dict[str, int], int, Callable[[int], tuple[range, object, range]]]] = {
    "data": (data, {}, 1, lambda r: (part(T, 4, r), range(E), range(H))),
    "expert": (expert, {"ep": 4}, 1, lambda r: (part(T, 4, r), part(E, 4, r), range(H))),
    "expert x expert-data": (expert, {"ep": 2}, 1, lambda r: (part(T, 4, r), part(E, 2, r % 2), range(H))),
    "tensor (experts)": (tensor, {"tp": 4, "etp": 4}, 1, lambda r: (range(T), range(E), part(H, 4, r))),
    "slice x expert": (slices, {"tp": 4, "ep": 4}, 1, lambda r: (range(T), part(E, 4, r), range(H))),
    "placed, with replicas": (placed, {"ep": 4}, 1, lambda r: (part(T, 4, r), PLACEMENT[r], range(H))),
    "pipeline x expert": (pipeline, {"pp": 2, "ep": 2}, 2, lambda r: (part(T, 2, r % 2), part(E, 2, r % 2), range(H))),
}


def draw(file: Path) -> None:
    """Draw one row per way: left the tokens of each rank, right the experts' weights. Colors show what a rank holds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(WAYS), 2, figsize=(11, 1.1 * len(WAYS) + 0.8), layout="constrained", width_ratios=[1, 3])
    for (name, (_, _, _, holds)), (left, right) in zip(WAYS.items(), axes, strict=True):
        tokens, weights = torch.full((RANKS, T), torch.nan), torch.full((RANKS, E, H), torch.nan)
        for rank in range(RANKS):
            mine, experts, hidden = holds(rank)
            tokens[rank, list(mine)] = rank
            for e in experts:
                weights[rank, e, list(hidden)] = rank
        for axis, held in ((left, tokens), (right, weights.flatten(1))):
            axis.imshow(held, aspect="auto", cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
            axis.set(yticks=range(RANKS), xticks=[])
        for e in range(1, E):
            right.axvline(e * H - 0.5, color="black", lw=0.5)
        left.set_ylabel(name, rotation=0, ha="right", va="center")
    axes[-1, 0].set_xlabel("tokens")
    axes[-1, 1].set_xlabel("experts, each with its hidden dim")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main() -> None:
    for name, (way, sizes, layers, _) in WAYS.items():
        mesh = moe_mesh("cpu", **sizes)
        pairs = zip(way(mesh), one_process(layers), strict=True)
        differs = torch.stack([(got - expected).abs().max() / expected.abs().max() for got, expected in pairs]).max()
        worst = mf.slice_gather(differs[None], None).max().item()
        if dist.get_rank() == 0:
            print(f"{name:<22} differs from one process by {worst:.0e}")
    if dist.get_rank() == 0:
        draw(Path("runs/parallelism.png"))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    if dist.get_world_size() != RANKS:
        raise SystemExit(f"this tutorial needs {RANKS} processes: torchrun --nproc-per-node {RANKS} tutorials/02_parallelism.py")
    main()
    dist.destroy_process_group()
