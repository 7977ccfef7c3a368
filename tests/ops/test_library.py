"""Compiled graphs in torch's cache are those of the ops as they are, not of an earlier moecomm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
COMPILED = """
import torch
import moecomm.functional as mf
x, loss = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
torch.compile(lambda x, loss: mf.attach_loss(x, 2 * loss, 0.5).sum(), fullgraph=True)(x, loss).backward()
print(loss.grad.item(), torch.compiler.config.cache_key_tag)
"""


@pytest.mark.slow
def test_an_op_whose_backward_has_changed_is_compiled_anew(tmp_path: Path) -> None:
    for folder, inside in (("moecomm", "."), ("ops", "ops"), ("compile", "compile")):  # as installed
        shutil.copytree(CHECKOUT / folder, tmp_path / "moecomm" / inside, dirs_exist_ok=True)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCH_COMPILE_CACHE_KEY_TAG": "mine"}
    source = tmp_path / "moecomm" / "ops" / "attach_loss.py"
    changed = source.read_text().replace("return grad, loss_gradient(", "return grad, 3 * loss_gradient(")
    assert changed != source.read_text()
    tags = []
    for grad in ("1.0", "3.0"):
        done = subprocess.run([sys.executable, "-c", COMPILED], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        found, user, name, checksum = done.stdout.split()
        assert (found, user, name) == (grad, "mine", "moecomm")
        tags.append(checksum)
        source.write_text(changed)
    assert tags[0] != tags[1]
