"""The Triton kernels are written once: they compile for NVIDIA and for AMD, of which this machine need have neither."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LOCAL_OPS = (
    "routing/choose_experts",
    "routing/count_pairs",
    "routing/slots_with_counts",
    "routing/drop_overflow",
    "routing/slot_bytes",
    "routing/place_slots",
    "routing/counting_sort",
    "rows/gather",
    "rows/weighted_sum",
    "rows/weighted_sum_backward",
    "rows/rank_sum",
    "rows/quantize",
    "rows/dequantize",
)


HOPPER, MI300 = ("cuda", "90", "32"), ("hip", "gfx942", "64")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [HOPPER, *(pytest.param(more, marks=pytest.mark.exhaustive) for more in (MI300, (*HOPPER, "all"), (*MI300, "all")))],
    ids=" ".join,
)
def test_every_kernel_compiles(arguments: tuple[str, ...], tmp_path: Path) -> None:
    kernels = {name for op in LOCAL_OPS for name in re.findall(r"@jit.*\ndef (\w+_kernel)", (ROOT / "ops" / f"{op}.py").read_text())}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.ops.targets", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == kernels
