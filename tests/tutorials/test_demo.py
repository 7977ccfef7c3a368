"""The demo: the same training on any arrangement of ranks, and a command that stops, resumes and ends as it says."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.spawn import run_ranks
from tutorials.demo import data, parallel, pipeline, train
from tutorials.demo.checkpoint import complete
from tutorials.demo.model import Shape
from tutorials.demo.options import parse

ROOT = Path(__file__).parents[2]
STEPS = 20
SHAPE = Shape(dim=64, hidden=64, context=32)
TEXT = argparse.__file__  # 100 kB: the whole standard library takes each process two seconds to read
EAGER = "--no-compile --dtype float32"
PER_PARAMETER_MESH = parallel.ShardPlacementResult


def losses(arguments: str, one_mesh: bool = False, steps: int = STEPS) -> tuple[list[float], int]:
    """The demo's loss at each step, and how many graphs were compiled; with an FSDP2 that has one mesh a block, where ``one_mesh``."""
    options = parse([*arguments.split(), "--batch", "8", "--data", TEXT])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if one_mesh:
        parallel.ShardPlacementResult = None
    try:
        text, shape = data.read(options.data), SHAPE
        mesh = parallel.meshes(options)
        model = parallel.build(shape, mesh, options)
        schedule = pipeline.schedule(model, mesh, shape, options.batch, options.slice, parallel.compute_dtype(options), 1)
        optimizer = train.adamw(model)
        history: dict[str, Any] = {"step": 0, "train": [], "loads": [], "rows": []}
        for step in range(steps):
            inputs = pipeline.own_part(data.batch(text.train, options.batch, shape.context, 0, step), mesh, options.slice)
            loss, load = train.train_step(model, schedule, optimizer, *inputs, train.learning_rate(step, STEPS), mesh, options)
            train.record(history, loss, load, False, mesh)
    finally:
        parallel.ShardPlacementResult = PER_PARAMETER_MESH
    return history["train"], torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def one_process() -> list[float]:
    return run_ranks(losses, 1, f"--ranks 1 {EAGER}")[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "--ranks 2 --ep 2",
        *(pytest.param(way, marks=pytest.mark.exhaustive) for way in ("--ranks 2 --ep 1", "--ranks 4 --ep 2", "--ranks 4 --ep 4")),
    ],
)
def test_every_arrangement_of_ranks_trains_as_one_process_does(arguments: str, one_process: list[float]) -> None:
    everywhere = [run for run, _ in run_ranks(losses, int(arguments.split()[1]), f"{arguments} {EAGER}")]
    assert all(run == everywhere[0] for run in everywhere)
    assert one_process[-1] < one_process[0] - 1  # it does train
    # float32 sums in another order round to some 1e-7 of the loss; measured over the 20 steps: at most 2e-7. The experts' gradients scaled
    # wrongly, which AdamW nearly hides, differed by 7e-6 in the second step and by 2e-3 in the last.
    torch.testing.assert_close(everywhere[0], one_process, rtol=2e-6, atol=0)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_experts_are_replicated_where_fsdp_has_one_mesh_for_a_block(one_process: list[float]) -> None:
    everywhere = run_ranks(losses, 4, f"--ranks 4 --ep 2 {EAGER}", True, 8)
    torch.testing.assert_close(everywhere[0][0], one_process[:8], rtol=2e-6, atol=0)


def dtypes(arguments: str, one_mesh: bool) -> set[tuple[str, torch.dtype]]:
    """What the parts of a block give, forward, and the dtype of each."""
    options, shape = parse([*arguments.split(), "--batch", "2"]), Shape(dim=32, hidden=16, layers=1, context=16)
    seen = set()
    if one_mesh:
        parallel.ShardPlacementResult = None
    try:
        mesh = parallel.meshes(options)
        model = parallel.build(shape, mesh, options)
        for name, module in model.blocks["0"].named_modules():
            module.register_forward_hook(lambda _, __, y, name=name: seen.add((name, (y[0] if isinstance(y, tuple) else y).dtype)))
        inputs, _ = pipeline.own_part(data.batch(torch.arange(64).byte(), 2, 16, 0, 0), mesh, options.slice)
        torch.set_warn_always(True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Mismatch dtype")  # a kernel that is slower for a weight of another dtype
            model(inputs)
    finally:
        torch.set_warn_always(False)
        parallel.ShardPlacementResult = PER_PARAMETER_MESH
    return seen


@pytest.mark.parametrize("one_mesh", [False, True])
def test_a_block_computes_in_the_dtype_that_was_asked_for(one_mesh: bool) -> None:
    for seen in run_ranks(dtypes, 2, "--ranks 2 --tp 2 --slice --no-compile --dtype bfloat16", one_mesh):
        assert {"attention_norm", "attention", "moe_norm", "moe.gate", "moe.experts", ""} <= {name for name, _ in seen}
        assert {dtype for _, dtype in seen} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiled_it_is_one_graph_for_all_blocks_and_trains_as_in_eager_mode(backend: str) -> None:
    eager, _ = run_ranks(losses, 2, "--ranks 2 --no-compile --dtype bfloat16", False, 8)[0]
    compiled, graphs = run_ranks(losses, 2, f"--ranks 2 --backend {backend}", False, 8, timeout=240)[0]
    assert graphs == 1
    # bfloat16 keeps 8 bits, and the compiled graph rounds at fewer places: measured at most 9e-3 over 20 steps.
    torch.testing.assert_close(compiled, eager, rtol=3e-2, atol=0)


SMALL = ["--ranks", "2", "--batch", "4", "--sample", "4", *EAGER.split(), "--data", TEXT]


def undisturbed(arguments: list[str]) -> None:
    """What the command's ranks run, in these."""
    options = parse(arguments)
    options.out.mkdir(exist_ok=True)
    train.run(options, lambda: False, dist.get_rank())


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tutorials.demo", *SMALL, "--out", str(out), *arguments]
    # As a terminal's shell starts it: with SIGINT at its default, whatever this process was started with.
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What ``process`` writes, up to ``text``."""
    assert process.stdout is not None
    seen = ""
    while text not in seen:
        byte = process.stdout.read(1)
        assert byte, f"it ended before {text!r}:\n{seen}"
        seen += byte
    return seen


def history(out: Path) -> dict[str, Any]:
    return json.loads((complete(out / "checkpoints")[-1] / "history.json").read_text())


@pytest.mark.slow
def test_interrupted_and_resumed_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    run_ranks(undisturbed, 2, [*SMALL, "--steps", "6", "--out", str(tmp_path / "whole")], timeout=120)

    interrupted = start(tmp_path / "parts", "--steps", "6")
    seen = read_until(interrupted, "2/6 ")
    interrupted.send_signal(signal.SIGINT)
    rest, _ = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 128 + signal.SIGINT, rest
    assert "Traceback" not in seen + rest
    assert "--resume goes on from it" in rest
    assert 2 <= history(tmp_path / "parts")["step"] < 6

    resumed = start(tmp_path / "parts", "--steps", "6", "--resume", "--profile")
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert history(tmp_path / "parts")["train"] == history(tmp_path / "whole")["train"]
    for plot in ("loss.png", "experts.png"):
        assert (tmp_path / "parts" / plot).stat().st_size > 10_000
    for rank in range(2):
        assert "moecomm::dispatch_exchange" in (tmp_path / "parts" / f"trace_{rank}.json").read_text()
    assert "held-out bits per byte" in output
    assert "bigram" in output


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_second_interrupt_ends_all_ranks_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "--steps", "400")
    read_until(process, "bytes to train on")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT


def test_held_out_files_are_never_trained_on(tmp_path: Path) -> None:
    for number in range(64):
        (tmp_path / f"{number}.txt").write_bytes(bytes([number]) * 50)
    text = data.read(tmp_path)
    train_bytes, held_out = set(text.train.tolist()), set(text.held_out.tolist())
    assert held_out - {10}, "no file is held out"
    assert train_bytes & held_out <= {10}, "a newline ends every file; nothing else is in both"


def test_the_baselines_are_those_of_counting() -> None:
    train_text = torch.tensor([0, 1, 0, 1, 0, 2], dtype=torch.uint8)
    windows = torch.tensor([[0, 1, 0]], dtype=torch.uint8)
    unigram, bigram = data.baselines(train_text, windows)
    # After 0 came 1, 1 and 2; after 1 came 0 and 0; as what comes after something: 1, 0, 1, 0, 2. One is added to all 256 counts.
    expected_unigram = -(torch.tensor([3 / 261, 3 / 261]).double().log2().mean())
    expected_bigram = -(torch.tensor([3 / 259, 3 / 258]).double().log2().mean())
    assert unigram == pytest.approx(expected_unigram.item())
    assert bigram == pytest.approx(expected_bigram.item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ranks 3 --ep 2", "--ep * --etp was 2 * 1 = 2; it must divide the ranks of a stage, --ranks / --pp = 3 / 1 = 3"),
        (
            "--ranks 8 --pp 2 --tp 2 --etp 4 --ep 2",
            "--ep * --etp was 2 * 4 = 8; it must divide the ranks of a stage",
        ),
        ("--ranks 6 --pp 2 --tp 2", "--pp * --tp was 2 * 2 = 4; it must divide --ranks, 6"),
        ("--pp 3", "--pp was 3; it must divide the 4 layers"),
        ("--tp 3", "--tp was 3; it must divide the 4 heads of the attention"),
        ("--etp 3", "--etp was 3; it must divide the hidden dim of an expert, 256"),
        ("--etp 0", "--etp was 0; it must be at least 1"),
        (
            "--ranks 12 --tp 4 --ep 3 --experts 9",
            "--ranks / (--pp * --tp) was 12 / (1 * 4) = 3; it must divide",
        ),
        ("--ranks 6 --batch 12", "--ranks / (--pp * --ep * --etp) was 6 / (1 * 2 * 1) = 3; it must divide the width of the model, 128"),
        (
            "--pp 4 --batch 20",
            "--ranks / (--pp * --tp) = 1, times the 8 microbatches that --pp 4 takes: 8",
        ),
        ("--experts 7", "--experts was 7; it must be a multiple of --ep, 2"),
        ("--top-k 9", "--top-k was 9; it must be at most --experts, 8"),
        ("--steps 0", "--steps was 0; it must be at least 1"),
        ("--data /nowhere", "--data was /nowhere; it must be a file or a folder that exists"),
        ("--dtype float32", "--dtype was float32; it must be bfloat16"),
        ("--batch 6", "--batch was 6; it must be a multiple of the data-parallel ranks, --ranks / (--pp * --tp) = 4"),
    ],
)
def test_wrong_options_are_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments.split())
    assert message in capsys.readouterr().err
