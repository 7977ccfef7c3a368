"""What the fuzz tests draw: routings, placements, and how many cases of each test.

`make test` runs some of them, the same ones every time; `make fuzz` very many, others each time. What it finds it shrinks, prints with
the seed that draws it again, and keeps in .hypothesis; a failure that was mended stays as an ``@example`` of its test.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

NIGHTLY = os.environ.get("FUZZ") == "1"
DRAWN = 24  # slots of a routing that are drawn, and so shrunk, one by one; of a larger one the seed is

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def fuzzed(suite: int, nightly: int) -> Callable[[Any], Any]:
    """The decorator of a test: so many cases in `make test` and in `make fuzz`."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]  # these depend on what else the machine does
    common: dict[str, Any] = {"deadline": None, "suppress_health_check": slow}
    if NIGHTLY:
        return settings(max_examples=nightly, print_blob=True, **common)
    return settings(max_examples=suite, derandomize=True, database=None, **common)


@st.composite
def routings(draw: st.DrawFn, tokens: int, k: int, num_experts: int, lowest: int = -1) -> Tensor:
    """[tokens, k] int64 ids in [lowest, num_experts); -1 in some slots, few experts in some routings; an expert may repeat in a token."""
    if tokens * k <= DRAWN:
        ids = draw(st.lists(st.integers(lowest, num_experts - 1), min_size=tokens * k, max_size=tokens * k))
        return torch.tensor(ids, dtype=torch.int64).view(tokens, k)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    used, dropped = draw(st.integers(1, num_experts)), draw(st.sampled_from((0.0, 0.2, 0.9, 1.0)))
    ids = torch.randint(0, used, (tokens, k), generator=generator) + draw(st.integers(0, num_experts - used))
    return ids if lowest >= 0 else ids.masked_fill(torch.rand(tokens, k, generator=generator) < dropped, -1)


@st.composite
def placements(draw: st.DrawFn, num_experts: int, ranks: int) -> list[list[int]]:
    """[P, L]: every expert on some rank, and others of them where there is room."""
    shuffled = draw(st.permutations(range(num_experts)))
    fewest = -(-num_experts // ranks)
    local = draw(st.integers(fewest, num_experts))
    rows = []
    for rank in range(ranks):
        row = list(shuffled[rank::ranks])
        others = draw(st.permutations([expert for expert in range(num_experts) if expert not in row]))
        row += others[: local - len(row)]
        turn = draw(st.integers(0, local - 1))
        rows.append(row[turn:] + row[:turn])
    return rows


def layout(x: Tensor, how: int) -> Tensor:
    """The same values [A, B], contiguous or with one of three other layouts in memory."""
    if how == 1:
        return x.t().contiguous().t()
    if how == 2:
        wide = x.new_zeros(x.shape[0] + 1, 2 * x.shape[1] + 1)
        wide[1:, 1::2] = x
        return wide[1:, 1::2]
    if how == 3:
        high = x.new_zeros(3 * x.shape[0], x.shape[1])
        high[::3] = x
        return high[::3]
    return x


layouts = st.integers(0, 3)
