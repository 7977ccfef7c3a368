"""Run each rank's part of a batch through the stages of the pipeline: forward and backward, or only forward. One stage works too."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

import moecomm.functional as mf
from moecomm.mesh import MoEMesh
from tutorials.demo.model import Shape, Transformer


def own_part(tokens: Tensor, mesh: MoEMesh, sliced: bool, parts: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's part of ``tokens`` [batch, length + 1]: the input and the tokens to predict, [B, n] each.

    The batch has ``parts`` microbatches. The dp ranks divide the sequences of each microbatch. The tp ranks divide the length of the
    sequences, unless ``sliced``: then they slice tokens only for the experts.
    """
    mine = torch.cat([mf.slice_scatter(microbatch, mesh.dense["dp"]) for microbatch in tokens.chunk(parts)])
    before, after = mine[:, :-1].int(), mine[:, 1:].long()
    if sliced:
        return before, after
    return mf.slice_scatter(before, mesh.dense["tp"], dim=1), mf.slice_scatter(after, mesh.dense["tp"], dim=1)


def schedule(
    model: Transformer, mesh: MoEMesh, shape: Shape, batch: int, sliced: bool, dtype: torch.dtype, parts: int
) -> PipelineScheduleSingle:
    """The 1F1B schedule (arXiv 2104.04473) over ``parts`` microbatches of ``batch`` sequences. Stages exchange activations of ``dtype``."""
    pp, dp, tp, device = mesh.dense["pp"], mesh.dense["dp"], mesh.dense["tp"], torch.device(mesh.stage.device_type)
    rows, length = batch // parts // dp.size(), shape.context if sliced else shape.context // tp.size()
    between = torch.zeros(rows, length, shape.dim, dtype=dtype, device=device, requires_grad=True)
    first = torch.zeros(rows, length, dtype=torch.int32, device=device)
    last = torch.zeros(rows, length, shape.vocabulary, device=device, requires_grad=True)
    into, out = between if model.embed is None else first, between if model.head is None else last
    stage = PipelineStage(model, pp.get_local_rank(), pp.size(), device, into, out, group=pp.get_group())
    ranks = ranks_of_loss(mesh, sliced)
    return Schedule1F1B(stage, parts, loss_fn=lambda logits, after: cross_entropy(logits, after) / ranks)


def ranks_of_loss(mesh: MoEMesh, sliced: bool) -> int:
    """How many ranks of the last stage have a different part of the loss. With ``sliced``, all tp ranks have the same part."""
    return mesh.dense["dp"].size() if sliced else mesh.stage.size()


def cross_entropy(logits: Tensor, after: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), after.flatten())


@torch.no_grad()
def forward(model: Transformer, tokens: Tensor, mesh: MoEMesh, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Run ``tokens`` [B, n] through all stages, eagerly and without gradients. The batch size differs, and is not worth a compilation.

    Returns the logits [B, n, vocabulary] on the last stage. On the other stages, returns the activations that they send on.
    """
    group, stage = mesh.dense["pp"].get_group(), mesh.dense["pp"].get_local_rank()
    x = tokens
    if model.embed is None:
        x = torch.empty(*tokens.shape, shape.dim, dtype=dtype, device=tokens.device)
        dist.recv(x, group=group, group_src=stage - 1)
    with torch.compiler.set_stance("force_eager"):
        x = model(x)
    if model.head is None:
        dist.send(x, group=group, group_dst=stage + 1)
    return x
