"""What a search found, as plain data, as text and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from moecomm.planner.cluster import Cluster
from moecomm.planner.cost import RECOMPUTE, Times, Way
from moecomm.planner.memory import Memory
from moecomm.planner.model import Model
from moecomm.planner.splits import Split

SHOWN = 12  # rows that print shows
HEADER = (
    f"{'pp':>4}{'dp':>5}{'cp':>4}{'tp':>4} |{'edp':>5}{'ep':>5}{'etp':>4} | {'wire':<5}{'plan':<8}{'again':<6}{'mb':>5} |"
    f"{'ms':>9}{'dense':>8}{'experts':>8}{'exch.':>8}{'syncs':>7}{'rest':>7}{'bubble':>8} |{'GiB':>7}{'kept':>7} |{'tokens/s':>12}"
)


class Row(NamedTuple):
    """A split and a way to run it, with what the model predicts of them."""

    split: Split
    way: Way
    seconds: float  # of a step
    tokens_per_second: float  # of all ranks
    times: Times  # the parts of ``seconds``
    memory: Memory  # of the rank that needs most

    def __str__(self) -> str:
        s, way, times = self.split, self.way.to_dict(), self.times
        parts = (times.dense, times.experts, times.exchanges, times.syncs, times.update + times.host, times.bubble)
        ms = "".join(f"{1e3 * each:>{width}.1f}" for each, width in zip((self.seconds, *parts), (9, 8, 8, 8, 7, 7, 8), strict=True))
        gibibytes = f"{self.memory.total() / 2**30:>7.1f}{self.memory.activations / 2**30:>7.1f}"
        return (
            f"{s.pp:>4}{s.dp:>5}{s.cp:>4}{s.tp:>4} |{s.edp:>5}{s.ep:>5}{s.etp:>4} | {way['wire']:<5}{way['plan']:<8}{way['recompute']:<6}"
            f"{way['microbatches']:>5} |{ms} |{gibibytes} |{self.tokens_per_second:>12,.0f}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "split": self.split._asdict(),
            **self.way.to_dict(),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "times": self.times._asdict(),
            "memory": self.memory._asdict(),
        }


class Unfit(NamedTuple):
    """A split that does not fit, and why. ``way`` is None where no way to run it would."""

    split: Split
    way: Way | None
    why: str

    def to_dict(self) -> dict[str, Any]:
        return {"split": self.split._asdict(), **(self.way.to_dict() if self.way else {}), "why": self.why}


class Table(NamedTuple):
    """The result of a search. ``print`` shows the fastest splits, each with its fastest way."""

    model: Model
    cluster: Cluster
    ranks: int
    rows: list[Row]  # those that fit, the fastest first
    unfit: list[Unfit]

    def best_of_splits(self) -> list[Row]:
        """The fastest row of each split, the fastest first."""
        found: dict[Split, Row] = {}
        for row in self.rows:
            found.setdefault(row.split, row)
        return list(found.values())

    def __str__(self) -> str:
        shown, unfit = self.best_of_splits(), {each.split for each in self.unfit} - {row.split for row in self.rows}
        lines = [
            f"{self.ranks} ranks of {self.cluster.name}, {self.model.batch} sequences of {self.model.sequence} tokens a step: "
            f"{len(shown)} splits fit, {len(unfit)} do not",
            HEADER,
            *(str(row) for row in shown[:SHOWN]),
        ]
        if not shown:
            nearest = min((each for each in self.unfit if each.way), key=lambda each: float(each.why.split()[1]), default=None)
            lines.append("nothing fits" + (f"; least is missing with {nearest.split.call()}: {nearest.why}" if nearest else ""))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as json takes it."""
        return {
            "model": self.model.to_dict(),
            "cluster": self.cluster.to_dict(),
            "ranks": self.ranks,
            "rows": [row.to_dict() for row in self.rows],
            "unfit": [each.to_dict() for each in self.unfit],
        }

    def plot(self, path: str | Path) -> None:
        """Draw the step time of every row against its memory, the fastest marked. It needs matplotlib: the extra "demo"."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5))
        axes = figure.subplots()
        for again, marker in enumerate("osx"):
            rows = [row for row in self.rows if row.way.recompute == again]
            across, up = [row.memory.total() / 2**30 for row in rows], [1e3 * row.seconds for row in rows]
            colors = [row.split.pp.bit_length() for row in rows]
            axes.scatter(across, up, c=colors, marker=marker, s=14, alpha=0.6, cmap="viridis", label=f"recompute {RECOMPUTE[again]}")
        if self.rows:
            best = self.rows[0]
            axes.plot(best.memory.total() / 2**30, 1e3 * best.seconds, "*", color="red", markersize=15, label=best.split.call())
        axes.axvline(self.cluster.memory / 2**30, color="gray", linestyle="--", linewidth=0.8)
        axes.set(yscale="log", xlabel="GiB of the rank that needs most", ylabel="predicted ms a step")
        axes.set_title(f"{self.ranks} ranks of {self.cluster.name}; lighter: more pipeline stages", fontsize=9)
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
