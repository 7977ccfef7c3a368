"""The logger "moecomm": one line at level DEBUG for each plan that eager code makes.

Importing this module configures no logging.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moecomm.layer.plan import Plan
from moecomm.parallel.group import resolve_group

LOGGER = logging.getLogger("moecomm")
LOGGER.addHandler(logging.NullHandler())


def log_plan(plan: Plan, like: Sequence[Tensor]) -> None:
    """Log the sizes of a plan. Reads nothing from the device.

    Traced code logs nothing: its sizes are unknown during tracing, and a log line must not break the graph.
    """
    if torch.compiler.is_compiling() or not LOGGER.isEnabledFor(logging.DEBUG):
        return
    received, k = plan.weights.shape
    sent = 0 if plan.send_order is None else plan.send_order.shape[0]
    rows = plan.row_order.shape[0]
    if not all(isinstance(size, int) for size in (plan.tokens, sent, received, rows)):  # traced, but not by torch.compile
        return
    to = [] if plan.splits is None else plan.splits[0].numpy().tolist()
    most = f" (at most {max(to)} to a rank, {max(to) * len(to) / sent:.2f} times the mean)" if sent and to else ""
    row = str(sum(math.prod(leaf.shape[1:]) * leaf.itemsize for leaf in like)) if like else "unknown without like"
    LOGGER.debug(
        "plan on %d ranks: T %d, K %d, E %d; pairs sent S %d%s, received R %d; rows N %d; bytes a row %s%s",
        resolve_group(plan.group).size, plan.tokens, k, plan.num_experts, sent, most, received, rows, row,
        "" if plan.dropped is None else "; static: S, R and N count padding",
    )  # fmt: skip
