"""At which points is moecomm slower than the best other method? The tables of `benchmarks.sweep`."""

from __future__ import annotations

from typing import Any

from benchmarks.sweep import AXES, Point, base
from benchmarks.tables import SETTINGS, ran, spread, table
from benchmarks.timing import Line

SLOWER = 1.05  # at no point is moecomm to take more than this of the best other way's time
MINE, FLOOR = "moecomm", "floor"


def sweep(results: Line) -> str:
    about, lines = results["about"], results["lines"]
    device = about["on"]
    memories = [memory for memory in SETTINGS if any(line["memory"] == memory for line in lines)]
    missed = {memory: [name(point, device) for point in made(lines) if misses(at(lines, point, memory))] for memory in memories}
    count = len(made(lines))
    parts = [ran(about), f"Base point: {whole(base(device))}; {lines[0]['dtype']}."]
    for memory in memories:
        points = f": {'; '.join(missed[memory])}" if missed[memory] else ""
        parts.append(f"More than 5 % slower than the best other method, {memory}: {len(missed[memory])} of {count} points{points}.")
    header = [
        "point",
        *(f"best other method / moecomm, {memory}" for memory in memories),
        "moecomm / floor",
        "ms",
        "peak MiB, moecomm / best other",
        "MiB kept for backward, moecomm / best other",
    ]
    rows = []
    for axis in AXES:
        for point in of_axis(made(lines), axis, device):
            here = at(lines, point, memories[0])
            best = here[best_of(here)]
            ratios = []
            for memory in memories:
                there = at(lines, point, memory)
                mark = " **missed**" if misses(there) else ""
                ratios.append(f"{spread(there[best_of(there)])} `{best_of(there)}`{mark}")
            floor = here[MINE]["milliseconds"][0] / here[FLOOR]["milliseconds"][0]
            amounts = [f"{here[MINE][what] / 2**20:.0f} / {best[what] / 2**20:.0f}" for what in ("peak", "saved")]
            shown = f"{axis} = {getattr(point, axis)}"
            rows.append([shown, *ratios, f"{floor:.1f}", f"{here[MINE]['milliseconds'][0]:.1f}", *amounts])
    return "\n\n".join([*parts, table(header, rows)])


def point_of(line: Line) -> Point:
    return Point(*(line[field] for field in Point._fields))


def made(lines: list[Line]) -> list[Point]:
    return sorted({point_of(line) for line in lines})


def at(lines: list[Line], point: Point, memory: str) -> dict[str, Line]:
    """The lines of a point by way."""
    return {line["case"]: line for line in lines if line["memory"] == memory and point_of(line) == point}


def best_of(here: dict[str, Line]) -> str:
    return min((case for case in here if case not in (MINE, FLOOR)), key=lambda case: here[case]["ratio"])


def misses(here: dict[str, Line]) -> bool:
    return here[best_of(here)]["ratio"] * SLOWER < 1


def of_axis(points: list[Point], axis: str, device: str) -> list[Point]:
    """The points that differ from the base in nothing but one variable, in the order of its values."""
    values: tuple[Any, ...] = AXES[axis]
    value_of_base = getattr(base(device), axis)
    ordered = values if value_of_base in values else sorted((*values, value_of_base))
    wanted = [base(device)._replace(**{axis: value}) for value in ordered]
    return [point for point in wanted if point in points]


def name(point: Point, device: str) -> str:
    changed = [f"{field} = {value}" for field, value in point._asdict().items() if value != getattr(base(device), field)]
    return ", ".join(changed) or "the base"


def whole(point: Point) -> str:
    return ", ".join(f"{field} = {value}" for field, value in point._asdict().items())
