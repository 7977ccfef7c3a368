"""explain: who sends what to whom under a plan, as tables, plain data and a picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves

from moecomm.errors import MoECommError, check_tensor, wrong_type, wrong_value
from moecomm.layer.plan import Plan
from moecomm.layer.token_calls import check_wires
from moecomm.ops.exchange.collectives import all_gathered, start_all_gather
from moecomm.ops.routing.read_sizes import read_list
from moecomm.ops.rows.wire_formats import width
from moecomm.parallel.dtensor import to_local
from moecomm.parallel.group import resolve_group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = list[list[int]]


class Explanation(NamedTuple):
    """The result of `explain`, the same on every rank: numbers, lists with one number per rank, and tables.

    ``print`` it, or call `plot`. P is the number of ranks, L of local experts. ``pairs[p][q]`` is what rank p sends to rank q.
    """

    tokens: list[int]  # [P]: T of each rank
    pairs: Table  # [P, P]: (token, rank) pairs; a token with several experts on rank q counts once
    slots: Table  # [P, P]: the slots of these tokens for experts of rank q
    rows: Table  # [P, L]: the rows of each local expert on each rank
    imbalance: float  # the most rows of a rank over the mean of the ranks; 1.0 if even, and if there are no rows
    dropped: list[int] | None  # [P]: slots of each rank's tokens that static mode dropped; None without static mode
    bytes: Table | None  # [P, P]: what dispatch of x sends, with the padding of static mode; the diagonal is 0 (not sent)

    def __str__(self) -> str:
        ranks = range(len(self.pairs))
        sent = [["", *(f"to rank {q}" for q in ranks), "tokens"]]
        for p in ranks:
            cells = [f"{pairs} ({slots})" for pairs, slots in zip(self.pairs[p], self.slots[p], strict=True)]
            sent.append([f"rank {p}", *cells, str(self.tokens[p])])
        computed = [["", *(f"expert {e}" for e in range(len(self.rows[0]))), "rows"]]
        computed += [[f"rank {p}", *map(str, row), str(sum(row))] for p, row in enumerate(self.rows)]
        text = ["pairs (slots) that each rank sends", *_aligned(sent), "", "rows of each rank's local experts", *_aligned(computed)]
        text += ["", f"imbalance {self.imbalance:.2f}: the most rows of a rank over the mean"]
        if self.dropped is not None:
            text += [f"dropped slots: {', '.join(f'{slots} of rank {p}' for p, slots in enumerate(self.dropped))}"]
        if self.bytes is not None:
            text += ["", "bytes that each rank sends", *_aligned([sent[0][:-1], *([f"rank {p}", *map(str, self.bytes[p])] for p in ranks)])]
        return "\n".join(text)

    def plot(self) -> Figure:
        """Draw two heat maps: the pairs that each rank sends to each rank, and the rows of each local expert.

        Returns:
            The matplotlib figure; ``figure.savefig("plan.png")`` writes it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib, which moecomm does not install: pip install matplotlib") from error
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _heat_map(left, self.pairs, "tokens sent", "to rank", "from rank")
        _heat_map(right, self.rows, f"rows of each expert, imbalance {self.imbalance:.2f}", "local expert", "rank")
        return figure


def explain(plan: Plan, x: Any = None, *, wire: str | None = None) -> Explanation:
    """Explain a plan: who sends what to whom, and how many rows each expert has. Collective over the plan's group.

    Every rank of the group calls it, and every rank gets the same result. You can print it, plot it or compute with it.
    It is for eager code: it reads sizes on the host, so torch.compile cannot trace it.

    Args:
        plan: the result of `plan`.
        x: what would be dispatched, [T, ...], or a pytree of such tensors; only shapes and dtypes are used. With x the result
            also counts the bytes that `dispatch` of x sends. `combine` of such rows sends as many the other way.
        wire: count the bytes for this ``wire`` of `dispatch` or `combine`.

    Returns:
        An `Explanation`, a NamedTuple of numbers and lists. ``print`` shows it as tables; its ``plot()`` returns a matplotlib
        figure.

    Raises:
        TypeError: ``plan`` is not a `Plan`, or a leaf of ``x`` is not a tensor. Raised before anything is sent.
        ValueError: a leaf does not have the plan's T tokens. Raised before anything is sent.
        MoECommError: the bytes per token of ``x`` differ between ranks. Raised alike on every rank.
        For a wrong ``wire``: as `dispatch` does.

    Example:
        >>> print(explain(plan(torch.tensor([[2, 0], [2, -1], [1, 2]]), torch.ones(3, 2), num_experts=3)))
        pairs (slots) that each rank sends
                to rank 0  tokens
        rank 0      3 (5)       3
        <BLANKLINE>
        rows of each rank's local experts
                expert 0  expert 1  expert 2  rows
        rank 0         1         1         3     5
        <BLANKLINE>
        imbalance 1.00: the most rows of a rank over the mean

    Backward: none.

    Cost: one all-gather of 3 + 2 * P + L numbers per rank, and one host synchronization. Call it when you want to look, not in
    every step.
    """
    if not isinstance(plan, Plan):
        wrong_type("plan", type(plan).__name__, "a Plan, as moecomm.functional.plan gives it")
    group, token = resolve_group(plan.group), _bytes_a_token(x, plan.tokens, wire)
    received = plan.weights.shape[0]
    from_each = [received // group.size] * group.size if plan.splits is None else plan.splits[1].numpy().tolist()
    slots = (plan.row_position >= 0).sum(1)  # [R]: slots of each received pair; 0 for padding
    parts = slots.split(from_each)
    counts = torch.stack([count for part in parts for count in ((part > 0).sum(), part.sum())])  # [2 * P]
    held = pad((plan.row_order >= 0).cumsum(0), (1, 0))  # [N + 1]: the number of real rows (not padding) before each row
    rows = held[plan.offsets.long()].diff(prepend=held[:1])  # [L]
    dropped = torch.zeros_like(counts[0]) if plan.dropped is None else plan.dropped.long()
    mine = torch.cat((counts.new_tensor([plan.tokens, token]), dropped[None], counts, rows))[None]  # [1, 3 + 2 * P + L]
    every = all_gathered(start_all_gather(mine, group.size, group.name), mine, group.size) if group.size > 1 else mine
    return _explanation(read_list(every), plan.dropped is not None, from_each[0])


def _explanation(every: Table, static: bool, most: int) -> Explanation:
    """The explanation made of all ranks' numbers; ``most`` is the rows that each rank sends to each in static mode."""
    ranks = len(every)
    tokens, of_token, dropped = (list(column) for column in list(zip(*every, strict=True))[:3])
    if len(set(of_token)) > 1:
        passed = ", ".join(
            f"{'not given' if size < 0 else f'of {size} bytes a token'} on rank {rank}" for rank, size in enumerate(of_token)
        )
        raise MoECommError(f"x was {passed} of the group; it must be the same on every rank")
    pairs = [[to[3 + 2 * p] for to in every] for p in range(ranks)]
    slots = [[to[4 + 2 * p] for to in every] for p in range(ranks)]
    rows = [own[3 + 2 * ranks :] for own in every]
    most_rows, all_rows = max(map(sum, rows)), sum(map(sum, rows))
    sent = None
    if of_token[0] >= 0:
        sent = [[of_token[0] * (most if static else pairs[p][q]) * (p != q) for q in range(ranks)] for p in range(ranks)]
    return Explanation(tokens, pairs, slots, rows, most_rows * ranks / all_rows if all_rows else 1.0, dropped if static else None, sent)


def _bytes_a_token(x: Any, tokens: int, wire: str | None) -> int:
    """The bytes of one token of x; -1 without x."""
    if x is None:
        return -1
    size = 0
    for leaf in tree_leaves(x):
        check_tensor("x", leaf, "[T, ...], or a pytree of them")
        local = to_local(leaf)
        if local.dim() == 0 or local.shape[0] != tokens:
            wrong_value("x", f"of shape {list(local.shape)}", f"of shape [{tokens}, ...], the plan's T = {tokens}")
        check_wires("x", local, wire, None)
        elements = math.prod(local.shape[1:])
        size += elements * local.dtype.itemsize if wire is None else width(elements, wire)
    return size


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _heat_map(axes: Any, table: Table, title: str, across: str, down: str) -> None:
    image = axes.imshow(table, vmin=0, aspect="auto", cmap="viridis")
    axes.set(title=title, xlabel=across, ylabel=down)
    axes.locator_params(integer=True)
    if len(table) * len(table[0]) <= 256:  # more numbers would be unreadable
        middle = image.norm.vmax / 2
        for p, row in enumerate(table):
            for q, value in enumerate(row):
                axes.text(q, p, value, ha="center", va="center", color="white" if value <= middle else "black")
    axes.figure.colorbar(image, ax=axes)
