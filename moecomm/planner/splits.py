"""All ways to split ranks in `moe_mesh`'s two views, and which of them a model takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from moecomm.mesh import divisors
from moecomm.planner.model import Model


class Split(NamedTuple):
    """The sizes of `moe_mesh`'s dims: dense (pp, dp, cp, tp), expert (pp, edp, ep, etp). In the cost model, each may be an array [n].

    >>> print(Split(pp=2, dp=2, cp=1, tp=2, edp=1, ep=4, etp=1).call())
    moe_mesh("cuda", pp=2, dp=2, cp=1, tp=2, ep=4, etp=1)
    """

    pp: int
    dp: int
    cp: int
    tp: int
    edp: int
    ep: int
    etp: int

    def stage(self) -> int:
        """The ranks of a pipeline stage."""
        return self.dp * self.cp * self.tp

    def call(self, device: str = "cuda") -> str:
        """The call that makes the meshes."""
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in ("pp", "dp", "cp", "tp", "ep", "etp"))
        return f'moe_mesh("{device}", {sizes})'


def splits(ranks: int) -> Iterator[Split]:
    """Yield every split of ``ranks`` that `moe_mesh` takes.

    >>> len(list(splits(4))), len(list(splits(64)))
    (46, 1596)
    """
    for pp in divisors(ranks):
        stage = ranks // pp
        expert = [(stage // (ep * etp), ep, etp) for ep in divisors(stage) for etp in divisors(stage // ep)]
        for cp in divisors(stage):
            for tp in divisors(stage // cp):
                for view in expert:
                    yield Split(pp, stage // (cp * tp), cp, tp, *view)


def misfits(split: Split, model: Model) -> list[str]:
    """Why the model cannot be split so: one sentence for each reason. Pipeline stages may have unequal numbers of layers.

    >>> small = Model(layers=4, dim=64, hidden=32, experts=8, k=2, heads=4, kv_heads=4, head=16, vocabulary=256)
    >>> misfits(Split(pp=1, dp=2, cp=1, tp=8, edp=1, ep=16, etp=1), small)
    ['tp = 8 does not divide the 4 heads', 'ep = 16 does not divide the 8 experts']
    """
    found = []
    if split.pp > model.layers:
        found.append(f"pp = {split.pp} is more than the {model.layers} layers")
    if model.heads % split.tp:
        found.append(f"tp = {split.tp} does not divide the {model.heads} heads")
    elif model.kv_heads % split.tp and split.tp % model.kv_heads:
        found.append(f"tp = {split.tp} does not divide the {model.kv_heads} heads of keys, nor they it")
    if model.sequence % (split.cp * split.tp):
        found.append(f"cp * tp = {split.cp * split.tp} does not divide the {model.sequence} tokens of a sequence")
    if model.experts % split.ep:
        found.append(f"ep = {split.ep} does not divide the {model.experts} experts")
    if model.hidden % split.etp:
        found.append(f"etp = {split.etp} does not divide an expert's hidden dim of {model.hidden}")
    if model.batch % split.dp:
        found.append(f"dp = {split.dp} does not divide the batch of {model.batch} sequences")
    elif split.pp > model.batch // split.dp:
        found.append(f"pp = {split.pp} needs as many microbatches; batch / dp is {model.batch // split.dp} sequences")
    return found
