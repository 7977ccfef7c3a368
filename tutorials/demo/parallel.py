"""The parallel plan, separate from the model: which rank has which part, and FSDP2 over the ranks that have the same part.

    layers                   over pp: one stage each; the first has the embedding, the last the head
    attention heads          over tp
    experts                  over ep
    experts' hidden dims     over etp
    all parameters           under FSDP2, over the ranks that have the same part and different tokens

Each block is compiled once.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import moecomm.functional as mf
from moecomm.compile.overlap import overlap_exchanges
from moecomm.compile.passes import options as compile_options
from moecomm.mesh import MoEMesh, moe_mesh
from tutorials.demo.model import Groups, Shape, Transformer

try:
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
except ImportError:  # an older torch has one mesh for all parameters of a block
    FSDPMeshInfo = ShardPlacementResult = None


class Spread(NamedTuple):
    """Where the parts of a parameter are."""

    parts: DeviceMesh | None  # the mesh whose dims split it; None: every rank has all of it
    dims: list[int]  # the parameter's dim that each mesh dim splits
    same: DeviceMesh  # the ranks that have the same part, each with the gradient of its own tokens
    model: int = 0  # the dim that FSDP2 shards over ``same``: the model's width, if ``parts`` split other dims


def meshes(options: Namespace) -> MoEMesh:
    return moe_mesh(options.device, pp=options.pp, tp=options.tp, ep=options.ep, etp=options.etp)


def spread(name: str, mesh: MoEMesh, sliced: bool) -> Spread:
    """Where the parts of the parameter with this name go."""
    dense, expert = mesh.dense, mesh.expert
    # Mesh dims of size 1 split nothing. Such parameters use the stage's mesh: FSDP2 needs one mesh for all parameters over the same ranks.
    if ".experts." in name and expert["ep"].size() * expert["etp"].size() > 1:
        hidden, model = (2, 3) if name.endswith("into") else (2, 1)  # into [E, 2, hidden, D], out [E, D, hidden]
        return Spread(expert["ep", "etp"], [0, hidden], expert["edp"], model)
    if dense["tp"].size() > 1:
        if ".attention." in name:
            heads, model = (0, 1) if ".qkv." in name else (1, 0)  # qkv [3 * D, D], out [D, D]
            return Spread(dense["tp"], [heads], dense["dp"], model)
        if sliced and ".moe" not in name:
            return Spread(None, [], dense["dp"])  # all tp ranks compute the same, from the same tokens
    return Spread(None, [], mesh.stage)


def build(shape: Shape, mesh: MoEMesh, options: Namespace) -> Transformer:
    """Make the model from the seed, the same for every split of the ranks, then spread it over the ranks."""
    torch.manual_seed(options.seed)
    views = mesh.expert["ep"], mesh.expert["etp"], mesh.dense["tp"], mesh.stage
    names = [view.get_group().group_name for view in views]
    model = Transformer(shape, Groups(*names, ranks=mesh.stage.size(), slice=options.slice)).to(options.device)
    keep_stage(model, mesh.dense["pp"])
    where = {name: spread(name, mesh, options.slice) for name, _ in model.named_parameters()}
    for name, parameter in list(model.named_parameters()):
        parts, dims = where[name][:2]
        if parts is not None:
            module, _, last = name.rpartition(".")
            # Every rank made the same weights from the seed, so nothing is sent.
            part = distribute_tensor(parameter.data, parts, [Shard(dim) for dim in dims], src_data_rank=None)
            setattr(model.get_submodule(module), last, nn.Parameter(part))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(options), reduce_dtype=torch.float32)
    of_parameter = {parameter: where[name] for name, parameter in model.named_parameters()}
    ignored = apart(model.blocks, mesh.stage, of_parameter)
    for block in model.blocks.values():
        shard_block(block, mesh.stage, of_parameter, policy, ignored)
        if options.compile:
            block.forward = torch.compile(block.forward, fullgraph=True, backend=options.backend, options=passes(options))
    ends = spread("head.weight", mesh, options.slice)  # the embedding and the last norm are spread in the same way
    fully_shard(model, mesh=ends.same, mp_policy=policy, ignored_params=ignored)
    for module in (model, *model.blocks.values()):
        # Gradients are summed, and the loss is divided by the number of ranks. A mean over an expert's own mesh dim would be wrong: the
        # tokens of all ep ranks came to the expert, so its gradient already includes them.
        module.set_gradient_divide_factor(1)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide in a reduction
    return model


def passes(options: Namespace) -> dict[str, Any] | None:
    """The pass that runs the shared expert during the exchanges, if there is one. Only Inductor takes passes."""
    return compile_options(overlap_exchanges) if options.shared and options.backend == "inductor" else None


def keep_stage(model: Transformer, pp: DeviceMesh) -> None:
    """Remove the modules of other stages. The rest keep their names, so a checkpoint describes the whole model."""
    stages, stage = pp.size(), pp.get_local_rank()
    own = len(model.blocks) // stages
    for i in range(len(model.blocks)):
        if i // own != stage:
            del model.blocks[str(i)]
    if stage != 0:
        model.embed = None
    if stage != stages - 1:
        model.norm = model.head = None


def shard_block(
    block: nn.Module, stage: DeviceMesh, where: dict[nn.Parameter, Spread], policy: MixedPrecisionPolicy, ignored: set[nn.Parameter] | None
) -> None:  # fmt: skip
    """Make a block one FSDP module, without hooks inside it. Each of its parameters goes over the mesh that `spread` gives."""
    infos: dict[str, FSDPMeshInfo] = {}  # one per group: FSDP2 takes one object for all parameters over it

    def placement(parameter: nn.Parameter) -> Shard | ShardPlacementResult:
        to = where[parameter]
        if to.same is stage:
            return Shard(to.model)
        info = infos.setdefault(to.same.get_group().group_name, FSDPMeshInfo(to.same, shard_mesh_dim=0))
        return ShardPlacementResult(Shard(to.model), info)

    fully_shard(
        block, mesh=stage, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=False,  # small, so gather once per step
        ignored_params=ignored,
    )  # fmt: skip


def apart(module: nn.Module, stage: DeviceMesh, where: dict[nn.Parameter, Spread]) -> set[nn.Parameter] | None:
    """The parameters that need a mesh of their own, where FSDP2 cannot do that. `sync_replicated_` does their data parallelism."""
    if ShardPlacementResult is not None:
        return None
    return {parameter for parameter in module.parameters() if where[parameter].same is not stage}


def sync_replicated_(model: Transformer, mesh: MoEMesh, sliced: bool) -> None:
    """Add up the gradients of the parameters that FSDP2 does not shard, over the ranks that have the same part.

    With an FSDP2 that shards every parameter, it does nothing.
    """
    if ShardPlacementResult is None:
        meshes = {parameter: spread(f"blocks.{name}", mesh, sliced).same for name, parameter in model.blocks.named_parameters()}
        rest = {parameter: over for parameter, over in meshes.items() if over is not mesh.stage}  # in the same order on all ranks
        if rest:
            mf.sync_grads_(list(rest), rest, reduce="sum")


def compute_dtype(options: Namespace) -> torch.dtype:
    """bfloat16, or float32 for eager runs on a CPU that cannot multiply bfloat16 matrices.

    Compiled runs always use bfloat16: torch traces grouped_mm only in bfloat16.
    """
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    slow = options.device == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.float32 if slow and not options.compile else torch.bfloat16
