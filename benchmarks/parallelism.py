"""Does every parallelism train the same model as one process? Writes the tables of docs/parallelism.md.

    python -m benchmarks.parallelism

Every row is a real training run on gloo processes, in float64. It uses the training functions of the tests. The reference is one process
that does not import moecomm. The tests check every split of 8 ranks in the same way; this file has the splits with a name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests import one_process, stages
from tests.layer import test_placement
from tests.one_process import Run, Sizes
from tests.parallel import test_expert_parallel, test_fsdp, test_hybrid, test_pipeline, test_slice_parallel, test_tensor_parallel
from tests.spawn import run_ranks
from tests.stages import Split
from tests.training import test_checkpoint
from tests.training.test_checkpoint import Arrangement

FILE = Path(__file__).parent.parent / "docs" / "parallelism.md"
SPLITS = {
    "data": Split(pp=1, dp=8, tp=1, edp=8, ep=1, etp=1),
    "expert": Split(pp=1, dp=8, tp=1, edp=1, ep=8, etp=1),
    "expert x expert-data": Split(pp=1, dp=8, tp=1, edp=2, ep=4, etp=1),
    "tensor (dense), sequence slices, data for experts": Split(pp=1, dp=1, tp=8, edp=8, ep=1, etp=1),
    "tensor (dense), sequence slices, expert": Split(pp=1, dp=1, tp=8, edp=1, ep=8, etp=1),
    "tensor (experts)": Split(pp=1, dp=8, tp=1, edp=1, ep=1, etp=8),
    "pipeline": Split(pp=8, dp=1, tp=1, edp=1, ep=1, etp=1),
    "pipeline x expert": Split(pp=2, dp=4, tp=1, edp=1, ep=4, etp=1),
    "pipeline x tensor x expert": Split(pp=2, dp=1, tp=4, edp=1, ep=4, etp=1),
    "data x tensor, expert-data x expert x tensor": Split(pp=1, dp=2, tp=4, edp=2, ep=2, etp=2),
    "pipeline x data x tensor, expert x tensor": Split(pp=2, dp=2, tp=2, edp=1, ep=2, etp=2),
}
ARRANGEMENTS = [Arrangement(2, 2, 1, fsdp=True), Arrangement(1, 2, 2), Arrangement(1, 4, 1)]


class Way(NamedTuple):
    """A training of 4 ranks: ``train(*arguments, compiled)`` on each of them is ``one_process.train(*alone)``."""

    alone: tuple[Any, ...]
    train: Callable[..., Run]
    arguments: tuple[Any, ...]
    placement: list[list[int]] | None = None  # of experts on ranks, one behind the other where None


def ways() -> dict[str, Way]:
    sizes, replicated = Sizes(), test_placement.TRAININGS["several replicas"]
    odd = Sizes(batch=2, length=7)
    expert, tensor, slices = test_expert_parallel, test_tensor_parallel, test_slice_parallel
    found = {
        "data, by `sync_grads_`": Way((sizes, expert.STEPS, expert.CLIP), expert.train, (sizes, 4, 1)),
        "expert": Way((sizes, expert.STEPS, expert.CLIP), expert.train, (sizes, 4, 4)),
        "expert x expert-data": Way((sizes, expert.STEPS, expert.CLIP), expert.train, (sizes, 4, 2)),
        "experts with a placement and replicas": Way(
            (sizes, 6, test_placement.CLIP), test_placement.train, (sizes, replicated, 6), replicated.placement
        ),
        "FSDP2, expert x expert-data": Way((sizes, test_fsdp.STEPS, test_fsdp.CLIP), train_fsdp, (sizes,)),
    }
    orders = {"slices": "slices of the tokens", "after": "summed after the combine", "before": "summed before the combine"}
    for order, text in orders.items():
        arguments = sizes, (1, 2, 2), order, False
        found[f"expert x tensor, {text}"] = Way((sizes, tensor.STEPS, tensor.CLIP), tensor.train, arguments)
    for way, text in {"whole": "tokens replicated on the tp ranks", "sequence": "a sequence in uneven slices"}.items():
        found[f"slice, {text}"] = Way((odd, slices.STEPS, slices.CLIP), slices.train, (odd, 2, 2, way))
    for schedule in test_pipeline.SCHEDULES:
        found[f"pipeline x expert, {schedule}"] = Way(
            test_pipeline.TRAINING, stages.train, (test_pipeline.TRAINING, test_pipeline.SPLIT, schedule)
        )
    return found


def train_fsdp(sizes: Sizes, compiled: bool) -> Run:
    return test_fsdp.train_compiled(sizes, 4, 2, True)[0] if compiled else test_fsdp.train_exactly(sizes, 4, [(2, True)])[0]


def main() -> None:
    alone = [f"| {name} | {row(4, way)} |" for name, way in ways().items()] + [checkpoints()]
    together = []
    for name, split in SPLITS.items():
        of = test_hybrid.training(split)
        views = f"{split.pp} x ({split.dp}, {split.tp}) | {split.pp} x ({split.edp}, {split.ep}, {split.etp})"
        together.append(f"| {name} | {views} | {row(test_hybrid.WORLD, Way(of, stages.train, (of, split, 'GPipe')))} |")
    version = torch.__version__.split("+")[0]
    FILE.write_text(PAGE.format(torch=version, steps=of.steps, clip=of.clip, alone="\n".join(alone), together="\n".join(together)))


def row(ranks: int, way: Way) -> str:
    """Eager, then compiled: the largest relative differences from one process, on any rank."""
    expected = one_process.train(*way.alone)
    columns = []
    for compiled in (False, True):
        runs = run_ranks(way.train, ranks, *way.arguments, compiled, timeout=600)
        loss = max(largest(run.losses, expected.losses) for run in runs)
        norm = max(largest(run.norms, expected.norms) for run in runs)
        held = [here(expected.parameters, way.placement and way.placement[rank]) for rank in range(ranks)]
        weights = max(weights_differ(run.parameters, own) for run, own in zip(runs, held, strict=True))
        columns.append(f"{loss:.0e} | {norm:.0e} | {weights:.0e}")
    print(way.train.__module__, *way.arguments[1:], *columns, flush=True)
    return " | ".join(columns)


def here(parameters: dict[str, Tensor], experts: list[int] | None) -> dict[str, Tensor]:
    """The parameters, of the experts those that a rank has."""
    return {name: p if experts is None or "experts" not in name else p[experts] for name, p in parameters.items()}


def largest(got: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(got, expected, strict=True))


def weights_differ(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference in any parameter, relative to the largest number in it."""
    return max(((p - expected[name]).abs().max() / expected[name].abs().max()).item() for name, p in got.items())


def checkpoints() -> str:
    """Saved and loaded twice, on another mesh each time, and what is saved at the end."""
    sizes, steps = Sizes(), test_checkpoint.STEPS
    expected = one_process.train(sizes, steps, test_checkpoint.CLIP)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        saved = [Path(folder) / str(i) for i in range(len(ARRANGEMENTS) + 1)]
        for i, how in enumerate(ARRANGEMENTS):
            part = range(i * steps // 3, (i + 1) * steps // 3)
            losses += run_ranks(test_checkpoint.train, 4, sizes, how, saved[i], saved[i + 1], part, timeout=200)[0]
        weights = weights_differ(run_ranks(loaded, 1, sizes, saved[-1])[0], expected.parameters)
    name = "saved and loaded on three (edp, ep, etp) meshes: (2, 2, 1) under FSDP2, (1, 2, 2), (1, 4, 1)"
    return f"| {name} | {largest(losses, expected.losses):.0e} | | {weights:.0e} | | | |"


def loaded(sizes: Sizes, source: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, under the names of `one_process.py`."""
    model = test_checkpoint.Model(sizes, init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("edp", "ep", "etp")), seed=1)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=source)
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in state["model"].items()}
    return {name.removeprefix("layers."): p for name, p in whole.items()}


PAGE = """\
# Every parallelism trains the same model

The tables compare training runs on gloo processes with a run on one process. In float64, only the order of sums differs.

| | |
|---|---|
| model | dense and MoE layers |
| numbers | float64 (torch {torch}) |
| optimizer | AdamW; gradients are clipped at every step, because their norm is above the limit |
| loss | with a balance loss over the whole batch |
| mode | eager, and with compiled layers (fullgraph=True, backend "aot_eager") |
| reference | one process that computes every expert densely and does not import moecomm |

Each number is the largest relative difference from the reference, on any rank:

- **loss**: in the loss of any step
- **gradient norm**: in the gradient norm of any step, before clipping
- **weights**: in any weight after the last step

`python -m benchmarks.parallelism` writes the tables, with the training functions of the tests. `tests/parallel/test_hybrid.py` checks every
split of 8 ranks in the same way, eager and compiled.

## Each parallelism on 4 ranks

| case | loss | gradient norm | weights | compiled: loss | gradient norm | weights |
|---|---|---|---|---|---|---|
{alone}

## Combinations on 8 ranks

{steps} steps, two microbatches (GPipe), gradients clipped to {clip}.

| case | dense: pp x (dp, tp) | experts: pp x (edp, ep, etp) | loss | gradient norm | weights | compiled: loss | gradient norm | weights |
|---|---|---|---|---|---|---|---|---|
{together}
"""

if __name__ == "__main__":
    main()
