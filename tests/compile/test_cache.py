"""The compile cache: what one process has compiled, the next one loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WARM = """
import os, sys, json, torch, torch.compiler.config, torch.distributed as dist
from torch._dynamo.utils import counters
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
torch.compiler.config.cache_key_tag += os.environ.get("RANK", "0")  # no rank finds what another one has compiled
import moecomm.functional as mf
def layer(x, logits):
    weights, experts = mf.route(logits, 2)
    plan = mf.plan(experts, weights, 8, like=x)
    return mf.combine(mf.dispatch(x, plan), plan)
torch.manual_seed(0)
x, logits = (torch.randn(shape, requires_grad=True) for shape in ((6, 16), (6, 8)))
torch.compile(layer, fullgraph=True)(x, logits).sum().backward()
found = counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"], x.grad.sum().item()
print("found", json.dumps(found))
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_second_process_takes_forward_and_backward_from_the_compile_cache(ranks: int, tmp_path: Path) -> None:
    (tmp_path / "layer.py").write_text(WARM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    # Graphs of a tag that nobody else has are in no cache. The kernels in them, which it does not matter for, may be.
    environment = os.environ | {"TORCH_COMPILE_CACHE_KEY_TAG": uuid.uuid4().hex, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(2):
        command = [sys.executable, *launcher, str(tmp_path / "layer.py")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        runs.append(sorted(json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("found ")))
    cold, warm = runs
    assert [(hits, misses) for hits, misses, _ in cold] == [(0, 1)] * ranks
    assert [(hits, misses) for hits, misses, _ in warm] == [(1, 0)] * ranks
    assert [grad for *_, grad in cold] == [grad for *_, grad in warm]
