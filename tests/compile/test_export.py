"""An inference layer leaves the process: exported, saved and loaded, packaged by AOTInductor, on one rank and on several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

import moecomm.functional as mf
from moecomm.compile.export import decompositions
from tests.spawn import run_ranks

D, H, NUM_EXPERTS, K = 16, 32, 8, 2
TOKENS = (7, 1, 0, 30)


class Layer(nn.Module):
    """All parameters are buffers of one rank's experts, the same experts on every rank: the program is of all of them."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        seed = torch.Generator().manual_seed(0)
        for name, shape in {"gate": (D, NUM_EXPERTS), "up": (NUM_EXPERTS // ranks, D, H), "down": (NUM_EXPERTS // ranks, H, D)}.items():
            self.register_buffer(name, torch.randn(shape, generator=seed).bfloat16() / shape[-2] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = mf.route((x @ self.gate).float(), K)
        plan = mf.plan(experts, weights, NUM_EXPERTS, like=x)
        rows = mf.dispatch(x, plan)
        rows = grouped_mm(silu(grouped_mm(rows, self.up, offs=plan.offsets)), self.down, offs=plan.offsets)
        return mf.combine(rows, plan)


def exported(layer: Layer) -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("tokens", min=0)
    program = torch.export.export(layer, (torch.randn(5, D).bfloat16(),), dynamic_shapes=({0: tokens},))
    return program.run_decompositions(decompositions())


@pytest.mark.slow
def test_an_export_reads_the_sizes_once_and_sends_what_the_layer_sends() -> None:
    [graph] = run_ranks(graph_here, 1)
    assert graph.count("read_sizes.default") == 1
    assert "plan_sizes" not in graph


def graph_here() -> str:
    return str(exported(Layer(1)).graph)


def leaves(file: str, packaged: bool) -> None:
    """Rank 0 makes what all of them load."""
    if dist.get_rank() == 0:
        with torch.no_grad():
            program = exported(Layer(dist.get_world_size()))
        if packaged:
            torch._inductor.aoti_compile_and_package(program, package_path=file)
        else:
            torch.export.save(program, file)


@torch.no_grad()
def comes_back(file: str, packaged: bool) -> None:
    layer, rank = Layer(dist.get_world_size()), dist.get_rank()
    loaded = torch._inductor.aoti_load_package(file) if packaged else torch.export.load(file).module()
    for step in range(3):
        tokens = TOKENS[(rank + step) % len(TOKENS)]
        x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(10 * step + rank)).bfloat16()
        want = layer(x)
        if packaged:
            torch.testing.assert_close(loaded(x), want)  # Inductor rounds silu's steps less often
        else:
            assert torch.equal(loaded(x), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "packaged"), [(2, False), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((1, False), (1, True), (2, True)))]
)
def test_one_saved_program_or_package_serves_all_ranks(ranks: int, packaged: bool, tmp_path: Path) -> None:
    file = str(tmp_path / "layer.pt2")
    run_ranks(leaves, ranks, file, packaged, timeout=400)
    run_ranks(comes_back, ranks, file, packaged)
