"""The demo's command line: its options, and the checks that they fit each other."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from tutorials.demo.model import Shape
from tutorials.demo.splits import default_ep, misfits, nearest


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options, checked against each other. If they do not fit, argparse prints a message and exits."""
    parser = argparse.ArgumentParser(
        prog="make demo",
        description="Train a byte-level Mixture-of-Experts transformer with moecomm on several processes.",
        epilog="--pp * --tp must divide --ranks; the rest is data-parallel. --ep * --etp must divide --ranks / --pp.",
    )
    parser.add_argument(
        "--ranks", type=int, default=int(os.environ["WORLD_SIZE"]) if under_torchrun() else 4,
        help="processes (with --device cuda, one per GPU); default 4; under torchrun, as many as it started",
    )  # fmt: skip
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages, which divide the layers; default %(default)s")
    parser.add_argument(
        "--tp", type=int, default=1,
        help="ranks that split the attention heads; they split all else along the sequences; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--ep", type=int,
        help="ranks that the experts are spread over; default 2, or 1 if a stage has an odd number of ranks. torchrun may restart with "
        "fewer ranks: then only as many as divide the ranks of a stage",
    )  # fmt: skip
    parser.add_argument("--etp", type=int, default=1, help="ranks that split each expert's hidden dim; default %(default)s")
    parser.add_argument(
        "--split", choices=("auto",),
        help="auto: measure this machine for some seconds, and take the --pp, --tp, --ep and --etp that are predicted to be fastest",
    )  # fmt: skip
    parser.add_argument(
        "--slice", action="store_true",
        help="all --tp ranks have the whole sequences, and slice them only for the experts",
    )  # fmt: skip
    parser.add_argument("--experts", type=int, default=8, help="experts per layer; default %(default)s")
    parser.add_argument("--top-k", type=int, default=2, help="experts per token; default %(default)s")
    parser.add_argument("--shared", type=int, default=0, help="hidden dim of a shared expert, which all tokens go through; default: none")
    parser.add_argument("--data", type=Path, help="a text file, or a folder of them; default: the sources of Python's standard library")
    parser.add_argument("--steps", type=int, default=240, help="training steps; default %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step, over all ranks; default %(default)s")
    parser.add_argument("--save-every", type=int, default=80, help="steps between checkpoints; default %(default)s")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest complete checkpoint in --out; under torchrun, always if there is one",
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly, without torch.compile")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile; default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to train on; default %(default)s")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="dtype of the computation; parameters stay float32; default: bfloat16, except with --no-compile on a CPU without it",
    )  # fmt: skip
    parser.add_argument("--sample", type=int, default=160, help="bytes of text that the trained model writes; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the parameters, the batches and the sample; default %(default)s")
    parser.add_argument("--profile", action="store_true", help="write a trace of each rank in the last step: --out/trace_0.json, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where plots and checkpoints go; default %(default)s")
    options = parser.parse_args(arguments)
    for name in ("ranks", "pp", "tp", "ep", "etp", "experts", "top_k", "steps", "batch", "save_every"):
        if (size := getattr(options, name)) is not None and size < 1:
            parser.error(f"--{name.replace('_', '-')} was {size}; it must be at least 1")
    if options.split and (options.slice or [options.pp, options.tp, options.ep, options.etp] != [1, 1, None, 1]):
        parser.error("--split was auto; it must be without --pp, --tp, --ep, --etp and --slice, which it chooses")
    ep_by_default = options.ep is None
    if ep_by_default:
        options.ep = default_ep(options)
    elif under_torchrun():
        options.ep = math.gcd(options.ep, max(1, options.ranks // (options.pp * options.etp)))
    if under_torchrun() and options.ranks != int(os.environ["WORLD_SIZE"]):
        parser.error(f"--ranks was {options.ranks}; under torchrun, leave it out or pass the started number: {os.environ['WORLD_SIZE']}")
    shape = shape_of(options)
    if options.split:
        options.ep = 1  # until it is chosen; one rank with all experts fits if anything does
    if misfit := next(misfits(options, shape), None):
        instead = " or ".join(f"`{change}`" for change in nearest(options, shape, ep_by_default))
        parser.error(f"{misfit}: the nearest that fit are {instead}")
    if options.shared < 0:
        parser.error(f"--shared was {options.shared}; it must be at least 0")
    if options.data is not None and not options.data.exists():
        parser.error(f"--data was {options.data}; it must be a file or a folder that exists")
    if options.compile and options.dtype == "float32":
        parser.error("--dtype was float32; it must be bfloat16, except with --no-compile: torch traces grouped_mm only in bfloat16")
    return options


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def shape_of(options: argparse.Namespace) -> Shape:
    return Shape(experts=options.experts, top_k=options.top_k, shared=options.shared)
