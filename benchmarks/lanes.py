"""What does each rank compute during an exchange? Draws torch.profiler profiles, one per rank: computation above, exchanges below.

python -m benchmarks.lanes rank0.json rank1.json picture.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXCHANGES = ("messages_exchange", "slots_exchange", "dispatch_exchange", "combine_exchange", "return_exchange", "rows_exchange")
COLORS = {"matmul": "tab:blue", "other": "tab:gray", "exchange": "tab:orange", "wait": "tab:red"}
MATMULS = ("mm", "addmm", "bmm", "_grouped_mm")


def lanes(file: Path) -> list[tuple[str, float, float, str]]:
    """(kind, start, milliseconds, name) of each op that no other op calls; an exchange lasts from its start to its wait's end."""
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("cat") == "cpu_op" and "::" in e["name"]]
    events = [e for e in events if not e["name"].startswith("autograd::")]  # what autograd calls, not that it does
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    began, found, pending = events[0]["ts"], [], []
    ends: dict[Any, float] = {}
    for event in events:
        start, length = (event["ts"] - began) / 1e3, event["dur"] / 1e3
        name = event["name"].split("::")[-1]
        if start < ends.get(event["tid"], -1.0):
            continue
        ends[event["tid"]] = start + length
        if name in EXCHANGES:
            pending.append((name, start))
            found.append(("other", start, length, name))
        elif name == "wait_tensor" and pending:
            name, since = pending.pop(0)  # they are waited for in the order in which they start
            found.append(("exchange", since, start + length - since, name))
            found.append(("wait", start, length, name))
        else:
            found.append(("matmul" if name in MATMULS else "other", start, length, name))
    return found


def draw(files: Sequence[Path], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(len(files), 1, sharex=True, figsize=(10, 1.0 + 1.5 * len(files)), squeeze=False)
    for rank, (file, axis) in enumerate(zip(files, axes[:, 0], strict=True)):
        bars = lanes(file)
        readable = max(start + length for _, start, length, _ in bars) / 20
        for kind, start, length, name in bars:
            height = 0 if kind == "exchange" else 1
            axis.barh(height, length, left=start, height=0.8, color=COLORS[kind], edgecolor="white", linewidth=0.5)
            if kind == "exchange" and length > readable:
                axis.text(
                    start + length / 2,
                    height,
                    name.replace("messages", "counts").removesuffix("_exchange"),
                    ha="center",
                    va="center",
                    fontsize=8,
                )
        axis.set_yticks([0, 1], ["exchange", "compute"])
        axis.set_title(f"rank {rank}", loc="left", fontsize=9)
    axes[-1, 0].set_xlabel("ms")
    names = {"matmul": "matmul", "other": "other op", "wait": "waiting", "exchange": "exchange under way"}
    figure.legend(handles=[Patch(color=COLORS[kind], label=label) for kind, label in names.items()], loc="upper right", ncols=4, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    *profiles, target = map(Path, sys.argv[1:])
    draw(profiles, target)
