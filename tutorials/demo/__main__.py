"""Start the demo: `make demo`, `python -m tutorials.demo --help`, or

    torchrun --nproc-per-node 4 --max-restarts 2 -m tutorials.demo

The first two start the ranks from here. Under torchrun, this process is one of the ranks. When a rank is lost, torchrun starts all ranks
again. They then continue from the newest complete checkpoint in --out.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from tutorials.demo import launch
from tutorials.demo.options import parse, under_torchrun


def main() -> int:
    options = parse()
    check_machine(options)
    arguments = sys.argv[1:]
    if options.compile and not can_compile(options):
        print("torch.compile's Inductor finds no working C++ compiler: the graphs run with backend aot_eager instead")
        options.backend, arguments = "aot_eager", [*arguments, "--backend", "aot_eager"]
    if under_torchrun():
        from tutorials.demo import train  # and pipelining, FSDP2 and matplotlib, which the launcher need not wait for

        train.main(options)
        return 0
    if not options.resume:
        shutil.rmtree(options.out / "checkpoints", ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        stop = Path(folder) / "stop"
        return launch.wait(launch.start(options.ranks, arguments, environment(options) | {launch.STOP_FILE: str(stop)}), stop)


def check_machine(options: Namespace) -> None:
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks and not under_torchrun():
        sys.exit(f"--ranks was {options.ranks}; with --device cuda it must be at most the number of GPUs, {torch.cuda.device_count()}")
    if options.resume:
        from tutorials.demo.checkpoint import complete  # and torch's distributed checkpoints, which the launcher needs only here

        if not complete(options.out / "checkpoints"):
            sys.exit(f"--resume: there is no complete checkpoint in {options.out}/checkpoints")


def can_compile(options: Namespace) -> bool:
    """Whether Inductor can compile for the device. On a CPU it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=options.backend)(torch.ones(8, device=options.device))
    except Exception:
        return False
    return True


def environment(options: Namespace) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.ranks)),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # the ranks already fill the cores
    }


if __name__ == "__main__":
    sys.exit(main())
