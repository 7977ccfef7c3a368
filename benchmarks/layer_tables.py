"""Does `benchmarks.layer` meet its targets? Its tables: the targets first, then all measurements, and the CPU time of a step."""

from __future__ import annotations

from benchmarks.tables import SETTINGS, found, ran, sized, spread, table, verdict
from benchmarks.timing import WARM, Line

DTYPES = ("float32", "bfloat16")
FASTER = {8: 2.5, 4: 1.8, 2: 1.3, 1: 1.0}  # what a layer's step is to be over the K-fold exchange, with warm memory
PLAN, METADATA, PEAK = 0.15, 0.02, 0.6  # at most: of exchange and permute, of all bytes, of the K-fold exchange's memory at K = 8


def layer(results: Line) -> str:
    lines = results["lines"]
    parts = [ran(results["about"])]
    if found(lines, what="4 ranks"):
        parts += ["#### Targets", targets(lines), "#### One step on 4 gloo ranks", ranks(lines)]
    parts += ["#### One step on one process", one(lines)]
    if found(lines, what="bytes"):
        parts += ["#### Bytes and memory of one step on 4 ranks", amounts(lines)]
    return "\n\n".join([*parts, "#### Tiny sizes (forward) and threads", small(lines)])


def targets(lines: list[Line]) -> str:
    warm = {"what": "4 ranks", "memory": WARM}
    rows = [
        [f"speed-up over `k_fold`, K = {k}, warm", f">= {least}x"]
        + [judged(found(lines, case="k_fold", dtype=dtype, k=k, **warm), least=least) for dtype in DTYPES]
        for k, least in FASTER.items()
    ]
    plan = [judged(found(lines, case="plan", dtype=dtype, **warm), most=PLAN) for dtype in DTYPES]
    metadata = [judged(found(lines, case="metadata", dtype=dtype), most=METADATA) for dtype in DTYPES]
    peak = [judged(found(lines, what="peak memory", to="k_fold", dtype=dtype, k=8, ranks=4), most=PEAK) for dtype in DTYPES]
    rows.append(["plan / dispatch and combine, forward, largest over K, warm", f"<= {PLAN:.0%}", *plan])
    rows.append(["metadata / all bytes sent, largest over K", f"< {METADATA:.0%}", *metadata])
    rows.append(["peak memory / peak memory of `k_fold`, K = 8", f"<= {PEAK}x", *peak])
    return table(["measure", "target", *DTYPES], rows)


def judged(lines: list[Line], least: float | None = None, most: float | None = None) -> str:
    """The worst of the lines, and whether it is within the bound."""
    if least is not None:
        ratio = min(line["ratio"] for line in lines)
        return f"{ratio:.2f}x: {verdict(ratio >= least)}"
    ratio = max(line["ratio"] for line in lines)
    shown = f"{ratio:.2f}x" if most == PEAK else f"{ratio:.1%}"
    return f"{shown}: {verdict(ratio <= (most or 0))}"


def ranks(lines: list[Line]) -> str:
    header = [
        "memory",
        "dtype",
        "K",
        "`k_fold` / moecomm",
        "`by_expert` / moecomm",
        "moecomm / floor",
        "plan / dispatch and combine, forward",
        "moecomm, ms",
    ]
    rows = []
    for memory in SETTINGS:
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
            " / ".join(f"{ms:.1f}" for ms in line["milliseconds"]),
            sized(line),
        ]
        for line in found(lines, what="1 process")
    ]
    return table(["memory", "dtype", "comparison", "time ratio", "ms", "sizes"], rows)


def amounts(lines: list[Line]) -> str:
    rows = []
    for dtype in DTYPES:
        for k in sorted(FASTER):
            sent, metadata = found(lines, what="bytes", dtype=dtype, k=k)
            (peak,) = found(lines, what="peak memory", dtype=dtype, k=k, ranks=4)
            millions = " / ".join(f"{amount / 2**20:.0f}" for amount in peak["amounts"])
            rows.append([dtype, str(k), f"{sent['ratio']:.3f}", f"{metadata['ratio']:.2%}", f"{peak['ratio']:.2f}", millions])
    return table(
        ["dtype", "K", "bytes, moecomm / `k_fold`", "metadata", "peak memory, moecomm / `k_fold`", "MiB per rank, moecomm / `k_fold`"], rows
    )


def small(lines: list[Line]) -> str:
    rows = [
        [
            line["what"],
            line["memory"],
            f"{line['case']} / {line['to']}",
            spread(line),
            " / ".join(f"{1e3 * ms:.0f}" for ms in line["milliseconds"]),
        ]
        for line in lines
        if line["what"].startswith(("tiny", "threads"))
    ]
    return table(["case", "memory", "comparison", "time ratio", "microseconds"], rows)


def titan(results: Line) -> str:
    rows = []
    for line in results["lines"]:
        times = " / ".join(f"{ms:.0f}" for ms in line["milliseconds"])
        rows.append([line["memory"], line["what"], line["dtype"], str(line["k"]), spread(line), times])
    return ran(results["about"]) + "\n\n" + table(["memory", "experts", "dtype", "K", "torchtitan / moecomm", "ms"], rows)


def cpu_time(results: Line) -> str:
    rows = []
    for whole in found(results["lines"], case="k_fold", to="moecomm"):
        alike = {key: whole[key] for key in ("memory", "dtype", "k")}
        for way, seconds in zip(("k_fold", "moecomm"), whole["amounts"], strict=True):
            parts = ", ".join(f"{line['case']} {line['ratio']:.0%}" for line in found(results["lines"], way=way, **alike))
            ratio = f"{whole['ratio']:.2f}" if way == "moecomm" else ""
            rows.append([*map(str, alike.values()), way, f"{1e3 * seconds:.1f}", ratio, parts])
    header = ["memory", "dtype", "K", "method", "CPU ms per rank", "`k_fold` / moecomm", "share of the CPU time"]
    return ran(results["about"]) + "\n\n" + table(header, rows)
