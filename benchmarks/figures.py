"""The lines of `benchmarks.layer` as JSON, as the tables in docs/benchmarks.md, and as its picture.

python -m benchmarks.figures           # the tables and the picture anew, from the committed lines
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
START, END = "<!-- figures -->", "<!-- end of figures -->"
DTYPES, SETTINGS = ("float32", "bfloat16"), ("warm", "as installed")
FASTER = {8: 2.5, 4: 1.8, 2: 1.3, 1: 1.0}  # what a layer's step is to be over the K-fold exchange, with warm memory
PLAN, METADATA, PEAK = 0.15, 0.02, 0.6  # at most: of exchange and permute, of all bytes, of the K-fold exchange's memory at K = 8
Line = dict[str, Any]


def main() -> None:
    file = Path(__file__).parent / "results" / "layer_cpu.json"
    write(json.loads(file.read_text()), file)


def write(results: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(results, indent=1) + "\n")
    if file.name != "layer_cpu.json":
        return
    document = DOCS / "benchmarks.md"
    before, rest = document.read_text().split(START)
    after = rest.split(END)[1]
    document.write_text(f"{before}{START}\n\n{tables(results)}\n{END}{after}")
    draw(results["lines"], DOCS / "benchmarks.png")


def tables(results: dict[str, Any]) -> str:
    lines, about = results["lines"], results["about"]
    versions = f"torch {about['torch']}, Python {about['python']}"
    load = f"load average before the run {about['load before']:.1f}"
    ran = f"{about['device']}; {versions}; {load}. Medians of {about['repeats']} repeats, quartiles in parentheses."
    parts = [ran, "### Against the targets", targets(lines), "### 4 gloo ranks, a step", ranks(lines), "![ratios over K](benchmarks.png)"]
    parts += ["### One process, a step, K = 8", one(lines), "### Bytes and memory on 4 ranks, a step", amounts(lines)]
    parts += ["### At tiny sizes, forward", tiny(lines)]
    return "\n\n".join(parts) + "\n"


def found(lines: list[Line], **values: Any) -> list[Line]:
    return [line for line in lines if all(line.get(key) == value for key, value in values.items())]


def targets(lines: list[Line]) -> str:
    warm = {"what": "4 ranks", "memory": "warm"}
    rows = [
        [f"faster than `k_fold`, K = {k}, warm", f">= {least}x"]
        + [judged(found(lines, case="k_fold", dtype=dtype, k=k, **warm), least=least) for dtype in DTYPES]
        for k, least in FASTER.items()
    ]
    plan = [judged(found(lines, case="plan", dtype=dtype, **warm), most=PLAN) for dtype in DTYPES]
    metadata = [judged(found(lines, case="metadata", dtype=dtype), most=METADATA) for dtype in DTYPES]
    peak = [judged(found(lines, what="peak memory", to="k_fold", dtype=dtype, k=8, ranks=4), most=PEAK) for dtype in DTYPES]
    rows.append(["plan of dispatch and combine forward, the largest over K, warm", f"<= {PLAN:.0%}", *plan])
    rows.append(["metadata of all bytes sent, the largest over K", f"< {METADATA:.0%}", *metadata])
    rows.append(["peak memory of `k_fold`'s, K = 8", f"<= {PEAK}x", *peak])
    return table(["", "target", *DTYPES], rows)


def judged(lines: list[Line], least: float | None = None, most: float | None = None) -> str:
    """The worst of the lines, and whether it is within the bound."""
    if least is not None:
        ratio = min(line["ratio"] for line in lines)
        return f"{ratio:.2f}x: {'met' if ratio >= least else '**not met**'}"
    ratio = max(line["ratio"] for line in lines)
    shown = f"{ratio:.2f}x" if most == PEAK else f"{ratio:.1%}"
    return f"{shown}: {'met' if ratio <= (most or 0) else '**not met**'}"


def settings(lines: list[Line]) -> list[str]:
    return [memory for memory in SETTINGS if found(lines, what="4 ranks", memory=memory)]


def ranks(lines: list[Line]) -> str:
    header = ["memory", "dtype", "K", "`k_fold` / moecomm", "`by_expert` / moecomm", "moecomm / floor", "plan / forward", "moecomm, ms"]
    rows = []
    for memory in settings(lines):
        for dtype in DTYPES:
            for k in sorted(FASTER):
                here = found(lines, what="4 ranks", memory=memory, dtype=dtype, k=k)
                each = {line["case"]: line for line in here}
                ratios = [spread(each[case]) for case in ("k_fold", "by_expert", "moecomm", "plan")]
                rows.append([memory, dtype, str(k), *ratios, f"{each['moecomm']['milliseconds'][0]:.0f}"])
    return table(header, rows)


def one(lines: list[Line]) -> str:
    rows = [
        [
            line["memory"],
            line["dtype"],
            f"`{line['case']}` / {line['to']}",
            spread(line),
            " / ".join(f"{ms:.0f}" for ms in line["milliseconds"]),
        ]
        for memory in settings(lines)
        for line in found(lines, what="1 process", memory=memory)
    ]
    return table(["memory", "dtype", "", "ratio", "ms"], rows)


def amounts(lines: list[Line]) -> str:
    rows = []
    for dtype in DTYPES:
        for k in sorted(FASTER):
            sent, metadata = found(lines, what="bytes", dtype=dtype, k=k)
            (peak,) = found(lines, what="peak memory", dtype=dtype, k=k, ranks=4)
            millions = " / ".join(f"{amount / 2**20:.0f}" for amount in peak["amounts"])
            rows.append([dtype, str(k), f"{sent['ratio']:.3f}", f"{metadata['ratio']:.2%}", f"{peak['ratio']:.2f}", millions])
    return table(["dtype", "K", "bytes, moecomm / `k_fold`", "metadata", "peak memory, moecomm / `k_fold`", "MiB a rank"], rows)


def tiny(lines: list[Line]) -> str:
    rows = [
        [
            line["what"].removeprefix("tiny, "),
            f"moecomm / {line['to']}",
            spread(line),
            " / ".join(f"{1e3 * ms:.0f}" for ms in line["milliseconds"]),
        ]
        for line in lines
        if line["what"].startswith("tiny")
    ]
    return table(["", "", "ratio", "microseconds"], rows)


def times(line: Line, scale: float) -> str:
    return " / ".join(f"{scale * milliseconds:.0f}" for milliseconds in line["milliseconds"])


def spread(line: Line) -> str:
    digits = 3 if line["ratio"] < 0.2 else 2
    return f"{line['ratio']:.{digits}f} ({line['low']:.{digits}f} to {line['high']:.{digits}f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def draw(lines: list[Line], picture: Path) -> None:
    """How many times faster a step is than each peer's, over K."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 3.6))
    for axis, dtype in zip(axes, DTYPES, strict=True):
        for case, color in (("k_fold", "tab:blue"), ("by_expert", "tab:orange")):
            for memory, style in zip(settings(lines), ("-", ":"), strict=False):
                here = sorted(found(lines, what="4 ranks", memory=memory, dtype=dtype, case=case), key=lambda line: line["k"])
                middle = [line["ratio"] for line in here]
                around = [[line["ratio"] - line["low"] for line in here], [line["high"] - line["ratio"] for line in here]]
                axis.errorbar(
                    [line["k"] for line in here],
                    middle,
                    around,
                    color=color,
                    linestyle=style,
                    marker="o",
                    capsize=3,
                    label=f"{case}, {memory}",
                )
        axis.plot(sorted(FASTER), [FASTER[k] for k in sorted(FASTER)], color="gray", linestyle="--", label="target, to k_fold")
        axis.axhline(1, color="lightgray", zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(FASTER), [str(k) for k in sorted(FASTER)])
        axis.set_xlabel("K, experts a token")
        axis.set_title(f"{dtype}, 4 gloo ranks, forward and backward", fontsize=9)
    axes[0].set_ylabel("time / moecomm's")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
