"""A forward pass of the demo's model, without its launcher. `python -m moecomm.compile.report` reports on it.

    python -m moecomm.compile.report
    torchrun --nproc-per-node 2 -m moecomm.compile.report

The second command spreads the experts over its ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tutorials.demo.model import Groups, Shape, Transformer

torch.manual_seed(0)
RANKS = dist.get_world_size() if dist.is_initialized() else 1
WORLD = dist.group.WORLD.group_name if RANKS > 1 else ""
MODEL = Transformer(Shape(), Groups(experts=WORLD, tokens=WORLD, ranks=RANKS)).bfloat16()
for block in MODEL.blocks.values():
    experts = block.moe.experts
    for name, weight in list(experts.named_parameters()):  # keep this rank's part
        setattr(experts, name, torch.nn.Parameter(weight.detach().chunk(RANKS)[dist.get_rank() if RANKS > 1 else 0].clone()))
    block.compile(fullgraph=True)  # once for all layers, as the demo does
TEXT = torch.randint(256, (2, Shape().context + 1))


def loss() -> Tensor:
    """The mean cross entropy of a batch."""
    logits = MODEL(TEXT[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), TEXT[:, 1:].flatten())
