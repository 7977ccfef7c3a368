"""The parallel plan, apart from the model: experts over ep x edp, everything else under FSDP2 over all ranks, each block compiled once."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import moecomm.functional as mf
from tutorials.demo.model import Experts, Groups, Shape, Transformer

try:
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
except ImportError:  # an older torch: one mesh for all parameters of a block
    FSDPMeshInfo = ShardPlacementResult = None


class Meshes:
    """Two views of the same ranks: expert (edp, ep) and dense (dp)."""

    def __init__(self, device: str, ranks: int, ep: int) -> None:
        expert = init_device_mesh(device, (ranks // ep, ep), mesh_dim_names=("edp", "ep"))
        self.edp, self.ep = expert["edp"], expert["ep"]
        # A dim of the same mesh, so that DTensor reduces over both of its dims at once; with ep = 1, edp is all ranks already.
        self.dense = self.edp if ep == 1 else expert._flatten("dp")


def build(shape: Shape, meshes: Meshes, options: Namespace) -> Transformer:
    """The model as every arrangement of the ranks begins it, then spread over them."""
    torch.manual_seed(options.seed)
    model = Transformer(shape, Groups(meshes.ep.get_group().group_name, meshes.dense.get_group().group_name))
    model.to(meshes.dense.device_type)
    for module in model.modules():
        if isinstance(module, Experts):
            for name, weight in list(module.named_parameters()):
                # Every rank made the same weights from the seed, so that nothing needs to be sent.
                setattr(module, name, nn.Parameter(distribute_tensor(weight.data, meshes.ep, [Shard(0)], src_data_rank=None)))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(options), reduce_dtype=torch.float32)
    for block in model.blocks:
        _shard_block(block, meshes, policy)
        if options.compile:
            block.forward = torch.compile(block.forward, fullgraph=True, backend=options.backend)
    fully_shard(model, mesh=meshes.dense, mp_policy=policy)
    for module in (model, *model.blocks):
        # Gradients are summed, and the loss is divided by the ranks: an expert has its ep ranks' gradients already, since their tokens
        # came to it, so that a mean over its own mesh dim would be the wrong one.
        module.set_gradient_divide_factor(1)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that also divides
    return model


def _shard_block(block: nn.Module, meshes: Meshes, policy: MixedPrecisionPolicy) -> None:
    """A block as one FSDP module, so that no hook stands inside it: its experts are sharded over edp, the rest over all ranks."""
    experts = set(block.moe.experts.parameters())
    placement = None
    if ShardPlacementResult is not None:
        # The experts stand in dim 0 for ep; sharding dim 1 over edp needs no even number of experts a rank.
        same = meshes.edp is meshes.dense
        over_edp = Shard(1) if same else ShardPlacementResult(Shard(1), FSDPMeshInfo(meshes.edp, shard_mesh_dim=0))
        placement = lambda parameter: over_edp if parameter in experts else None  # noqa: E731
    fully_shard(
        block, mesh=meshes.dense, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=False,  # small: gather once a step
        ignored_params=_replicated(block),
    )  # fmt: skip


def _replicated(module: nn.Module) -> set[nn.Parameter] | None:
    """The experts' parameters where FSDP2 cannot shard them over a mesh of their own; `sync_replicated_` does their data parallelism."""
    if ShardPlacementResult is not None:
        return None
    return {parameter for part in module.modules() if isinstance(part, Experts) for parameter in part.parameters()}


def sync_replicated_(model: nn.Module, meshes: Meshes) -> None:
    """Nothing where FSDP2 shards the experts; else the sum of their gradients over edp."""
    for block in model.blocks:
        experts = _replicated(block)
        if experts:
            mf.sync_grads_(experts, meshes.edp, reduce="sum")


def compute_dtype(options: Namespace) -> torch.dtype:
    """bfloat16, but for eager runs on a CPU that cannot multiply matrices in it: torch traces grouped_mm in bfloat16 alone."""
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    slow = options.device == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.float32 if slow and not options.compile else torch.bfloat16
