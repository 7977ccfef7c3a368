"""How well does the model of `benchmarks/model.py` predict gloo's exchanges on this machine?

    python -m benchmarks.links             # or: make bench

All ranks of this machine share its cores and its memory, so there is one link for all ranks. It has three numbers: a latency, an overhead
for each message of any rank, and a speed for the bytes of all ranks. They are fitted to exchanges of equal messages on 2 and 4 ranks, at
every second size. They predict the other sizes, 8 ranks, and the rows of a routed layer there and back. For those rows the model uses the
expected number of pairs and does not count them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.inputs import routed
from benchmarks.model import HOPPER, Load, predicted
from benchmarks.timing import WARM, Line, command, interleaved, quartiles
from moecomm.planner import Link
from moecomm.planner.cluster import fit_link
from moecomm.planner.routing import pairs
from tests.spawn import run_ranks

RANKS, FITTED = (2, 4, 8), (2, 4)
BYTES = tuple(4**i for i in range(4, 12))  # to each rank: 256 to 4 Mi; every other one is fitted
LAYER, EXPERTS, TOP_K = Load(tokens=512, dim=512, experts=64, k=8, itemsize=4), 64, (1, 2, 4, 8)
REPEATS = 9


class Measured(NamedTuple):
    what: str
    ranks: int
    exchanges: int  # one behind the other
    bytes_to_each: float  # of each
    seconds: tuple[float, float, float]  # the quartiles


def main() -> None:
    command(
        "links", measure, lambda device: {"cluster": HOPPER._asdict(), "gpus": predicted(HOPPER, [8 * 2**i for i in range(10)])}, __doc__
    )


def measure(device: str, memory: str) -> list[Line]:
    if memory != WARM:
        return []  # every buffer here is already mapped
    measured = [each for ranks in RANKS for each in run_ranks(exchanges_here, ranks, timeout=300)[0]]
    link = fit([each for each in measured if fitted(each)])
    print(f"latency {1e6 * link.latency:.0f} us, {1e6 * link.overhead:.1f} us per message, {link.speed / 1e9:.2f} GB/s", flush=True)
    return [compared(link, each) for each in measured]


def fitted(each: Measured) -> bool:
    return each.what == "equal parts" and each.ranks in FITTED and BYTES.index(int(each.bytes_to_each)) % 2 == 0


def exchanges_here() -> list[Measured]:
    """What this machine takes for exchanges of equal parts, and for the rows of a layer: one a pair, and one a slot."""
    ranks = dist.get_world_size()
    cases: dict[tuple[str, float, int], Callable[[], object]] = {}
    for size in BYTES:
        send = torch.ones(ranks, size, dtype=torch.uint8)
        cases["equal parts", size, 1] = partial(dist.all_to_all_single, torch.ones_like(send), send)
    row, local = LAYER.dim * LAYER.itemsize, EXPERTS // ranks
    for k in TOP_K:
        experts = routed(LAYER.tokens, 1, EXPERTS, k, torch.float32)[1] // local  # [T, K], the rank of each slot
        in_pairs = (experts.unsqueeze(2) == torch.arange(ranks)).any(1).sum(0)  # [P]
        for what, rows, expected in (
            ("a row a pair", in_pairs, pairs(EXPERTS, k, ranks)),
            ("a row a slot", torch.bincount(experts.flatten(), minlength=ranks), k),
        ):
            cases[f"{what}, K = {k}", LAYER.tokens * expected / ranks * row, 2] = there_and_back(rows, row)
    times = interleaved({str(key): case for key, case in cases.items()}, "cpu", REPEATS)
    return [Measured(key[0], ranks, key[2], key[1], quartiles(times[str(key)])) for key in cases]


def there_and_back(rows: Tensor, row: int) -> Callable[[], object]:
    arriving = torch.empty_like(rows)
    dist.all_to_all_single(arriving, rows)
    out, into = rows.tolist(), arriving.tolist()
    send, receive = (torch.ones(sum(splits), row, dtype=torch.uint8) for splits in (out, into))

    def run() -> None:
        dist.all_to_all_single(receive, send, into, out)
        dist.all_to_all_single(send, receive, out, into)

    return run


def seconds(link: Link, ranks: int, bytes_to_each: float) -> float:
    """Of one exchange on a machine whose ranks share the link: of the bytes, each rank keeps its own."""
    messages = ranks * (ranks - 1)
    return link.latency + messages * (link.overhead + bytes_to_each / link.speed)


def fit(measured: list[Measured]) -> Link:
    """The planner's fit: every message of any rank takes its time on the one link."""
    messages = [each.ranks * (each.ranks - 1) for each in measured]
    return fit_link(messages, [each.bytes_to_each for each in measured], [each.seconds[1] / each.exchanges for each in measured])


def compared(link: Link, each: Measured) -> Line:
    low, middle, high = each.seconds
    expected = each.exchanges * seconds(link, each.ranks, each.bytes_to_each)
    ratios = sorted(expected / value for value in (low, middle, high))
    line = {"what": each.what, "ranks": each.ranks, "bytes to each": each.bytes_to_each, "fitted": fitted(each), "link": link._asdict()}
    return line | {
        "case": "predicted", "to": "measured", "low": ratios[0], "ratio": ratios[1], "high": ratios[2],
        "milliseconds": [1e3 * expected, 1e3 * middle],
    }  # fmt: skip


if __name__ == "__main__":
    main()
