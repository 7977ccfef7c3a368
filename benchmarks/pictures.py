"""Draws the pictures of docs/benchmarks.md into `benchmarks/results/`, from the results there."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.layer_tables import DTYPES, FASTER
from benchmarks.sweep import AXES
from benchmarks.sweep_tables import FLOOR, at, made, of_axis
from benchmarks.tables import SETTINGS, found
from benchmarks.timing import WARM, Line

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of what it draws with

COLORS = {"moecomm": "tab:green", "k_fold": "tab:blue", "by_expert": "tab:orange", "expert_loop": "tab:purple", FLOOR: "gray"}
STYLES = dict(zip(SETTINGS, ("-", ":"), strict=True))


def titled(figure: Any, results: Line, picture: Path) -> None:
    """Write it, with what it was made on."""
    packages = ", ".join(f"{name} {version}" for name, version in results["about"]["packages"].items())
    figure.suptitle(f"{results['about']['device']}; {packages}", fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def layer(results: Line, picture: Path) -> None:
    """How many times faster a step is than each other way's, over K."""
    lines = results["lines"]
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 3.8))
    for axis, dtype in zip(axes, DTYPES, strict=True):
        for case in ("k_fold", "by_expert"):
            for memory, style in STYLES.items():
                here = sorted(found(lines, what="4 ranks", memory=memory, dtype=dtype, case=case), key=lambda line: line["k"])
                ratios = [line["ratio"] for line in here]
                around = [[line["ratio"] - line["low"] for line in here], [line["high"] - line["ratio"] for line in here]]
                at_k, label = [line["k"] for line in here], f"{case}, {memory}"
                axis.errorbar(at_k, ratios, around, color=COLORS[case], linestyle=style, marker="o", capsize=3, label=label)
        axis.plot(sorted(FASTER), [FASTER[k] for k in sorted(FASTER)], color="gray", linestyle="--", label="target for k_fold, warm")
        axis.axhline(1, color="lightgray", zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(FASTER), [str(k) for k in sorted(FASTER)])
        axis.set_xlabel("K, experts per token")
        axis.set_title(f"{dtype}, 4 gloo ranks, forward and backward", fontsize=9)
    axes[0].set_ylabel("time / time of moecomm")
    axes[0].legend(fontsize=8)
    titled(figure, results, picture)


def sweep(results: Line, picture: Path) -> None:
    """How the time of a step grows with each variable."""
    lines, device = results["lines"], results["about"]["on"]
    axes_here = [axis for axis in AXES if len(of_axis(made(lines), axis, device)) > 1]
    figure, axes = plt.subplots(-(-len(axes_here) // 3), 3, figsize=(12, 7), squeeze=False)
    for axis in axes.flat[len(axes_here) :]:
        axis.axis("off")
    for name, axis in zip(axes_here, axes.flat, strict=False):
        points = of_axis(made(lines), name, device)
        values = [getattr(point, name) for point in points]
        for memory, style in STYLES.items():
            here = [at(lines, point, memory) for point in points]
            for case in dict.fromkeys(case for each in here for case in each):
                drawn = [(i, each[case]) for i, each in enumerate(here) if case in each]
                across = [i if name == "routing" else values[i] for i, _ in drawn]
                label = case if memory == WARM else None
                times = [line["milliseconds"][0] for _, line in drawn]
                axis.plot(across, times, style, color=COLORS.get(case), marker="o", markersize=3, label=label)
        axis.set_yscale("log")
        if name == "routing":
            axis.set_xticks(range(len(values)), values)
        else:
            axis.set_xscale("log", base=2)
            axis.set_xticks(values, [str(value) for value in values], fontsize=7)
            axis.minorticks_off()
        axis.set_xlabel(name)
        axis.set_ylabel("ms per step")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes.flat[0].legend(
        handles.values(), [f"{label}" for label in handles], fontsize=7, title="solid: warm, dotted: as installed", title_fontsize=6
    )
    titled(figure, results, picture)


def links(results: Line, picture: Path) -> None:
    """What the model predicts beside what gloo took, and for a cluster that nobody measured."""
    lines, about = results["lines"], results["about"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.6))
    for ranks, color in zip(sorted({line["ranks"] for line in lines}), ("tab:blue", "tab:orange", "tab:green"), strict=False):
        for what, marker, those in (
            ("fitted", "x", found(lines, ranks=ranks, fitted=True)),
            ("predicted", "o", found(lines, ranks=ranks, fitted=False, what="equal parts")),
            ("rows of a layer, predicted", "^", [line for line in found(lines, ranks=ranks) if line["what"] != "equal parts"]),
        ):
            predicted, measured = ([line["milliseconds"][i] for line in those] for i in (0, 1))
            if those:
                left.plot(measured, predicted, marker, color=color, markersize=5, fillstyle="none", label=f"{ranks} ranks, {what}")
    limits = [min(line["milliseconds"][1] for line in lines) / 2, max(line["milliseconds"][1] for line in lines) * 2]
    left.plot(limits, limits, color="gray", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms", title="gloo on this machine")
    left.legend(fontsize=7)
    gpus = about["gpus"]
    across = [line["gpus"] for line in gpus]
    for name in gpus[0]:
        if name.startswith(("moecomm", "k_fold")):
            style = "--" if "," in name else "-"
            right.plot(across, [line[name] for line in gpus], style, marker="o", markersize=3, color=COLORS[name.split(",")[0]], label=name)
    right.set(xscale="log", yscale="log", xlabel="GPUs in the expert-parallel group", ylabel="dispatch and combine forward, ms")
    right.set_xscale("log", base=2)
    right.set_xticks(across, [str(gpu) for gpu in across], fontsize=7)
    right.set_title("predicted: T = 8192 per GPU, D = 7168, K = 8, bf16, E = max(256, GPUs)", fontsize=9)
    right.legend(fontsize=8)
    assumed = "\n".join(textwrap.fill(source, 62) for source in about["cluster"]["sources"])
    right.text(0.98, 0.03, f"exchanges only; assumed cluster:\n{assumed}", transform=right.transAxes, fontsize=6, ha="right", va="bottom")
    titled(figure, results, picture)


def planner(results: Line, picture: Path) -> None:
    """What the planner predicts of each split beside what was measured: seconds and bytes."""
    lines = found(results["lines"], what="split")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8))
    for axis, of, scale, unit in (
        (axes[0], "milliseconds", 1.0, "ms a step"),
        (axes[1], "bytes", 2.0**-20, "MiB of the rank that needs most"),
    ):
        for ranks, color in zip(sorted({line["ranks"] for line in lines}), ("tab:blue", "tab:orange", "tab:green"), strict=False):
            for several, marker in ((False, "o"), (True, "^")):
                here = [line for line in found(lines, ranks=ranks) if (line["split"]["pp"] > 1) == several]
                predicted, measured = ([scale * line[of][i] for line in here] for i in (0, 1))
                label = f"{ranks} ranks, {'a pipeline' if several else 'one stage'}"
                axis.plot(measured, predicted, marker, color=color, markersize=5, fillstyle="none", label=label)
        values = [scale * value for line in lines for value in line[of]]
        limits = [0.9 * min(values), 1.1 * max(values)]
        axis.plot(limits, limits, color="gray", linewidth=0.8)
        axis.fill_between(
            limits, [0.9 * limits[0], 0.9 * limits[1]], [1.1 * limits[0], 1.1 * limits[1]], color="lightgray", alpha=0.5, zorder=0
        )
        axis.set(xscale="log", yscale="log", xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}")
    axes[0].legend(fontsize=7, title="gray: within 10 %", title_fontsize=7)
    titled(figure, results, picture)


def placement(results: Line, picture: Path) -> None:
    """How full the fullest rank is over the trace, and what each way costs."""
    lines = found(results["lines"], what="replay")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    for line in lines:
        left.plot(line["over time"], linewidth=1, label=line["case"])
    left.set(yscale="log", xlabel="snapshot, 10 iterations each", ylabel="max / mean load, median of the layers")
    left.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
    left.minorticks_off()
    left.legend(fontsize=7)
    names = [line["case"] for line in lines]
    right.barh(names, [line["milliseconds"] for line in lines], color="lightgray")
    for i, line in enumerate(lines):
        right.text(0.1, i, f"{line['milliseconds']:.2f} ms, {line['bytes'] / 2**20:.1f} MiB a rank and iteration", va="center", fontsize=8)
    right.axvline(results["about"]["even milliseconds"], color="gray", linestyle="--")
    right.invert_yaxis()
    right.set(xlabel="predicted ms a step; dashed: ranks that are equally full")
    titled(figure, results, picture)
