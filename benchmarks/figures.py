"""Writes the tables and pictures of docs/benchmarks.md from the committed results in `benchmarks/results/`. It measures nothing.

python -m benchmarks.figures
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import layer_tables, pictures, planner_tables, sweep_tables, tables
from benchmarks.timing import RESULTS, Line

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
START, END = "<!-- figures -->", "<!-- end of figures -->"
SECTIONS: dict[str, tuple[str, Callable[[Line], str]]] = {
    "layer": ("A layer compared with other methods", layer_tables.layer),
    "titan": ("Beside torchtitan's own dispatcher", layer_tables.titan),
    "cpu_time": ("CPU time of one step", layer_tables.cpu_time),
    "floors": ("Each op compared with a copy of its rows", tables.floors),
    "host": ("Host time of eager calls", tables.host),
    "experts": ("A layer with experts", tables.experts),
    "kept": ("What a layer keeps for its backward pass", tables.kept),
    "sweep": ("How the cost grows with each variable", sweep_tables.sweep),
    "links": ("The exchange model: predicted and measured", tables.links),
    "planner": ("The planner: predicted and measured splits", planner_tables.planner),
    "placement": ("Experts that move as loads change", tables.placement),
}
DRAWN: dict[str, Callable[[Line, Path], None]] = {
    "layer": pictures.layer,
    "sweep": pictures.sweep,
    "links": pictures.links,
    "planner": pictures.planner,
    "placement": pictures.placement,
}
DEVICES = {"cpu": "On CPUs", "cuda": "On a GPU: all tables"}


def main() -> None:
    before, rest = DOCUMENT.read_text().split(START)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{START}\n\n{figures()}\n{END}{after}")
    for device in DEVICES:
        for name, draw in DRAWN.items():
            results = read(name, device)
            if results and (name, device) != ("layer", "cuda"):  # which has no ranks to draw
                draw(results, RESULTS / f"{name}_{device}.png")


def figures() -> str:
    """What stands between the markers."""
    parts = []
    for device, title in DEVICES.items():
        there = {name: results for name in SECTIONS if (results := read(name, device))}
        if there:
            parts.append(f"## {title}")
        for name, results in there.items():
            heading, write = SECTIONS[name]
            parts += [f"### {heading}", write(results)]
            if name in DRAWN and (name, device) != ("layer", "cuda"):
                parts.append(f"![{heading}](../benchmarks/results/{name}_{device}.png)")
    return "\n\n".join(parts) + "\n"


def read(name: str, device: str) -> Line | None:
    file = RESULTS / f"{name}_{device}.json"
    return json.loads(file.read_text()) if file.exists() else None


if __name__ == "__main__":
    main()
