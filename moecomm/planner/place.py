"""place: which rank holds which experts, from the load of each expert. Numbers in, numbers out: no rank is asked."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from moecomm.errors import wrong_type, wrong_value
from moecomm.planner.imbalance import Floats, Ints, read_loads, read_placement
from moecomm.planner.lasting import lasts

Rows = list[list[int]]

UNITS = 2**40  # the total load. Shares are whole units, so that sums are exact in any order: the same placement on every machine
HORIZON, COST = 100.0, 0.1  # a move of one slot pays if it takes 0.1 % of the mean load off the fullest rank
CHANCE = 4.0  # standard deviations of a rank's count of rows: a fullest rank that is no further above the mean is so by chance


class Links(NamedTuple):
    """Ranks in nodes. Rank r is on node r // node."""

    node: int  # ranks of a node
    between: float = 1.0  # the time of sending a row between two nodes, in the time in which a rank's experts compute a row


def place(
    loads: object,
    ranks: int,
    slots: int,
    links: Links | None = None,
    current: Sequence[Sequence[int]] | torch.Tensor | None = None,
    *,
    earlier: object = None,
    horizon: float = HORIZON,
    move_cost: float | None = None,
    steps: int | None = None,
) -> Rows:
    """The experts of each rank, as `plan(placement=)` takes them: replicas for the experts with most load, and even loads on the ranks.

    Args:
        loads: the rows of each expert in a step, [E], or [P, E] with one row for the tokens of each
            rank: a tensor on the CPU, an array or a list. Add them up over the group first
            (``torch.distributed.all_reduce``): the result depends on nothing else, so it is the
            same on all ranks.
        ranks: P, the ranks of the group.
        slots: L, the experts that each rank holds. P * L is at least E. What is more than E are
            replicas. L is at most E: a rank holds an expert once.
        links: the ranks of each node, for ``loads`` [P, E]. Ranks with the same experts' loads are
            then chosen such that most tokens stay inside their node. The imbalance does not change.
        current: the placement now, [P, L]. Without it, the placement is made anew. With it, each
            expert that stays keeps its slot, and experts move only if it pays.
        earlier: the loads of other steps, before those of ``loads``, [E] or [P, E]. If the experts' order
            by load then says nothing about their order now, even loads are expected to come, from any
            rank. So loads that are new at random each time move next to nothing.
        horizon: the steps for which a new placement is kept. Only for ``current``.
        move_cost: the time of moving one expert with its optimizer state to another rank, in the
            time in which a rank computes one row: bytes / bandwidth * rows per second. Moving m slots
            pays if the fullest rank's rows in ``horizon`` steps become fewer by more than
            m * move_cost. By default it is a tenth of the mean load of a rank. Nothing
            moves if the fullest rank is above the mean by no more than chance makes it, for loads that
            are counts of rows.
        steps: how often the search changes the placement. More steps find better ones, in more time.
            By default it is 200 / P, at least 3.

    Returns:
        [P, L] as lists of ints. Loads of 0 count as even ones.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, shape or value.

    >>> place([6, 2, 2, 2], ranks=2, slots=3)
    [[0, 2, 1], [0, 3, 1]]
    >>> place([6, 2, 2, 2], ranks=2, slots=2, current=[[0, 1], [2, 3]])  # no swap makes the fullest rank emptier
    [[0, 1], [2, 3]]
    >>> place([600, 500, 200, 100], ranks=2, slots=2, current=[[0, 1], [2, 3]])
    [[2, 1], [0, 3]]
    >>> place([600, 500, 200, 100], 2, 2, current=[[0, 1], [2, 3]], earlier=[100, 500, 200, 600])  # those loads did not last
    [[0, 1], [2, 3]]

    The first placement gives a replica to the expert with the largest load per replica, again and
    again, as EPLB does (https://github.com/deepseek-ai/EPLB). It then deals the replicas to the
    ranks, the largest to the emptiest rank. From there, or from ``current``, a search swaps two slots,
    or overwrites a replica, such that the fullest rank becomes emptier. If nothing helps, it takes the least
    harm and goes on. The best placement on its way is the result.

    Every sum is one of whole numbers, ties go to the lowest rank, slot and expert, and numpy computes
    in float64: equal arguments give equal placements.
    """
    load, sources = read_loads(loads)
    _check_sizes(ranks, slots, len(load), links, sources)
    if earlier is not None:
        before, _ = read_loads(earlier, "earlier")
        if len(before) != len(load):
            wrong_value("earlier", f"of {len(before)} experts", f"of loads' {len(load)}")
        if not lasts(load, before):
            load, sources = np.full(len(load), load.sum() / len(load)), None  # nor is it known from where tokens will come
    cost = COST * load.sum() / ranks if move_cost is None else move_cost
    steps = max(3, 200 // ranks) if steps is None else steps
    if not (horizon > 0 and cost >= 0 and steps >= 0):
        wrong_value("horizon, move_cost and steps", f"{horizon}, {move_cost} and {steps}", "positive, 0 or more, and 0 or more")
    if current is None:
        rows = _search(load, deal(load, replicas(load, ranks, slots), ranks, slots), steps, 0.0, 0.0)
        return (rows if links is None or sources is None else _near(sources, rows, links, 0.0)).tolist()
    now = read_placement(current, "current", len(load))
    if now.shape != (ranks, slots):
        wrong_value("current", f"of shape {list(now.shape)}", f"of shape [ranks, slots] = [{ranks}, {slots}]")
    rows = _search(load, now, steps, cost / horizon, CHANCE)
    if links is not None and sources is not None:
        rows = _near(sources, rows, links, 2 * slots * cost / horizon)
    return rows.tolist()


def replicas(load: Floats, ranks: int, slots: int) -> Ints:
    """[E]: the replicas of each expert, P * L in all and at most P of one: the next goes to the largest load per replica."""
    counts, more = [1] * len(load), ranks * slots - len(load)
    largest = np.argsort(-load, kind="stable")[:more]  # no other gets a replica
    heap = list(zip((-load[largest]).tolist(), largest.tolist(), strict=True))  # ordered, so it is a heap
    for _ in range(more):
        while counts[heap[0][1]] == ranks:
            heapq.heappop(heap)
        expert = heap[0][1]
        counts[expert] += 1
        heapq.heapreplace(heap, (-load[expert] / counts[expert], expert))
    return np.array(counts)


def deal(load: Floats, counts: Ints, ranks: int, slots: int) -> Ints:
    """[P, L]: in each of L rounds every rank gets one replica, the largest to the emptiest rank.

    The replicas of an expert are neighbours in the deal. So at most one expert is in two rounds: in the second one its replicas go to
    the ranks that do not have it yet.
    """
    share = load / counts
    order = np.argsort(-share, kind="stable")
    dealt = np.repeat(order, counts[order]).reshape(slots, ranks)
    rows, full = np.empty((ranks, slots), np.int64), np.zeros(ranks)
    for i, experts in enumerate(dealt):
        to = np.argsort(full, kind="stable")
        if i and experts[0] == dealt[i - 1, -1]:
            lacks = ~(rows[to, :i] == experts[0]).any(1)
            again = int((experts == experts[0]).sum())
            first = np.flatnonzero(lacks)[:again]
            to = np.concatenate((to[first], np.delete(to, first)))
        rows[to, i] = experts
        full[to] += share[experts]
    return rows


class _Ranks:
    """The ranks' loads under a placement, and what the search asks about them."""

    def __init__(self, load: Floats, rows: Ints) -> None:
        self.load, self.rows = load, rows
        self.counts = np.bincount(rows.ravel(), minlength=len(load))
        self.share = np.rint(load / self.counts)
        self.slot = self.share[rows]  # [P, L]
        self.loads = self.slot.sum(1)  # [P]
        self.has = np.zeros((len(load), len(rows)), bool)  # [E, P]
        self.has[rows, np.arange(len(rows))[:, None]] = True

    def fullest_other_holder(self, rank: int) -> Floats:
        """[P, L]: the load of the fullest rank that holds the expert of each slot as well, besides the slot's own and ``rank``."""
        order = np.argsort(self.loads, kind="stable")
        order = order[order != rank]
        experts = self.rows[order].ravel()
        holder, value = np.repeat(order, self.rows.shape[1]), np.repeat(self.loads[order], self.rows.shape[1])
        first, first_load, second_load = np.full(len(self.load), -1), np.full(len(self.load), -1.0), np.full(len(self.load), -1.0)
        first[experts], first_load[experts] = holder, value  # the last of several assignments, the fullest, remains
        rest = first[experts] != holder
        second_load[experts[rest]] = value[rest]
        return np.where(first[self.rows] == np.arange(len(self.rows))[:, None], second_load[self.rows], first_load[self.rows])


def _search(load: Floats, rows: Ints, steps: int, cost: float, chance: float) -> Ints:
    """The best placement on the way of ``steps`` changes from ``rows``: of least fullest load plus ``cost`` for each slot that differs.

    ``cost`` is in rows. If the fullest rank is within ``chance`` standard deviations of the mean count, ``rows`` is the best.
    """
    total = float(load.sum()) or 1.0
    units = np.rint(load * (UNITS / total)) if load.any() else np.full(len(load), float(UNITS // len(load)))
    price, start = cost * UNITS / total, rows
    best, ranks = rows, _Ranks(units, rows)
    least, even = float(ranks.loads.max()), UNITS / len(rows)
    if least - even < chance * math.sqrt(even * UNITS / total):
        return rows
    touched: dict[tuple[int, int], int] = {}  # the slots changed last, which rest for a while
    for step in range(steps):
        if float(ranks.loads.max()) <= even + price:
            break
        changed = _change(ranks, {slot for slot, at in touched.items() if step - at < 4})
        if changed is None:
            break
        rows, slots = changed
        touched |= dict.fromkeys(slots, step)
        ranks = _Ranks(units, rows)
        top = float(ranks.loads.max())
        value = top + price * int((rows != start).sum())
        if value < least:
            best, least = rows, value
    return best


def _change(ranks: _Ranks, resting: set[tuple[int, int]]) -> tuple[Ints, list[tuple[int, int]]] | None:
    """The placement after the change that leaves the least load on the fullest of the ranks it touches, and the slots it wrote."""
    load, rows, counts, share, loads, has = ranks.load, ranks.rows, ranks.counts, ranks.share, ranks.loads, ranks.has
    full = int(loads.argmax())
    mine = rows[full]  # [L]
    top = loads[full]
    rests = np.zeros(rows.shape, bool)
    for slot in resting:
        rests[slot] = True
    # Slot i of the fullest rank is swapped with slot j of rank p: [L, P, L].
    less = ranks.slot[full][:, None, None] - ranks.slot
    swap = np.maximum(top - less, loads[:, None] + less)
    taken = has[mine][:, :, None] | rests
    swap[taken | has[rows, full] | rests[full][:, None, None]] = np.inf
    # Slot j of rank p, a replica, is overwritten by a further replica of slot i's expert: [L, P, L]. The overwritten expert's other
    # replicas get more each.
    spare = counts > 1
    more = np.where(spare, load / np.maximum(counts - 1, 1) - share, np.inf)[rows]  # [P, L]
    others = ranks.fullest_other_holder(full) + more
    part = load[mine] / (counts[mine] + 1)
    rank = top - share[mine] + part
    here = np.where(has[rows, full], more, 0.0)
    write = np.maximum(loads[:, None] - ranks.slot + part[:, None, None], rank[:, None, None] + here)
    np.maximum(write, others, out=write)
    write[taken | ~spare[rows]] = np.inf
    # Slot i of the fullest rank, a replica, is overwritten by any other expert: [L, E].
    drop = np.maximum(top - share[mine][:, None] + load / (counts + 1), others[full][:, None])
    drop[~spare[mine][:, None] | has[:, full] | rests[full][:, None]] = np.inf
    found = [float(each.min()) for each in (swap, write, drop)]
    if min(found) == np.inf:
        return None
    rows = rows.copy()
    if found[0] == min(found):
        i, p, j = (int(at) for at in np.unravel_index(int(swap.argmin()), swap.shape))
        rows[full, i], rows[p, j] = rows[p, j], mine[i]
        return rows, [(full, i), (p, j)]
    if found[1] == min(found):
        i, p, j = (int(at) for at in np.unravel_index(int(write.argmin()), write.shape))
        rows[p, j] = mine[i]
        return rows, [(p, j)]
    i, expert = (int(at) for at in np.unravel_index(int(drop.argmin()), drop.shape))
    rows[full, i] = expert
    return rows, [(full, i)]


def _near(sources: Floats, rows: Ints, links: Links, cost: float) -> Ints:
    """The same sets of experts, given to ranks such that most rows stay inside their node: a swap of two ranks' sets pays above ``cost``.

    A set's rows that stay are a sum over its experts, so a swap's gain does not depend on the other sets.
    """
    nodes = len(rows) // links.node
    counts = np.bincount(rows.ravel(), minlength=sources.shape[1])
    shares = np.rint(sources.reshape(nodes, links.node, -1).sum(1) / counts * 2**10)  # [nodes, E], in whole parts
    stays = shares[:, rows].sum(2).T  # [P, nodes]: the rows that stay if a set is on a node
    where = np.arange(len(rows)) // links.node
    for _ in range(len(rows)):
        moved = stays[:, where]  # [P, P]: set p on the node of rank q
        gain = moved + moved.T - np.diag(moved)[:, None] - np.diag(moved)
        p, q = divmod(int(gain.argmax()), len(rows))
        if gain[p, q] * links.between <= cost * 2**10:
            break
        rows = rows.copy()
        rows[[p, q]], stays[[p, q]] = rows[[q, p]], stays[[q, p]]
    return rows


def _check_sizes(ranks: int, slots: int, experts: int, links: Links | None, sources: Floats | None) -> None:
    for name, value in (("ranks", ranks), ("slots", slots)):
        if not isinstance(value, int) or isinstance(value, bool):
            wrong_type(name, type(value).__name__, "an int")
    if not (ranks > 0 and 0 < slots <= experts <= ranks * slots):
        wrong_value("ranks and slots", f"{ranks} and {slots}", f"such that slots <= E <= ranks * slots, with E = {experts}")
    if sources is not None and len(sources) != ranks:
        wrong_value("loads", f"of shape {list(sources.shape)}", f"of shape [E] or [P, E], with P = {ranks} ranks")
    if links is None:
        return
    if sources is None:
        wrong_value("loads", "of shape [E]", "of shape [P, E] with links: where tokens are decides what stays inside a node")
    if links.node < 1 or ranks % links.node:
        wrong_value("links.node", links.node, f"a divisor of the {ranks} ranks")
