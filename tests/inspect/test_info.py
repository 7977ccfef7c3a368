"""`python -m moecomm.info`: what a bug report needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from moecomm import info

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_prints_what_is_installed_and_what_a_tensor_takes() -> None:
    command = [sys.executable, "-m", "moecomm.info", "--json"]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout)
    assert found["torch"].startswith(torch.__version__)
    assert found["numpy"] == version("numpy")
    assert "gloo" in found["backends"]
    assert "Triton" in found["CUDA tensors take"]


def test_the_tested_range_is_from_what_the_package_demands_to_what_constraints_pin() -> None:
    demanded, pinned = (ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text()
    for package, (oldest, newest) in info.TESTED.items():
        assert f'"{package}>={oldest}' in demanded
        [pin] = re.findall(rf"^{package}==(\d+\.\d+)", pinned, re.MULTILINE)
        assert pin == newest


@pytest.mark.parametrize(
    ("found", "tested"), [("2.10.1", False), ("2.11.0", True), ("2.13.0+cpu", True), ("2.14.0a0", False), ("3.0", False)]
)
def test_a_version_outside_of_it_says_so(found: str, tested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "version", lambda package: found)
    assert ("not tested" in info.environment()["torch"]) is not tested
