"""The demo's command line: what can be chosen, what it must fit, and nothing else."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from tutorials.demo.model import Shape
from tutorials.demo.splits import default_ep, misfits, nearest


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked against each other; argparse's own message and exit where they do not fit."""
    parser = argparse.ArgumentParser(
        prog="make demo",
        description="Train a byte-level Mixture-of-Experts transformer with moecomm on several processes.",
        epilog="--pp * --tp must divide --ranks, and what is left is data-parallel; --ep * --etp must divide --ranks / --pp.",
    )
    parser.add_argument(
        "--ranks", type=int, default=int(os.environ["WORLD_SIZE"]) if under_torchrun() else 4,
        help="processes (on --device cuda: one a GPU); default 4, and under torchrun what it started",
    )  # fmt: skip
    parser.add_argument("--pp", type=int, default=1, help="stages of a pipeline, which the layers are divided between; default %(default)s")
    parser.add_argument(
        "--tp", type=int, default=1,
        help="ranks that the heads of the attention are split over, and all else by the length of the sequences; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--ep", type=int,
        help="ranks that the experts are spread over; default 2, or 1 where a stage has an odd number. Under torchrun, which may come back "
        "with fewer ranks, as many of these as divide those of a stage",
    )  # fmt: skip
    parser.add_argument("--etp", type=int, default=1, help="ranks that each expert's hidden dim is split over; default %(default)s")
    parser.add_argument(
        "--slice", action="store_true",
        help="all --tp ranks have the whole sequences, and slice them for the experts alone",
    )  # fmt: skip
    parser.add_argument("--experts", type=int, default=8, help="experts a layer; default %(default)s")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token; default %(default)s")
    parser.add_argument("--shared", type=int, default=0, help="hidden dim of an expert that all tokens go through; default: none")
    parser.add_argument("--data", type=Path, help="a text file, or a folder of them; default: the sources of Python's standard library")
    parser.add_argument("--steps", type=int, default=240, help="training steps; default %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, of all ranks together; default %(default)s")
    parser.add_argument("--save-every", type=int, default=80, help="steps from checkpoint to checkpoint; default %(default)s")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest complete checkpoint in --out; under torchrun, wherever there is one"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly, without torch.compile")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the computation; the parameters stay float32; default: bfloat16, except on a CPU without it, with --no-compile",
    )  # fmt: skip
    parser.add_argument("--sample", type=int, default=160, help="bytes of text that the trained model writes; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters, the batches and the sample; default %(default)s")
    parser.add_argument("--profile", action="store_true", help="write what each rank does in the last step: --out/trace_0.json, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where plots and checkpoints go; default %(default)s")
    options = parser.parse_args(arguments)
    for name in ("ranks", "pp", "tp", "ep", "etp", "experts", "top_k", "steps", "batch", "save_every"):
        if (size := getattr(options, name)) is not None and size < 1:
            parser.error(f"--{name.replace('_', '-')} was {size}; it must be at least 1")
    ep_by_default = options.ep is None
    if ep_by_default:
        options.ep = default_ep(options)
    elif under_torchrun():
        options.ep = math.gcd(options.ep, max(1, options.ranks // (options.pp * options.etp)))
    if under_torchrun() and options.ranks != int(os.environ["WORLD_SIZE"]):
        parser.error(f"--ranks was {options.ranks}; under torchrun it must be left out, or what was started: {os.environ['WORLD_SIZE']}")
    shape = shape_of(options)
    if misfit := next(misfits(options, shape), None):
        instead = " or ".join(f"`{change}`" for change in nearest(options, shape, ep_by_default))
        parser.error(f"{misfit}: the nearest that fit are {instead}")
    if options.shared < 0:
        parser.error(f"--shared was {options.shared}; it must be at least 0")
    if options.data is not None and not options.data.exists():
        parser.error(f"--data was {options.data}; it must be a file or a folder that exists")
    if options.compile and options.dtype == "float32":
        parser.error("--dtype was float32; it must be bfloat16 but with --no-compile: torch traces grouped_mm in bfloat16 alone")
    return options


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def shape_of(options: argparse.Namespace) -> Shape:
    return Shape(experts=options.experts, top_k=options.top_k, shared=options.shared)
