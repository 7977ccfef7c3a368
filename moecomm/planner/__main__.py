"""Print which splits of a cluster train a model fastest:

python -m moecomm.planner --config config.json --cluster h100 --nodes 8
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from moecomm.planner.cluster import PRESETS
from moecomm.planner.model import parameters, read_config
from moecomm.planner.search import search


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and the `moe_mesh` call of the fastest split. Returns 1 if nothing fits."""
    parser = argparse.ArgumentParser(prog="python -m moecomm.planner", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--config", type=Path, required=True, help="Hugging Face's config.json of a Mixtral, Qwen3-MoE, DeepSeek-V3 or gpt-oss"
    )
    parser.add_argument("--cluster", choices=PRESETS, default="h100", help="the kind of node; default %(default)s")
    parser.add_argument("--nodes", type=int, default=1, help="nodes; default %(default)s")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens of a sequence; default %(default)s")
    parser.add_argument("--batch", type=int, default=1024, help="sequences of a step, over all ranks; default %(default)s")
    parser.add_argument("--loads", type=Path, help="a .npy file: slots of each expert, [layers, E] or [snapshots, layers, E]")
    parser.add_argument("--plot", type=Path, help="draw time against memory into this file")
    parser.add_argument("--json", type=Path, help="write the whole table into this file")
    options = parser.parse_args(arguments)
    for name in ("nodes", "sequence", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} was {getattr(options, name)}; it must be at least 1")
    try:
        model = read_config(options.config, options.sequence, options.batch)
        cluster = PRESETS[options.cluster]
        loads = None if options.loads is None else np.load(options.loads)
        table = search(model, cluster, loads, ranks=options.nodes * cluster.node)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    counts = parameters(model)
    print(f"{counts.total(model) / 1e9:.1f} billion parameters, {counts.active(model) / 1e9:.1f} active")
    print(table)
    if options.plot:
        table.plot(options.plot)
    if options.json:
        options.json.write_text(json.dumps(table.to_dict()))
    if not table.rows:
        return 1
    best = table.rows[0]
    way = best.way.to_dict()
    print(
        f"\nthe fastest, with {way['microbatches']} microbatches, wire {way['wire']}, a {way['plan']} plan, recompute {way['recompute']}:"
    )
    print(f"mesh = {best.split.call()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
