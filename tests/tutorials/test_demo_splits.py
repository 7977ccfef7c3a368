"""The demo split in every way that fits its ranks: the same training as on one rank; and what does not fit is refused with what would."""

from __future__ import annotations

import functools
import itertools
import math
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from moecomm.mesh import divisors
from tests.spawn import run_ranks
from tutorials.demo import checkpoint, data, parallel, pipeline, train
from tutorials.demo.auto import candidates
from tutorials.demo.model import Shape
from tutorials.demo.options import parse
from tutorials.demo.splits import default_ep, microbatches, misfits

SMALL = Shape(dim=32, hidden=16, context=16)
STEPS = 4
EAGER = "--no-compile --dtype float32"
TOLERANCE = 2e-6  # float32 sums in another order round to some 1e-7 of the loss; measured in all ways to split 2 and 4 ranks: 3e-7


def options_of(arguments: str) -> Namespace:
    return parse(["--batch", "16", *arguments.split()])


def training(arguments: str, parts: int | None = None, folder: Path | None = None, steps: int = STEPS) -> list[float]:
    """The losses of the demo, trained up to so many ``steps`` with a small model; from the newest checkpoint in ``folder``, and into it."""
    options = options_of(arguments)
    shape = SMALL._replace(shared=options.shared)
    mesh = parallel.meshes(options)
    parts = parts or microbatches(options.pp)
    model = parallel.build(shape, mesh, options)
    schedule = pipeline.schedule(model, mesh, shape, options.batch, options.slice, parallel.compute_dtype(options), parts)
    optimizer = train.adamw(model)
    history: dict[str, Any] = {"step": 0, "train": [], "held_out": [], "loads": [], "rows": []}
    if folder is not None and checkpoint.complete(folder):
        history = checkpoint.load(folder, model, optimizer)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(64, (4096,), generator=generator).cumsum(0).byte()
    for step in range(history["step"], steps):
        inputs = pipeline.own_part(data.batch(text, options.batch, shape.context, 0, step), mesh, options.slice, parts)
        loss, load = train.train_step(model, schedule, optimizer, *inputs, train.learning_rate(step, 20), mesh, options)
        train.record(history, loss, load, False, mesh)
    slots = options.batch * shape.context * shape.top_k
    assert all(sum(layer) == slots for loads in history["loads"] for layer in loads)
    if folder is not None:
        checkpoint.save(folder, model, optimizer, history)
    bits = train.held_out_bits(model, data.windows(text, 8, shape.context), mesh, shape, options)
    return [*history["train"], bits]


@functools.cache
def one_rank(parts: int, more: str = "") -> list[float]:
    losses = run_ranks(training, 1, f"--ranks 1 {more} {EAGER}", parts)[0]
    assert abs(losses[STEPS - 1] - losses[0]) > 0.01  # the steps do change it
    return losses


def ways(ranks: int) -> list[str]:
    """All options that split so many ranks."""
    found = []
    for pp, tp, ep, etp in itertools.product(divisors(ranks), repeat=4):
        split = f"--ranks {ranks} --pp {pp} --tp {tp} --ep {ep} --etp {etp}"
        for arguments in [split, f"{split} --slice"] if tp > 1 else [split]:
            options = Namespace(ranks=ranks, pp=pp, tp=tp, ep=ep, etp=etp, experts=8, top_k=2, batch=16)
            if not any(misfits(options, SMALL)):
                found.append(arguments)
    return found


def test_the_ways_to_split_four_ranks_are_all_there() -> None:
    # One stage: 3 tp sizes, each with 6 ways to split 4 ranks over edp, ep and etp; two: 2 with 3; four: 1. And with --slice where tp > 1.
    assert len(ways(4)) == 18 + 6 + 1 + 12 + 3


def test_the_splits_that_auto_predicts_are_all_there() -> None:
    options = options_of("--ranks 4 --split auto")
    found = [f"--ranks 4 --pp {split.pp} --tp {split.tp} --ep {split.ep} --etp {split.etp}" for split, _ in candidates(options, SMALL)]
    assert sorted(found) == sorted(way for way in ways(4) if "--slice" not in way)


def test_auto_is_refused_with_a_split_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of("--ranks 4 --split auto --pp 2")
    assert "--split was auto; it must be without --pp" in capsys.readouterr().err


EVERY_RUN = "--ranks 4 --pp 2 --tp 2 --ep 1 --etp 2 --slice"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [pytest.param(way, marks=[] if way == EVERY_RUN else pytest.mark.exhaustive) for way in (*ways(2), *ways(4))]
)
def test_every_split_trains_as_one_rank_does(arguments: str) -> None:
    options = options_of(arguments)
    expected = one_rank(microbatches(options.pp))
    for losses in run_ranks(training, options.ranks, f"{arguments} {EAGER}", timeout=240):
        torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=0)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("split", ["--pp 2 --tp 2 --ep 2", "--tp 2 --ep 2 --etp 2 --slice"])
def test_with_a_shared_expert_too_a_split_trains_as_one_rank_does(split: str) -> None:
    expected = one_rank(microbatches(options_of(f"--ranks 4 {split}").pp), "--shared 24")
    for losses in run_ranks(training, 4, f"--ranks 4 {split} --shared 24 {EAGER}", timeout=240):
        torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=0)


CHAINS = {
    "to fewer ranks": ["--ranks 4 --pp 2 --tp 2 --ep 2", "--ranks 2 --tp 2 --etp 2 --slice", "--ranks 2 --pp 2", "--ranks 1"],
    "on four ranks": ["--ranks 4 --pp 2 --tp 2 --ep 2", "--ranks 4 --tp 2 --ep 2 --etp 2 --slice", "--ranks 4 --pp 4", "--ranks 1"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways", [CHAINS["to fewer ranks"], pytest.param(CHAINS["on four ranks"], marks=pytest.mark.exhaustive)], ids=list(CHAINS)
)
def test_training_goes_on_from_a_checkpoint_on_ranks_split_otherwise(ways: list[str], tmp_path: Path) -> None:
    for step, way in enumerate(ways, 1):
        losses = run_ranks(training, options_of(way).ranks, f"{way} {EAGER}", 4, tmp_path, step, timeout=240)[0]
    torch.testing.assert_close(losses, one_rank(4), rtol=TOLERANCE, atol=0)


def compiled(arguments: str) -> tuple[list[float], int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return training(arguments), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("sliced", ["", "--slice"])
def test_a_compiled_pipeline_of_tensor_parallel_stages_is_one_graph_and_trains_as_in_eager_mode(sliced: str) -> None:
    split = f"--ranks 4 --pp 2 --tp 2 {sliced}"
    eager = run_ranks(training, 4, f"{split} --no-compile --dtype bfloat16")[0]
    for losses, graphs in run_ranks(compiled, 4, f"{split} --backend aot_eager", timeout=300):
        assert graphs == 1
        torch.testing.assert_close(losses, eager, rtol=3e-2, atol=0)  # bfloat16 keeps 8 bits


def instead(arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the error of options that do not fit says to write."""
    with pytest.raises(SystemExit):
        options_of(arguments)
    return re.findall("`(.+?)`", capsys.readouterr().err)


@pytest.mark.slow
def test_what_is_named_as_nearest_fits(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"ranks": (3, 4, 6, 8), "pp": (1, 2, 3), "tp": (1, 2, 3), "etp": (1, 2, 3), "experts": (7, 8)}
    refused = 0
    for split in itertools.product(*sizes.values()):
        arguments = " ".join(f"--{name} {size}" for name, size in zip(sizes, split, strict=True))
        options = Namespace(**dict(zip(sizes, split, strict=True)), top_k=2, batch=16)
        options.ep = default_ep(options)
        if any(misfits(options, Shape())):
            refused += 1
            named = instead(arguments, capsys)
            assert named
            for change in named:
                options_of(f"{arguments} {change}")
    assert refused > 100


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--ranks 8 --tp 3", ["--tp 4", "--tp 2", "--tp 1"]),
        ("--ranks 3 --ep 2", ["--ranks 4", "--ranks 2"]),
        ("--ranks 4 --ep 2 --etp 4", ["--ep 1", "--ranks 8", "--etp 2"]),
    ],
)
def test_the_nearest_that_fit_change_least(arguments: str, named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = instead(arguments, capsys)
    assert sorted(found) == sorted(named)
    whole = dict(zip(arguments.split()[::2], arguments.split()[1::2], strict=True))
    far = [abs(math.log(int(change.split()[1]) / int(whole[change.split()[0]]))) for change in found]
    assert far == sorted(far)
