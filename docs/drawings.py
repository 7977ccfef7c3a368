"""The drawings of docs/concepts.md: ``python docs/drawings.py`` writes them as SVG, each on a light card that reads in dark pages too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

WIDTH = 520  # narrow, so that text can be read on a phone
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")
GRAY, DARK = "#bbbbbb", "#333333"
EXPERTS = {0: (0, 1), 1: (1, 2), 2: (2, 3), 3: (0, 3), 4: (2, 3)}  # of each token
TOKENS = {0: (0, 1, 2), 1: (3, 4)}  # of each rank
RANK_OF = (0, 0, 1, 1)  # of each expert


class Drawing:
    def __init__(self, height: int, title: str) -> None:
        self.height, self.title = height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, text: str, fill: str, width: float = 30, dashed: bool = False) -> None:
        line = f'stroke="{GRAY if dashed else fill}"' + (' stroke-dasharray="3 2"' if dashed else "")
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="22" rx="4" fill="{"none" if dashed else fill}" {line}/>')
        self.text(x + width / 2, y + 15.5, text, DARK if dashed else "white", "middle")

    def frame(self, x: float, y: float, width: float, height: float, text: str) -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="none" stroke="{GRAY}"/>')
        self.text(x + 8, y + 16, text, "#666666")

    def text(self, x: float, y: float, text: str, fill: str = DARK, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}">{text}</text>')

    def line(self, x: float, y: float, to: float, down: float, color: str) -> None:
        middle = (y + down) / 2
        path = f"M{x:g} {y:g}C{x:g} {middle:g} {to:g} {middle:g} {to:g} {down:g}"
        self.parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')

    def svg(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        card = f'<rect width="{WIDTH}" height="{self.height}" rx="10" fill="#ffffff"/>'
        style = "<style>text{font:13px system-ui,sans-serif}</style>"
        return "\n".join([head, f"<title>{self.title}</title>", style, card, *self.parts, "</svg>\n"])


def way() -> Drawing:
    """Five tokens, two of four experts each, on two ranks."""
    drawing = Drawing(478, "The way of five tokens to the experts of two ranks and back")
    left = {0: 80.0, 1: 300.0}
    for rank in (0, 1):
        drawing.frame(left[rank] - 10, 8, 212, 462, f"rank {rank}")
    heights = {"x": 36.0, "received": 118.0, "rows": 196.0, "results": 272.0, "sums": 350.0, "y": 436.0}
    shapes = {"x": "[T, D]", "received": "[R, D]", "rows": "[N, D]", "results": "[N, D]", "sums": "[R, D]", "y": "[T, D]"}
    for name, shape in shapes.items():
        drawing.text(6, heights[name] + 9, name)
        drawing.text(6, heights[name] + 24, shape, "#666666")
    home = {t: left[rank] + 34 * i for rank, tokens in TOKENS.items() for i, t in enumerate(tokens)}
    arrived: dict[tuple[int, int], float] = {}
    rows: dict[tuple[int, int], float] = {}
    for rank in (0, 1):
        pairs = [t for t in EXPERTS if any(RANK_OF[e] == rank for e in EXPERTS[t])]
        arrived |= {(t, rank): left[rank] + 34 * i for i, t in enumerate(pairs)}
        slots = [(e, t) for e in range(4) if RANK_OF[e] == rank for t in EXPERTS if e in EXPERTS[t]]
        rows |= {slot: left[rank] - 4 + 33 * i for i, slot in enumerate(slots)}
        for e in range(4):
            of_expert = [rows[slot] for slot in slots if slot[0] == e]
            if of_expert:
                middle = (of_expert[0] + of_expert[-1] + 30) / 2
                drawing.text(middle, heights["results"] - 17, f"expert {e}", "#666666", "middle")
                drawing.line(middle, heights["rows"] + 24, middle, heights["results"] - 30, GRAY)
                drawing.line(middle, heights["results"] - 12, middle, heights["results"] - 2, GRAY)
    for (t, rank), x in arrived.items():
        drawing.line(home[t] + 15, heights["x"] + 22, x + 15, heights["received"], COLORS[t])
        drawing.line(x + 15, heights["sums"] + 22, home[t] + 15, heights["y"], COLORS[t])
        for e in EXPERTS[t]:
            if RANK_OF[e] == rank:
                drawing.line(x + 15, heights["received"] + 22, rows[e, t] + 15, heights["rows"], COLORS[t])
                drawing.line(rows[e, t] + 15, heights["results"] + 22, x + 15, heights["sums"], COLORS[t])
        drawing.box(x, heights["received"], f"t{t}", COLORS[t])
        drawing.box(x, heights["sums"], f"t{t}", COLORS[t])
    for (_, t), x in rows.items():
        drawing.box(x, heights["rows"], f"t{t}", COLORS[t])
        drawing.box(x, heights["results"], f"t{t}", COLORS[t])
    for t, x in home.items():
        drawing.box(x, heights["x"], f"t{t}", COLORS[t])
        drawing.box(x, heights["y"], f"t{t}", COLORS[t])
    return drawing


def views() -> Drawing:
    """Eight ranks: dense (dp = 4, tp = 2) and expert (edp = 2, ep = 4)."""
    drawing = Drawing(300, "The dense and the expert view of eight ranks")
    drawing.frame(8, 8, 504, 138, "dense: dp = 4, tp = 2")
    drawing.frame(8, 154, 504, 138, "experts: edp = 2, ep = 4")
    for rank in range(8):
        dp, tp = divmod(rank, 2)
        x = 64 + 112 * dp
        drawing.box(x, 58 + 44 * tp, f"rank {rank}", COLORS[tp], 96)
        if tp == 0:
            drawing.text(x + 48, 50, f"batch {dp}", "#666666", "middle")
        edp, ep = divmod(rank, 4)
        x = 64 + 112 * ep
        drawing.box(x, 204 + 44 * edp, f"rank {rank}", COLORS[2 + ep], 96)
        if edp == 0:
            drawing.text(x + 48, 196, f"experts {2 * ep}, {2 * ep + 1}", "#666666", "middle")
    for i, name in enumerate(("tp 0", "tp 1")):
        drawing.text(16, 73 + 44 * i, name, "#666666")
    for i, name in enumerate(("edp 0", "edp 1")):
        drawing.text(16, 219 + 44 * i, name, "#666666")
    return drawing


def modes() -> Drawing:
    """The rows that rank 1 gets in the drawing of `way`, in dynamic mode and with room for 3 tokens and for 1 from each rank."""
    drawing = Drawing(264, "The rows of one rank in dynamic and in static mode")
    drawing.text(14, 24, "rows of rank 1: those of expert 2, then those of expert 3", "#666666")
    drawing.text(14, 44, "from rank 0 come t1 and t2, from rank 1 t3 and t4", "#666666")
    texts = ("N = 6: as many as there are", "N = 12, always: 6 are padding", "N = 4, always: no room for t2 and t4: dropped, and counted")
    for i, (room, text) in enumerate(zip((None, 3, 1), texts, strict=True)):
        y = 64 + 66 * i
        drawing.text(14, y + 16, f"max_rows = {room}" if room else "dynamic")
        sent = [[t for t in tokens if any(RANK_OF[e] == 1 for e in EXPERTS[t])][:room] for tokens in TOKENS.values()]
        rows = [f"t{t}" for e in (2, 3) for tokens in sent for t in tokens if e in EXPERTS[t]]
        if room:
            rows += [""] * (2 * room * 2 - len(rows))  # P * C * min(K, L) in all
        for n, row in enumerate(rows):
            drawing.box(112 + 33 * n, y, row, COLORS[int(row[1:])] if row else GRAY, dashed=not row)
        drawing.text(112, y + 40, text, "#666666")
    return drawing


def placement() -> Drawing:
    """Six experts on three ranks, of which expert 2 gets half of the slots: with two places on each rank, and with three."""
    drawing = Drawing(282, "Six experts on three ranks, without and with replicas of the expert that has most load")
    loads = (10, 10, 50, 10, 10, 10)  # per cent of the slots
    cases = (
        ("two places on each rank: no replicas", ((0, 1), (2, 3), (4, 5))),
        ("three places: replicas of e2 and e0", ((0, 1, 2), (2, 3, 4), (0, 2, 5))),
    )
    for i, (name, held) in enumerate(cases):
        top = 8 + 138 * i
        drawing.frame(8, top, 504, 128, name)
        copies = [sum(e in of_rank for of_rank in held) for e in range(6)]
        for rank, of_rank in enumerate(held):
            x = 22 + 166 * rank
            load = sum(loads[e] / copies[e] for e in of_rank)
            drawing.text(x, top + 42, f"rank {rank}", "#666666")
            for place, e in enumerate(of_rank):
                drawing.box(x + 48 * place, top + 52, f"e{e}", COLORS[e], 42)
            drawing.parts.append(f'<rect x="{x}" y="{top + 84}" width="{load * 2.2:.1f}" height="10" fill="{GRAY}"/>')
            drawing.text(x, top + 112, f"{load:.0f} % of the rows", "#666666")
    return drawing


def drawings() -> Iterator[tuple[str, str]]:
    for name, draw in (("way", way), ("views", views), ("modes", modes), ("placement", placement)):
        yield f"{name}.svg", draw().svg()


if __name__ == "__main__":
    for name, text in drawings():
        (Path(__file__).parent / name).write_text(text)
