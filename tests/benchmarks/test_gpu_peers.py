"""How the benchmarks call other projects' layers: with stand-ins that do in plain torch what those functions are said to do.

The projects themselves need a GPU; a stand-in takes the same arguments, in the dtypes and orders that the project's source asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks import gpu_peers
from benchmarks.peers import ON_ONE, check
from benchmarks.whole import check_whole


def grouped(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """x [N, A] grouped by expert, matrices [E, A, B] -> [N, B]."""
    expert = torch.searchsorted(ends, torch.arange(x.shape[0]), right=True)
    return torch.einsum("na,nab->nb", x, matrices[expert])


# MegaBlocks


def _sort(x: Tensor, end_bit: int) -> tuple[Tensor, Tensor]:
    assert x.dtype == torch.int32
    assert int(x.max()) < 2**end_bit
    values, indices = x.sort(stable=True)
    return values, indices.int()


def _gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    assert (bin_ids.diff() >= 0).all()
    return x[indices.long() // top_k]


def _scatter(rows: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor, bins: Tensor, top_k: int) -> Tensor:
    assert weights.dim() == 1
    slots = torch.zeros_like(rows).index_copy(0, indices.long(), rows * weights[indices.long(), None].to(rows.dtype))
    return slots.view(-1, top_k, rows.shape[1]).sum(1)


MEGABLOCKS = SimpleNamespace(
    sort=_sort,
    histogram=lambda x, bins: torch.bincount(x, minlength=bins).int(),
    inclusive_cumsum=lambda x, dim: x.cumsum(dim).int(),
    gather=_gather,
    scatter=_scatter,
)

# Transformer Engine


def _permute(x: Tensor, ids: Tensor, rows: int, map_type: str) -> tuple[Tensor, Tensor]:
    assert (ids.dtype, rows, map_type) == (torch.int32, ids.numel(), "index")
    order = ids.flatten().argsort(stable=True)
    return x[order // ids.shape[1]], order


def _unpermute(rows: Tensor, row_id_map: Tensor, merging_probs: Tensor, map_type: str) -> Tensor:
    assert (merging_probs.dtype, map_type) == (torch.float32, "index")
    slots = torch.zeros_like(rows).index_copy(0, row_id_map, rows).view(*merging_probs.shape, -1)
    return (slots * merging_probs.unsqueeze(2)).sum(1).to(rows.dtype)


TRANSFORMER_ENGINE = SimpleNamespace(moe_permute=_permute, moe_unpermute=_unpermute)

# ScatterMoE


def _flatten_sort_count(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    values, where = ids.flatten().sort()
    return values, where, torch.bincount(ids.flatten(), minlength=num_experts).cumsum(0)


def _parallel_linear(
    x: Tensor, matrices: Tensor, k: int, ids: Tensor, where: Tensor, ends: Tensor,
    expert_biases: None = None, gates: Tensor | None = None, grouped_in: bool = False, grouped_out: bool = False,
) -> Tensor:  # fmt: skip
    rows = grouped(x if grouped_in else x[where // k], matrices, ends)
    if grouped_out:
        return rows
    slots = torch.zeros_like(rows).index_copy(0, where, rows)
    assert gates is not None
    assert gates.dtype == x.dtype
    return (gates.unsqueeze(1) @ slots.view(*gates.shape, -1)).squeeze(1)


SCATTERMOE = SimpleNamespace(flatten_sort_count=_flatten_sort_count, parallel_linear=_parallel_linear)

# SonicMoE


def _general_routing(
    x: Tensor, scores: Tensor, token: Tensor, expert: Tensor, w1: Tensor, b1: None, w2: Tensor, b2: None,
    num_experts: int, stream: int, activation: str, inference: bool, concat_layout: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert (token.diff() >= 0).all()
    assert token.dtype == expert.dtype == torch.int32
    assert w1.stride(1) == w2.stride(1) == 1  # [2 I, H, E] and [H, I, E] of strides that go by (2, 0, 1)
    assert (activation, inference, concat_layout) == ("swiglu", False, True)
    order = expert.argsort()
    ends = torch.bincount(expert, minlength=num_experts).cumsum(0)
    gate, up = grouped(x[token[order].long()], w1.permute(2, 1, 0), ends).chunk(2, dim=-1)
    rows = grouped(silu(gate) * up, w2.permute(2, 1, 0), ends) * scores[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token[order].long(), rows), ends


# Liger-Kernel and Transformers


def _fused(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    assert ids.dtype == torch.int32
    return _experts(x, gate_up, down, ids, weights)


def _experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    order = ids.flatten().argsort()
    ends = torch.bincount(ids.flatten(), minlength=down.shape[0]).cumsum(0)
    gate, up = grouped(x[order // ids.shape[1]], gate_up.transpose(1, 2), ends).chunk(2, dim=-1)
    rows = grouped(silu(gate) * up, down.transpose(1, 2), ends) * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // ids.shape[1], rows)


class _QwenExperts(torch.nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        assert config._experts_implementation == "grouped_mm"
        e, d, h = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj, self.down_proj = (torch.nn.Parameter(torch.empty(shape)) for shape in ((e, 2 * h, d), (e, d, h)))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        assert not self.gate_up_proj.is_meta
        return _experts(x, self.gate_up_proj, self.down_proj, ids, weights)


LIGER = SimpleNamespace(LigerFusedMoEFunction=SimpleNamespace(apply=_fused))
QWEN = SimpleNamespace(
    configuration_qwen3_moe=SimpleNamespace(Qwen3MoeConfig=SimpleNamespace),
    modeling_qwen3_moe=SimpleNamespace(Qwen3MoeExperts=_QwenExperts),
)
SONICMOE = SimpleNamespace(moe_general_routing_inputs=_general_routing)
MODULES: dict[str, Any] = {
    "megablocks": SimpleNamespace(ops=MEGABLOCKS), "megablocks.ops": MEGABLOCKS,
    "transformer_engine": SimpleNamespace(pytorch=TRANSFORMER_ENGINE), "transformer_engine.pytorch": TRANSFORMER_ENGINE,
    "scattermoe": SCATTERMOE,
    "liger_kernel.ops.fused_moe": LIGER, "transformers.models.qwen3_moe": QWEN,
    "sonicmoe": SONICMOE, "sonicmoe.enums": SimpleNamespace(ActivationType=SimpleNamespace(SWIGLU="swiglu")),
}  # fmt: skip


@pytest.fixture
def _stand_ins() -> Iterator[None]:
    stream = SimpleNamespace(cuda_stream=0)
    with patch.dict(sys.modules, MODULES), patch.object(torch.cuda, "current_stream", lambda: stream):
        yield


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", gpu_peers.LAYERS)
def test_a_permutation_is_called_as_its_source_says(name: str) -> None:
    for k in (1, 8):
        check(gpu_peers.LAYERS[name], torch.float32, k, dropped=0.0)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", gpu_peers.WHOLES)
def test_a_layer_with_experts_is_called_as_its_source_says(name: str) -> None:
    check_whole(gpu_peers.WHOLES[name], torch.float32, "cpu")


@pytest.mark.parametrize("name", [*gpu_peers.LAYERS, *gpu_peers.WHOLES])
def test_a_project_that_is_not_installed_is_left_out_with_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    missing = {module: None for module in MODULES if module.startswith(name)}  # as if it could not be found, wherever it is
    gpu_peers.runs.cache_clear()
    with patch.dict(sys.modules, missing), patch.object(gpu_peers, "_try", lambda name, *_: run_here(name)):
        assert not gpu_peers.runs(name, torch.float32)
    gpu_peers.runs.cache_clear()
    assert capsys.readouterr().out.startswith(f"{name} is left out: not installed (")


def run_here(name: str) -> None:
    if name in gpu_peers.LAYERS:
        check(gpu_peers.LAYERS[name], torch.float32, 2, dropped=0.0)
    else:
        check_whole(gpu_peers.WHOLES[name], torch.float32, "cpu")


def test_a_project_that_is_wrong_or_fails_is_left_out_with_the_reason() -> None:
    def wrong() -> None:
        check(lambda x, _, weights, *rest: x * weights.sum(), torch.float32, 2)

    def fails() -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    assert gpu_peers.reason(wrong).startswith("not the dense layer: ")
    assert gpu_peers.reason(fails) == "RuntimeError: no kernel image is available"


def test_a_cpu_has_the_ways_written_anew_and_no_others() -> None:
    assert list(gpu_peers.ways("cpu", torch.float32, without=("one_hot",))) == [name for name in ON_ONE if name != "one_hot"]
    installed = ["transformers"] if find_spec("transformers") else []  # whose experts run on a CPU too
    assert list(gpu_peers.wholes("cpu", torch.bfloat16)) == installed
