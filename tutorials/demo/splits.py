"""Check that a split of the ranks fits the model: which numbers do not multiply or divide, and the nearest ones that do."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator

from moecomm.planner.splits import Split, splits
from tutorials.demo.model import Shape

SHOWN = 3  # how many of the nearest that fit are shown
CHANGED = ("ranks", "pp", "tp", "ep", "etp", "experts", "top_k", "batch")  # the options that must fit


def microbatches(stages: int) -> int:
    """The number of microbatches: twice the stages, or 1 for one stage, which never waits.

    With twice the stages, a stage idles in stages - 1 of its 3 * stages - 1 time slots.
    """
    return 2 * stages if stages > 1 else 1


def misfits(options: Namespace, shape: Shape) -> Iterator[str]:
    """Yield a message for each way in which the options do not fit: the numbers, and the condition on them."""
    ranks, pp, tp, ep, etp = options.ranks, options.pp, options.tp, options.ep, options.etp
    if shape.layers % pp:
        yield f"--pp was {pp}; it must divide the {shape.layers} layers"
    if shape.heads % tp:
        yield f"--tp was {tp}; it must divide the {shape.heads} heads of the attention"
    if shape.hidden % etp:
        yield f"--etp was {etp}; it must divide the hidden dim of an expert, {shape.hidden}"
    if options.top_k > options.experts:
        yield f"--top-k was {options.top_k}; it must be at most --experts, {options.experts}"
    if options.experts % ep:
        yield f"--experts was {options.experts}; it must be a multiple of --ep, {ep}"
    if ranks % (pp * tp):
        yield f"--pp * --tp was {pp} * {tp} = {pp * tp}; it must divide --ranks, {ranks}"
        return
    dp, stage = ranks // (pp * tp), ranks // pp
    if stage % (ep * etp):
        yield f"--ep * --etp was {ep} * {etp} = {ep * etp}; it must divide the ranks of a stage, --ranks / --pp = {ranks} / {pp} = {stage}"
        return
    edp, parts = stage // (ep * etp), microbatches(pp)
    # If other ranks already split a parameter, FSDP2 shards it along the model's dim. It shards any dim but the first only evenly.
    if tp > 1 and shape.dim % dp:
        yield f"--ranks / (--pp * --tp) was {ranks} / ({pp} * {tp}) = {dp}; it must divide the width of the model, {shape.dim}"
    if ep * etp > 1 and shape.dim % edp:
        of = f"{ranks} / ({pp} * {ep} * {etp}) = {edp}"
        yield f"--ranks / (--pp * --ep * --etp) was {of}; it must divide the width of the model, {shape.dim}"
    if options.batch % (dp * parts):
        of = f"--ranks / (--pp * --tp) = {dp}" + (
            f", times the {parts} microbatches that --pp {pp} takes: {dp * parts}" if parts > 1 else ""
        )
        yield f"--batch was {options.batch}; it must be a multiple of the data-parallel ranks, {of}"


def default_ep(options: Namespace) -> int:
    """2 if --ranks / (--pp * --etp) is even, else 1."""
    return 2 if options.ranks // (options.pp * options.etp) % 2 == 0 and options.ranks >= 2 * options.pp * options.etp else 1


def nearest(options: Namespace, shape: Shape, ep_by_default: bool) -> list[str]:
    """The options to add or to replace, for the nearest splits that fit: those with the fewest changes, and the smallest ones."""
    found: dict[str, tuple[int, float]] = {}
    for fitting in fits(options, shape):
        changed = [name for name in CHANGED if getattr(fitting, name) != getattr(options, name)]
        if ep_by_default and "ep" not in changed and fitting.ep != default_ep(fitting):
            continue
        far = sum(abs(math.log(getattr(fitting, name) / getattr(options, name))) for name in changed)
        found[" ".join(f"--{name.replace('_', '-')} {getattr(fitting, name)}" for name in changed)] = len(changed), far
    fewest = min(count for count, _ in found.values())
    return sorted((text for text, (count, _) in found.items() if count == fewest), key=lambda text: found[text][1])[:SHOWN]


def fits(options: Namespace, shape: Shape) -> Iterator[Namespace]:
    """Yield every split that fits, of up to twice as many ranks. The experts and the batch are the nearest to those asked for."""
    for ranks in range(1, 2 * options.ranks + 1):
        for split, fitting in of_ranks(options, ranks):
            fitting.experts = multiple(options.experts, split.ep)
            fitting.batch = multiple(options.batch, split.dp * microbatches(split.pp))
            fitting.top_k = min(options.top_k, fitting.experts)
            if not any(misfits(fitting, shape)):
                yield fitting


def of_ranks(options: Namespace, ranks: int) -> Iterator[tuple[Split, Namespace]]:
    """Yield every split of ``ranks`` that the demo has options for, and the options with it."""
    for split in splits(ranks):
        if split.cp == 1:
            yield split, Namespace(**vars(options) | {"ranks": ranks, "pp": split.pp, "tp": split.tp, "ep": split.ep, "etp": split.etp})


def multiple(number: int, of: int) -> int:
    """The multiple of ``of`` that is nearest to ``number``, and at least ``of``.

    >>> multiple(7, 2), multiple(1, 4)
    (8, 4)
    """
    return max(of, round(number / of) * of)
