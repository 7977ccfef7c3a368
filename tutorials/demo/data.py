"""Text as bytes: the training text, the held-out text, and the two baselines that a model must beat."""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 16  # one of this many files is held out
SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__"}  # not part of the standard library, or mostly tables


class Text(NamedTuple):
    train: Tensor  # [bytes] uint8
    held_out: Tensor  # [bytes] uint8


def read(path: Path | None) -> Text:
    """Read the text of ``path``, a file or a folder. None means Python's standard library. Training never sees held-out files."""
    if path is not None and path.is_file():
        whole = path.read_bytes()
        cut = len(whole) - len(whole) // HELD_OUT  # the end of a single file is held out
        parts = whole[:cut], whole[cut:]
    else:
        root = Path(sysconfig.get_paths()["stdlib"]) if path is None else path
        files = sorted(file for file in root.rglob("*.py" if path is None else "*") if file.is_file())
        files = [file for file in files if path is not None or not SKIPPED & set(file.relative_to(root).parts)]
        held_out = [file for file in files if zlib.crc32(str(file.relative_to(root)).encode()) % HELD_OUT == 0]
        parts = b"".join(_bytes(file) for file in files if file not in set(held_out)), b"".join(_bytes(file) for file in held_out)
    return Text(*(torch.from_numpy(np.frombuffer(bytearray(part), dtype=np.uint8)) for part in parts))


def _bytes(file: Path) -> bytes:
    return file.read_bytes() + b"\n"


def batch(text: Tensor, size: int, length: int, seed: int, step: int) -> Tensor:
    """[size, length + 1] bytes from random places. They depend only on the seed and the step, so a resumed run needs no state for them."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    start = torch.randint(text.numel() - length, (size, 1), generator=generator)
    return text[start + torch.arange(length + 1)]


def windows(text: Tensor, count: int, length: int) -> Tensor:
    """[count, length + 1] bytes from evenly spaced places. The model and the baselines are measured on them."""
    start = torch.linspace(0, text.numel() - length - 1, count).long()
    return text[start[:, None] + torch.arange(length + 1)]


def baselines(train: Tensor, held_out: Tensor) -> tuple[float, float]:
    """Bits per byte of the unigram and the bigram model of ``train``, on the windows ``held_out`` [count, length + 1].

    Both models use add-one smoothing.
    """
    counts = torch.zeros(256, 256, dtype=torch.float64)
    counts += torch.bincount(train[:-1].int() * 256 + train[1:].int(), minlength=65536).view(256, 256)
    unigram = (counts.sum(0) + 1).div(counts.sum() + 256)
    bigram = (counts + 1).div(counts.sum(1, keepdim=True) + 256)
    before, after = held_out[:, :-1].int(), held_out[:, 1:].int()
    return float(-unigram[after].log2().mean()), float(-bigram[before, after].log2().mean())
