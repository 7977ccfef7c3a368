"""The tables of docs/benchmarks.md for ops, the host's time, a layer with experts, and the exchange model; and what all tables share."""

from __future__ import annotations

from typing import Any

from benchmarks.timing import INSTALLED, WARM, Line

SETTINGS = (WARM, INSTALLED)
CPU_BOUNDS = {"gather": 1.0, "weighted_sum": 0.75, "weighted_sum_backward": 2.0}  # at most this many copies, with warm memory
GPU_BOUNDS = {"gather": 0.85, "weighted_sum": 0.8}  # at least this share of a copy's bandwidth
PLAN_ON_GPU = 0.06  # milliseconds at most, in static mode, of the first size
HOST_ON_GPU = {"plan": 120, "dispatch": 45, "combine": 45, "step": 500}  # microseconds at most, on an H100 with idle cores
WHOLE_ON_GPU = 1.15  # at most, of grouped_mm and the copies


def found(lines: list[Line], **values: Any) -> list[Line]:
    return [line for line in lines if all(line.get(key) == value for key, value in values.items())]


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def spread(line: Line) -> str:
    digits = 3 if line["ratio"] < 0.2 else 2
    return f"{line['ratio']:.{digits}f} ({line['low']:.{digits}f} to {line['high']:.{digits}f})"


def verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def ran(about: Line) -> str:
    """On what a run was made, and how long it took."""
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    took = f"run time {about['seconds']:.0f} s, load average before the run {about['load before']:.1f}"
    return f"{about['device']}; Python {about['python']}, {packages}; {took}."


def sized(line: Line) -> str:
    names = {"tokens": "T", "dim": "D", "hidden": "H", "experts": "E", "k": "K"}
    return ", ".join(f"{symbol} = {line[name]}" for name, symbol in names.items() if name in line)


def floors(results: Line) -> str:
    lines, on_gpu = results["lines"], "cuda" in results["about"]["on"]
    parts = [ran(results["about"])]
    rows = []
    for line in found(lines, what="op"):
        bound = CPU_BOUNDS.get(line["case"]) if not on_gpu and line["memory"] == WARM else None
        target = "" if bound is None else f"<= {bound}: {verdict(line['ratio'] <= bound)}"
        rows.append(
            [line["memory"], line["dtype"], f"`{line['case']}`", spread(line), target, f"{1e3 * line['milliseconds'][0]:.0f}", sized(line)]
        )
    parts.append(table(["memory", "dtype", "op", "time / time of a copy", "target", "us", "sizes"], rows))
    if on_gpu:
        rows = []
        for line in found(lines, what="bandwidth"):
            bound = GPU_BOUNDS.get(line["case"])
            target = "" if bound is None else f">= {bound:.0%}: {verdict(line['ratio'] >= bound)}"
            rows.append([f"`{line['case']}`", f"{line['ratio']:.0%} ({line['low']:.0%} to {line['high']:.0%})", target, sized(line)])
        first = found(lines, case="plan, static, in a CUDA graph")[0]
        taken = first["milliseconds"][0]
        rows.append(["plan, static", f"{1e3 * taken:.0f} us", f"<= 60 us: {verdict(taken <= PLAN_ON_GPU)}", sized(first)])
        parts.append(table(["op", "share of a copy's bandwidth", "target", "sizes"], rows))
    return "\n\n".join(parts)


def host(results: Line) -> str:
    on_gpu, rows = "cuda" in results["about"]["on"], []
    for line in results["lines"]:
        taken, forward = (1e3 * ms for ms in line["milliseconds"])
        bound = HOST_ON_GPU.get(line["case"]) if on_gpu else None
        target = "" if bound is None else f"<= {bound} us: {verdict(taken <= bound)}"
        rows.append([line["memory"], line["dtype"], line["case"], spread(line), target, f"{taken:.0f} / {forward:.0f}", sized(line)])
    header = ["memory", "dtype", "call", "time / time of `k_fold`, forward", "target", "us", "sizes"]
    return ran(results["about"]) + "\n\n" + table(header, rows)


def experts(results: Line) -> str:
    lines, on_gpu = results["lines"], "cuda" in results["about"]["on"]
    rows = []
    for line in found(lines, what="layer with experts"):
        target = ""
        if on_gpu and line["to"] == "grouped_mm and copies":
            target = f"<= {WHOLE_ON_GPU}: {verdict(line['ratio'] <= WHOLE_ON_GPU)}"
        peak = found(
            lines, what="peak memory", memory=line["memory"], case=line["case"], to=line["to"], tokens=line["tokens"], dim=line["dim"]
        )
        memory = f"{peak[0]['ratio']:.2f}" if peak else ""
        times = " / ".join(f"{ms:.1f}" for ms in line["milliseconds"])
        rows.append([line["memory"], f"{line['case']} / {line['to']}", spread(line), target, times, memory, sized(line)])
    return (
        ran(results["about"]) + "\n\n" + table(["memory", "comparison", "time ratio", "target", "ms", "peak memory ratio", "sizes"], rows)
    )


def kept(results: Line) -> str:
    rows = [
        [line["case"], f"{line['amounts'][0] / 2**20:.1f}", f"{line['ratio']:.2f}", sized(line)]
        for line in sorted(results["lines"], key=lambda line: (line["tokens"], -line["ratio"]))
    ]
    return ran(results["about"]) + "\n\n" + table(["way", "MiB kept", "/ N * 2 H", "sizes"], rows)


def links(results: Line) -> str:
    about, lines = results["about"], results["lines"]
    link = lines[0]["link"]
    fitted = (
        f"Fitted link: latency {1e6 * link['latency']:.0f} us, {1e6 * link['overhead']:.1f} us per message, {link['speed'] / 1e9:.2f} GB/s."
    )
    rows = []
    for ranks in sorted({line["ranks"] for line in lines}):
        for what, those in (
            ("equal messages, fitted", found(lines, ranks=ranks, fitted=True)),
            ("equal messages, predicted", found(lines, ranks=ranks, fitted=False, what="equal parts")),
            ("rows of a layer, predicted", [line for line in found(lines, ranks=ranks) if line["what"] != "equal parts"]),
        ):
            ratios = sorted(line["ratio"] for line in those)
            if ratios:
                middle = ratios[len(ratios) // 2]
                rows.append([str(ranks), what, str(len(ratios)), f"{middle:.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"])
    parts = [ran(about), fitted, table(["ranks", "exchanges", "number", "predicted / measured, median", "range"], rows)]
    gpus = about["gpus"]
    limited = next(name for name in gpus[0] if name.startswith("moecomm, "))
    rows = [
        [
            str(line["gpus"]),
            f"{line['pairs']:.2f}",
            f"{line['moecomm']:.1f}",
            f"{line['k_fold']:.1f}",
            f"{line['k_fold'] / line['moecomm']:.2f}",
        ]
        + [f"{line['pairs limited']:.2f}", f"{line[limited]:.1f}"]
        for line in gpus
    ]
    parts += [
        "The next table predicts exchanges on this cluster, which is assumed and not measured: "
        + "; ".join(about["cluster"]["sources"])
        + ". T = 8192 tokens per GPU, D = 7168, K = 8, bfloat16, E = 256, or one expert per GPU from 256 GPUs on."
    ]
    parts.append(
        table(
            [
                "GPUs",
                "pairs per token",
                "moecomm, ms",
                "K-fold, ms",
                "K-fold / moecomm",
                "pairs per token, at most 4 nodes",
                "moecomm, at most 4 nodes, ms",
            ],
            rows,
        )
    )
    return "\n\n".join(parts)


def placement(results: Line) -> str:
    about, lines = results["about"], results["lines"]
    rows = []
    for line in found(lines, what="replay"):
        chosen = f"{line['milliseconds to choose']:.2f}" if "milliseconds to choose" in line else ""
        ratios = [f"{line[name]:.2f}" for name in ("median", "mean", "90 %")]
        sent = f"{line['bytes'] / 2**20:.1f}"
        step = f"{line['milliseconds']:.2f}"
        rows.append([line["case"], str(line["slots"]), *ratios, f"{line['moved']:.1%}", sent, step, chosen, line["source"]])
    header = [
        "way", "slots a rank", "max / mean load, median", "mean", "90 %", "slots moved", "MiB a rank and iteration",
        "predicted ms a step", "CPU ms to choose", "what it is",
    ]  # fmt: skip
    replay = (
        f"Trace: {about['trace']}, {about['shape']}. Ranks that are equally full would take {about['even milliseconds']:.2f} ms a step."
    )
    timed = [
        [str(line["ranks"]), line["case"], f"{line['mean']:.2f}", f"{line['milliseconds']:.0f}", f"{line['CPU milliseconds']:.0f}"]
        for line in found(lines, what="a layer")
    ]
    real = "A layer on 2 and on 4 gloo ranks, Zipf loads that drift; a step takes as long as its slowest rank, or as the cores take:"
    timed_header = ["ranks", "experts", "max / mean load", "ms a step", "CPU ms of the busiest rank"]
    return "\n\n".join([ran(about), replay, table(header, rows), real, table(timed_header, timed)])
