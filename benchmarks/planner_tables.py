"""The tables of docs/benchmarks.md for the planner: what it predicts of the demo's splits, and what was measured."""

from __future__ import annotations

import statistics

from benchmarks.tables import found, ran, table, verdict
from benchmarks.timing import Line

SEARCHES = (2, 30)  # seconds at most, for 64 ranks and for 4096
R2, MEDIAN, OF_FASTEST, OF_MEMORY = 0.74, 0.07, 1.1, 0.1  # SmartMoE's logs have an R2 of 0.53 to 0.74 and medians of 7 to 9.5 %


def planner(results: Line) -> str:
    about, lines = results["about"], found(results["lines"], what="split")
    ranks = sorted({line["ranks"] for line in lines})
    rows = [summary(f"{count} ranks", found(lines, ranks=count)) for count in ranks] + [summary("all", lines)]
    shape = about["shape"]
    rounds = ", ".join(f"{number} with {count} ranks" for count, number in about["rounds"])
    ran_on = (
        f"The demo's model: {shape['layers']} layers, D = {shape['dim']}, H = {shape['hidden']}, E = {shape['experts']}, "
        f"K = {shape['top_k']}, {about['batch']} sequences of {shape['context']} tokens a step; float32, eager. Measured: the median of "
        f"{about['steps']} steps a round (rounds: {rounds}), by the CPU time of the ranks, times the ranks of a core, at the machine's "
        "median speed. A step takes that if no core idles and nobody else uses the machine. On the wall's clock, with what else ran, steps "
        f"took {slower(lines):.1f} times as long (median)."
    )
    header = [
        "splits of",
        "number",
        "R2",
        "median error",
        "largest error",
        "predicted to be fastest / fastest",
        "memory: median",
        "largest",
    ]
    return "\n\n".join(
        [
            ran(about),
            ran_on,
            targets(lines, found(results["lines"], what="search")),
            table(header, rows),
            calibrations(lines),
            fastest(lines),
        ]
    )


def slower(lines: list[Line]) -> float:
    """The wall's time of a step relative to its CPU time."""
    return statistics.median(line["wall milliseconds"] / line["milliseconds"][1] for line in lines)


def errors(lines: list[Line], of: str = "milliseconds") -> list[float]:
    """Of every line, relative to what was measured."""
    return [abs(line[of][0] / line[of][1] - 1) for line in lines]


def r2(lines: list[Line]) -> float:
    """1 - the squares of the errors / the squares of the distances from the mean."""
    predicted, measured = zip(*(line["milliseconds"] for line in lines), strict=True)
    mean = statistics.mean(measured)
    return 1 - sum((a - b) ** 2 for a, b in zip(predicted, measured, strict=True)) / sum((b - mean) ** 2 for b in measured)


def choice(lines: list[Line]) -> float:
    """The measured time of the split that is predicted to be fastest, relative to that of the fastest, with one number of ranks."""
    predicted = min(lines, key=lambda line: line["milliseconds"][0])
    return predicted["milliseconds"][1] / min(line["milliseconds"][1] for line in lines)


def choices(lines: list[Line]) -> list[float]:
    return [choice(found(lines, ranks=count)) for count in sorted({line["ranks"] for line in lines})]


def summary(name: str, lines: list[Line]) -> list[str]:
    of_time, of_memory = errors(lines), errors(lines, "bytes")
    return [
        name,
        str(len(lines)),
        f"{r2(lines):.2f}",
        f"{statistics.median(of_time):.1%}",
        f"{max(of_time):.1%}",
        f"{max(choices(lines)):.2f}",
        f"{statistics.median(of_memory):.1%}",
        f"{max(of_memory):.1%}",
    ]


def targets(lines: list[Line], searches: list[Line]) -> str:
    median, memory, chosen = statistics.median(errors(lines)), max(errors(lines, "bytes")), max(choices(lines))
    rows = [
        ["R2 over all splits", f"> {R2}", f"{r2(lines):.2f}: {verdict(r2(lines) > R2)}"],
        ["median error of the step time", f"< {MEDIAN:.0%}", f"{median:.1%}: {verdict(median < MEDIAN)}"],
        ["the split predicted to be fastest / the fastest, at worst", f"<= {OF_FASTEST}", f"{chosen:.2f}: {verdict(chosen <= OF_FASTEST)}"],
        ["largest error of the memory", f"<= {OF_MEMORY:.0%}", f"{memory:.1%}: {verdict(memory <= OF_MEMORY)}"],
    ]
    for line, most in zip(searches, SEARCHES, strict=True):
        name = f"CPU time to search {line['ranks']} ranks: {line['rows']:,} rows"
        rows.append([name, f"< {most} s", f"{line['seconds']:.1f} s: {verdict(line['seconds'] < most)}"])
    return table(["measure", "target", "result"], rows)


def calibrations(lines: list[Line]) -> str:
    """What `calibrate` measured with each number of ranks at work."""
    rows = []
    for count in sorted({line["ranks"] for line in lines}):
        cluster = found(lines, ranks=count)[0]["cluster"]
        link = cluster["inside"]
        rates = [f"{cluster[name] / 1e9:.1f}" for name in ("matmul", "grouped", "attention", "copy", "stream")]
        of_link = f"{1e6 * link['latency']:.0f} us, {1e6 * link['overhead']:.0f} us, {link['speed'] / 1e9:.2f} GB/s"
        host = ", ".join(f"{1e3 * cluster[name]:.1f}" for name in ("launch", "routed", "sliced"))
        rows.append([str(count), *rates, host, of_link, f"{cluster['gathers']:.1f}, {cluster['scatters']:.1f}"])
    header = [
        "ranks", "matmul, GFLOP/s", "grouped", "attention", "layer's rest, GB/s", "sums, GB/s", "host, ms: a layer, its routing, slices",
        "link: latency, message, speed", "a gather, a reduce-scatter / an exchange",
    ]  # fmt: skip
    return table(header, rows)


def fastest(lines: list[Line]) -> str:
    """The three fastest and the slowest split of each number of ranks, as measured."""
    rows = []
    for count in sorted({line["ranks"] for line in lines}):
        ordered = sorted(found(lines, ranks=count), key=lambda line: line["milliseconds"][1])
        by_prediction = sorted(ordered, key=lambda line: line["milliseconds"][0])
        for line in (*ordered[:3], ordered[-1]):
            place, sizes = by_prediction.index(line) + 1, line["split"]
            dense, expert = (" x ".join(f"{sizes[name]} {name}" for name in names) for names in (("pp", "dp", "tp"), ("edp", "ep", "etp")))
            predicted, measured = line["milliseconds"]
            rows.append([str(count), dense, expert, f"{measured:.0f}", f"{predicted:.0f}", f"{place} of {len(ordered)}"])
    return table(["ranks", "dense", "experts", "measured, ms", "predicted, ms", "place as predicted"], rows)
