"""Experts spread over ep ranks and repeated over edp, the rest repeated over all: the same training as on one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moecomm.functional as mf
from tests import layers, one_process
from tests.one_process import RATE, Run, Sizes
from tests.spawn import run_ranks

STEPS, CLIP = 6, 0.5  # the norms of all steps are above the clip's
SPLITS = [(2, 2), (4, 2), (4, 4), (4, 1)]  # ranks, ep


def train(sizes: Sizes, ranks: int, ep: int, compiled: bool) -> Run:
    """`one_process.train` on this rank's share of the batch and of the experts."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (ranks // ep, ep), mesh_dim_names=("edp", "ep"))
    rank, mine = mesh.get_rank(), mesh.get_local_rank("ep")
    parameters = {
        name: (p.chunk(ep)[mine] if "experts" in name else p).clone().requires_grad_() for name, p in one_process.initial(sizes).items()
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE)

    def forward(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return layers.loss(parameters, x, y, sizes, lambda x, *own: layers.moe(x, *own, sizes.top_k, mesh["ep"], None))

    step_loss = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    losses, norms = [], []
    for step in range(STEPS):
        x, y = (whole.chunk(ranks)[rank] for whole in one_process.batch(sizes, step))
        loss = step_loss(parameters, x, y)
        (loss / ranks).backward()
        mf.sync_grads_(parameters, {"*.experts.*": mesh["edp"], "*": None}, reduce="sum")
        norms.append(mf.clip_grad_norm_(parameters, CLIP, {"*.experts.*": mesh["ep"], "*": ""}).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mf.slice_gather(loss.detach()[None], None).mean().item())
    whole = {name: mf.slice_gather(p.detach(), mesh["ep"]) if "experts" in name else p.detach() for name, p in parameters.items()}
    return Run(losses, norms, whole)


@pytest.mark.parametrize(
    ("ranks", "ep", "compiled"),
    [
        *(pytest.param(*split, False, marks=pytest.mark.slow if split[0] > 2 else ()) for split in SPLITS),
        *(pytest.param(*split, True, marks=[pytest.mark.slow, pytest.mark.exhaustive]) for split in SPLITS),  # test_fsdp.py compiles one
    ],
)
def test_expert_parallel_training_is_that_of_one_process(ranks: int, ep: int, compiled: bool) -> None:
    sizes = Sizes()
    expected = one_process.train(sizes, STEPS, CLIP)
    for run in run_ranks(train, ranks, sizes, ranks, ep, compiled):
        # float64 on both sides: only the order of sums differs.
        torch.testing.assert_close(run.losses, expected.losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(run.norms, expected.norms, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(run.parameters, expected.parameters, rtol=1e-8, atol=1e-10)
