"""Starts the ranks with torchrun and ends them well: `python -m tutorials.demo --help`, or `make demo`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from tutorials.demo.checkpoint import complete
from tutorials.demo.options import parse
from tutorials.demo.train import STOP_FILE

INTERRUPTED = 128 + signal.SIGINT


def main() -> int:
    options = parse()
    check_machine(options)
    arguments = sys.argv[1:]
    if options.compile and not can_compile(options):
        print("no working C++ compiler for torch.compile's Inductor: the graphs run with backend aot_eager instead")
        arguments = [*arguments, "--backend", "aot_eager"]
    if not options.resume:
        shutil.rmtree(options.out / "checkpoints", ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        stop = Path(folder) / "stop"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        command += ["-m", "tutorials.demo.train", *arguments]
        # A session of its own: Ctrl-C reaches this process alone, which asks the ranks to save and leave.
        ranks = subprocess.Popen(command, env=environment(options) | {STOP_FILE: str(stop)}, start_new_session=True)
        return wait(ranks, stop)


def check_machine(options: Namespace) -> None:
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks:
        sys.exit(f"--ranks was {options.ranks}; with --device cuda it must be at most the number of GPUs, {torch.cuda.device_count()}")
    if options.resume and not complete(options.out / "checkpoints"):
        sys.exit(f"--resume: there is no complete checkpoint in {options.out}/checkpoints")


def can_compile(options: Namespace) -> bool:
    """Whether Inductor can compile for the device: on a CPU it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=options.backend)(torch.ones(8, device=options.device))
    except Exception:
        return False
    return True


def environment(options: Namespace) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.ranks)),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # the ranks already fill the cores
    }


def wait(ranks: subprocess.Popen[bytes], stop: Path) -> int:
    """The ranks' exit code; the first SIGINT or SIGTERM asks them to stop, the second ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return ranks.wait()
    except KeyboardInterrupt:
        print("\nstopping after this step, with a checkpoint; once more ends at once", flush=True)
        stop.touch()
    try:
        return ranks.wait() or INTERRUPTED
    except KeyboardInterrupt:
        ranks.kill()  # the ranks leave with it
        ranks.wait()
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
