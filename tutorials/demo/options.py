"""The demo's command line: what can be chosen, what it must fit, and nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked against each other; argparse's own message and exit where they do not fit."""
    parser = argparse.ArgumentParser(
        prog="make demo",
        description="Train a byte-level Mixture-of-Experts transformer with moecomm on several processes.",
    )
    parser.add_argument("--ranks", type=int, default=4, help="processes (on --device cuda: one a GPU); default %(default)s")
    parser.add_argument("--ep", type=int, help="ranks that the experts are spread over; a divisor of --ranks; default 2, or 1 for one rank")
    parser.add_argument("--experts", type=int, default=8, help="experts a layer; a multiple of --ep; default %(default)s")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token; default %(default)s")
    parser.add_argument("--data", type=Path, help="a text file, or a folder of them; default: the sources of Python's standard library")
    parser.add_argument("--steps", type=int, default=240, help="training steps; default %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, of all ranks together; default %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in --out")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly, without torch.compile")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the computation; the parameters stay float32; default: bfloat16, except on a CPU without it, with --no-compile",
    )  # fmt: skip
    parser.add_argument("--sample", type=int, default=160, help="bytes of text that the trained model writes; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters, the batches and the sample; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where plots and checkpoints go; default %(default)s")
    options = parser.parse_args(arguments)
    if options.ep is None:
        options.ep = 2 if options.ranks % 2 == 0 else 1
    for name in ("ranks", "ep", "experts", "top_k", "steps", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} was {getattr(options, name)}; it must be at least 1")
    for name, of in (("ranks", "ep"), ("experts", "ep"), ("batch", "ranks")):
        if getattr(options, name) % getattr(options, of):
            parser.error(f"--{name} was {getattr(options, name)}; it must be a multiple of --{of}, {getattr(options, of)}")
    if options.top_k > options.experts:
        parser.error(f"--top-k was {options.top_k}; it must be at most --experts, {options.experts}")
    if options.data is not None and not options.data.exists():
        parser.error(f"--data was {options.data}; it must be a file or a folder that exists")
    if options.compile and options.dtype == "float32":
        parser.error("--dtype was float32; it must be bfloat16 but with --no-compile: torch traces grouped_mm in bfloat16 alone")
    return options
