"""How fast are the layers of other projects, and what do they keep? Each one that is installed runs beside those of `benchmarks/peers.py`.

They are called through the public functions of these versions:

- MegaBlocks 0.10.0 (databricks/megablocks, megablocks/layers/moe.py and megablocks/ops): ``sort``, ``histogram``, ``inclusive_cumsum``, and
  the permutation ``gather`` and ``scatter``. It needs torch 2.7.
- Transformer Engine 2.20.2 (NVIDIA/TransformerEngine, transformer_engine/pytorch/permutation.py): ``moe_permute`` and ``moe_unpermute``
  with map_type="index", the map of [T, K] ids.
- ScatterMoE (shawntan/scattermoe at 2d15f31, not on PyPI; scattermoe/parallel_experts.py): ``flatten_sort_count``, ``parallel_linear``.
- SonicMoE 0.1.2.post1 (Dao-AILab/sonic-moe, sonicmoe/functional/__init__.py): ``moe_general_routing_inputs``. It needs Python 3.12.
- Liger-Kernel 0.8.5 (linkedin/Liger-Kernel, liger_kernel/ops/fused_moe.py): ``LigerFusedMoEFunction``.
- Transformers 5.24 (huggingface/transformers, transformers/models/qwen3_moe and integrations/moe.py): ``Qwen3MoeExperts``, grouped_mm. It
  runs on a CPU too.

The first two permute rows and take any experts: each is a `peers.Layer`. The others have SwiGLU experts of their own: each is a `Whole`.
None drops slots. A project is left out if it is not installed, cannot run here, or fails the check against the
dense float64 layer. A line then says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import ON_ONE, Compute, Layer, check
from benchmarks.whole import Whole, check_whole


def megablocks(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, compute: Compute) -> Tensor:
    ops = import_module("megablocks.ops")
    flat, k = experts.flatten().int(), experts.shape[1]
    bin_ids, indices = ops.sort(flat, max(1, math.ceil(math.log2(num_experts))))
    bins = ops.inclusive_cumsum(ops.histogram(flat, num_experts), 0).view(num_experts)
    rows = compute(ops.gather(x, indices, bin_ids, bins, k), bins, 0)
    return ops.scatter(rows, indices, bin_ids, weights.flatten(), bins, k)


def transformer_engine(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, compute: Compute) -> Tensor:
    te = import_module("transformer_engine.pytorch")
    rows, row_id_map = te.moe_permute(x, experts.int(), experts.numel(), map_type="index")
    ends = torch.bincount(experts.flatten(), minlength=num_experts).cumsum(0).to(torch.int32)
    return te.moe_unpermute(compute(rows, ends, 0), row_id_map, merging_probs=weights.float(), map_type="index")


def scattermoe(x: Tensor, experts: Tensor, weights: Tensor, into: Tensor, out: Tensor) -> Tensor:
    ops = import_module("scattermoe")
    order = ops.flatten_sort_count(experts, num_experts=into.shape[0])  # ids sorted, where they stood, the experts' ends
    gate, up = ops.parallel_linear(x, into.permute(0, 2, 1), experts.shape[1], *order, grouped_out=True).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    return ops.parallel_linear(hidden, out.permute(0, 2, 1), 1, *order, grouped_in=True, gates=weights.to(x.dtype))


def sonicmoe(x: Tensor, experts: Tensor, weights: Tensor, into: Tensor, out: Tensor) -> Tensor:
    ops, enums = import_module("sonicmoe"), import_module("sonicmoe.enums")
    token = torch.arange(x.shape[0], dtype=torch.int32, device=x.device).repeat_interleave(experts.shape[1])
    stream = torch.cuda.current_stream().cuda_stream
    slots = weights.flatten(), token, experts.flatten().int()
    matrices = into.permute(1, 2, 0), None, out.permute(1, 2, 0), None  # no biases
    y, _ = ops.moe_general_routing_inputs(
        x, *slots, *matrices, into.shape[0], stream, enums.ActivationType.SWIGLU, False, concat_layout=True
    )  # fmt: skip
    return y


def liger(x: Tensor, experts: Tensor, weights: Tensor, into: Tensor, out: Tensor) -> Tensor:
    return import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction.apply(x, into, out, experts.int(), weights)


def transformers(x: Tensor, experts: Tensor, weights: Tensor, into: Tensor, out: Tensor) -> Tensor:
    qwen = import_module("transformers.models.qwen3_moe")
    e, d, h = out.shape
    config = qwen.configuration_qwen3_moe.Qwen3MoeConfig(hidden_size=d, moe_intermediate_size=h, num_experts=e)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        layer = qwen.modeling_qwen3_moe.Qwen3MoeExperts(config)
    return torch.func.functional_call(layer, {"gate_up_proj": into, "down_proj": out}, (x, experts, weights))


LAYERS: dict[str, Layer] = {"megablocks": megablocks, "transformer_engine": transformer_engine}
WHOLES: dict[str, Whole] = {"scattermoe": scattermoe, "sonicmoe": sonicmoe, "liger": liger, "transformers": transformers}
ON_CPU = {"transformers"}


def ways(device: str, dtype: torch.dtype, without: Sequence[str] = ()) -> dict[str, Layer]:
    """The layers of one process that run here, moecomm's first; each was checked."""
    here = {name: layer for name, layer in ON_ONE.items() if name not in without}
    for layer in here.values():
        check(layer, dtype, 8, device=device)
    if device == "cuda":
        here |= {name: layer for name, layer in LAYERS.items() if name not in without and runs(name, dtype)}
    return here


def wholes(device: str, dtype: torch.dtype) -> dict[str, Whole]:
    """The layers with experts of their own that run here; each was checked."""
    return {name: layer for name, layer in WHOLES.items() if (device == "cuda" or name in ON_CPU) and runs(name, dtype, device)}


@cache
def runs(name: str, dtype: torch.dtype, device: str = "cuda") -> bool:
    """Whether the peer is installed and right on this device; once it is not, a line says why."""
    why = reason(lambda: _try(name, dtype, device))
    if why:
        print(f"{name} is left out: {why}", flush=True)
    return not why


def _try(name: str, dtype: torch.dtype, device: str) -> None:
    if name in LAYERS:
        check(LAYERS[name], dtype, 8, device=device, dropped=0.0, dim=64)
    else:
        check_whole(WHOLES[name], dtype, device)


def reason(attempt: Callable[[], Any]) -> str:
    """Why what was tried cannot be measured here, or nothing."""
    try:
        attempt()
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    except AssertionError as error:
        return f"not the dense layer: {_first_line(error)}"
    except Exception as error:  # whatever another project's code does with versions that it was not made for
        return f"{type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
