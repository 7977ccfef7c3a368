"""Each way of parallelism against one process, as a table: ``python -m benchmarks.parallelism`` writes docs/parallelism.md.

Every row is a real training on 8 gloo processes, in float64, with AdamW, clipped gradients, a balance loss, and microbatches in a pipeline;
what it is compared with is computed by one process without moecomm. The tests hold every split of 8 ranks to the same; these are the ones
with a name.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.one_process import Run
from tests.spawn import run_ranks
from tests.stages import Split, train
from tests.test_hybrid import WORLD, expected, training

FILE = Path(__file__).parent.parent / "docs" / "parallelism.md"
WAYS = {
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


def main() -> None:
    of = training(Split(1, 8, 1, 8, 1, 1))
    lines = [row(name, split) for name, split in WAYS.items()]
    FILE.write_text(PAGE.format(torch=torch.__version__.split("+")[0], steps=of.steps, clip=of.clip, rows="\n".join(lines)))
    print("\n".join(lines))


def row(name: str, split: Split) -> str:
    """A line of the table: the largest relative differences from one process, on any rank."""
    of = training(split)
    runs = run_ranks(train, WORLD, of, split, timeout=300)
    loss = max(largest(run.losses, expected(of).losses) for run in runs)
    norm = max(largest(run.norms, expected(of).norms) for run in runs)
    weights = max(weights_differ(run, expected(of)) for run in runs)
    views = f"{split.pp} x ({split.dp}, {split.tp}) | {split.pp} x ({split.edp}, {split.ep}, {split.etp})"
    return f"| {name} | {views} | {loss:.0e} | {norm:.0e} | {weights:.0e} |"


def largest(got: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(got, expected, strict=True))


def weights_differ(run: Run, expected: Run) -> float:
    """The largest difference in any parameter, relative to the largest number in it."""
    ratios = [(p - expected.parameters[name]).abs().max() / expected.parameters[name].abs().max() for name, p in run.parameters.items()]
    return max(ratio.item() for ratio in ratios)


PAGE = """\
# Every way of parallelism is the same training

Each row is a training of {steps} steps on 8 processes (gloo, float64, torch {torch}): dense and MoE layers, AdamW, gradients clipped to
a norm of {clip}, a balance loss over the whole batch, two microbatches. It is compared with one process that computes every expert
densely and does not import moecomm: the largest relative difference in any step's loss, in any step's gradient norm before clipping, and
in any weight after the last step, on any rank. What is left in float64 is the order of sums.

The table is written by `python -m benchmarks.parallelism`; `tests/test_hybrid.py` holds every split of 8 ranks to the same.

| way | dense: pp x (dp, tp) | experts: pp x (edp, ep, etp) | loss | gradient norm | weights |
|---|---|---|---|---|---|
{rows}
"""

if __name__ == "__main__":
    main()
