"""The report of what torch.compile makes of a function: it finds what was planted, and nothing in a clean layer."""

from __future__ import annotations

import inspect
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moecomm.compile.report import Report, find, report
from tests import layers
from tests.spawn import run_ranks

D, H, NUM_EXPERTS, K = 16, 24, 8, 2
pytestmark = pytest.mark.slow


class Layer(nn.Module):
    """Of the experts of this rank, with something planted in it."""

    def __init__(self, planted: str = "", ranks: int = 1) -> None:
        super().__init__()
        self.planted, self.calls = planted, 0
        torch.manual_seed(0)
        shapes = (NUM_EXPERTS, D), (NUM_EXPERTS // ranks, H, D), (NUM_EXPERTS // ranks, D, H)
        self.gate, self.into, self.out = (nn.Parameter(torch.randn(shape) / 4) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        if self.planted == "checkpoint":
            return checkpoint(self.moe, x, use_reentrant=False)
        if self.planted == "recompile":
            self.calls += 1
            x = x + 0 * self.calls
        y = self.moe(x)
        if self.planted == "break":
            torch._dynamo.graph_break()
        if self.planted == "sync":
            y = y * (y > 0).sum().item()  # an int: of a float the compiler makes a tensor again
        return y

    def moe(self, x: Tensor) -> Tensor:
        return layers.moe(x, self.gate, self.into, self.out, K, None, None)[0]


def line_of(text: str) -> str:
    """Where this file says ``text``, as a report gives places."""
    lines, first = inspect.getsourcelines(Layer)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def report_here(planted: str, device: str = "cpu") -> tuple[Report, bool]:
    """The report, in which nothing but what was planted may be found, and whether gradients were left as they were."""
    layer = Layer(planted, dist.get_world_size()).to(device)
    layer.gate.grad = torch.ones_like(layer.gate)
    x = torch.randn(6 + dist.get_rank(), D, generator=torch.Generator().manual_seed(dist.get_rank())).to(device).requires_grad_()
    with torch.compiler.set_stance(force_backend="aot_eager"):
        found = report(layer, x)
    return found, layer.into.grad is None and bool((layer.gate.grad == 1).all())


def test_a_clean_layer_is_reported_clean_with_its_exchanges_and_their_bytes() -> None:
    for rank, (found, untouched) in enumerate(run_ranks(report_here, 2, "", timeout=400)):
        assert untouched
        assert (found.graphs, found.breaks, found.recompiles, found.error) == (1, [], [], "")
        for each in (found.eager, found.compiled):
            assert each is not None
            assert [(sync.op, sync.phase) for sync in each.syncs] == [("plan_sizes", "forward")]
            assert Path(each.syncs[0].place.rpartition(":")[0]).parts[-2:] in (("tests", "layers.py"), ("compile", "test_report.py"))
            forward = [sent.op for sent in each.collectives if sent.phase == "forward"]
            assert sorted(forward) == sorted(
                ["messages_exchange", "slots_exchange", "dispatch_exchange", "combine_exchange", "gather_exchange"]
            )
            backward = [sent.op for sent in each.collectives if sent.phase == "backward"]
            assert sorted(backward) == sorted(["dispatch_exchange", "combine_exchange", "return_exchange"])
        there, back = (
            [sent.bytes for sent in found.eager.collectives if sent.op == name and sent.phase == "forward"]
            for name in ("dispatch_exchange", "combine_exchange")
        )
        backwards = {sent.op: sent.bytes for sent in found.eager.collectives if sent.phase == "backward"}
        assert backwards["dispatch_exchange"] == there[0]  # the gradient travels as the tokens did
        assert backwards["combine_exchange"] == back[0]
        assert back[0] % (4 * D) == 0
        assert 6 + rank <= back[0] // (4 * D) <= 2 * (6 + rank)  # a token's sums come back from one or two ranks
        assert found.eager.saved > 0
        assert found.seconds > 0


def test_a_planted_break_recompile_and_sync_are_found_with_their_place_and_cause() -> None:
    [(broken, _)] = run_ranks(report_here, 1, "break", timeout=400)
    assert len(broken.breaks) == 1
    assert broken.breaks[0].place == line_of("torch._dynamo.graph_break()")
    assert "graph_break" in broken.breaks[0].reason
    assert broken.recompiles == []
    assert broken.graphs >= 1
    assert broken.breaks[0].place in str(broken)

    [(again, _)] = run_ranks(report_here, 1, "recompile", timeout=400)
    assert again.breaks == []
    assert len(again.recompiles) >= 1
    assert "calls" in again.recompiles[0].cause
    assert again.recompiles[0].function == "forward"
    assert again.recompiles[0].cause in str(again)

    device = "cuda" if torch.cuda.is_available() else "cpu"  # with a GPU, reads of the CPU's tensors are no syncs
    [(reads, _)] = run_ranks(report_here, 1, "sync", device, timeout=400)
    assert [sync.op for sync in reads.eager.syncs] == ["plan_sizes", "local_scalar_dense"]
    assert reads.eager.syncs[1].place == line_of("(y > 0).sum().item()")
    assert reads.compiled is not None
    assert [sync.op for sync in reads.compiled.syncs] == ["plan_sizes", "local_scalar_dense"]


def tutorial_here() -> dict[str, Report]:
    with torch.compiler.set_stance(force_backend="aot_eager_decomp_partition"):
        return runpy.run_path(str(Path(__file__).parents[2] / "tutorials" / "04_compile.py"))["main"]()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_tutorial_shows_what_is_so(ranks: int) -> None:
    for reports in run_ranks(tutorial_here, ranks, timeout=500):
        assert {name: len(found.breaks) for name, found in reports.items()} == {"MoE": 0, "Curious": 1, "Checkpointed": 0, "Selective": 0}
        assert all(found.recompiles == [] and found.compiled is not None for found in reports.values())
        syncs = {name: [sync.phase for sync in found.eager.syncs] for name, found in reports.items()}
        once, again = ["forward"], ["forward", "backward"]
        twice = once if torch.accelerator.is_available() else once * 2  # its tensors are the CPU's: with a GPU, `.item()` is no sync
        assert syncs == {"MoE": once, "Curious": twice, "Checkpointed": again, "Selective": once}
        sent = {name: len(found.compiled.collectives) for name, found in reports.items() if found.compiled}
        assert sent["MoE"] == sent["Curious"] == sent["Selective"] == (6 if ranks > 1 else 0)
        assert sent["Checkpointed"] >= sent["MoE"] + 3 * (ranks > 1)
        assert reports["Selective"].compiled.saved < reports["MoE"].compiled.saved  # type: ignore[union-attr]


def test_the_command_reports_a_function_of_a_module_or_of_a_file() -> None:
    assert find("tests.compile.test_report:line_of") is line_of
    assert find("tutorials/04_compile.py:step").__name__ == "step"
    with pytest.raises(ValueError, match="package.module:function"):
        find("nothing")
    with pytest.raises(ValueError, match="one of tests.layers's functions"):
        find("tests.layers:nothing")


def compiled_step() -> None:
    """A step that the command can report on: it runs what it has compiled."""
    layer = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    layer(torch.ones(6, D)).sum().backward()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("target", "reads"), [("tests.compile.test_report:compiled_step", 1), ("the demo's step", 4)])
def test_the_command_reports_one_graph_and_the_read_of_each_layer(target: str, reads: int) -> None:
    """Without a target it takes the demo's step, whose 4 layers share a graph."""
    command = [sys.executable, "-m", "moecomm.compile.report", "--json", *([target] if ":" in target else [])]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["graphs"], found["breaks"], found["recompiles"]) == (1, [], [])
    assert [sync["op"] for sync in found["compiled"]["syncs"]] == ["plan_sizes"] * reads
