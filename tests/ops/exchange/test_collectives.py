"""The collectives that are not moecomm's own ops."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.library import opcheck

from moecomm.ops.exchange import collectives
from tests.ops.cases import IN_FLIGHT
from tests.spawn import run_ranks


class Recorded:
    """A process group, and the names of what it is asked for."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.asked = group, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self.group, name)


def gathered_here() -> None:
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), Recorded(dist.group.WORLD)
    for shape in ((3, 2), (1,), (0, 4)):
        for dtype in (torch.float64, torch.bfloat16, torch.bool):
            each = [torch.randint(2, shape, generator=torch.Generator().manual_seed(other)).to(dtype) for other in range(ranks)]
            group.asked.clear()
            with patch.object(collectives, "process_group", lambda _: group):
                pending = collectives.start_all_gather(each[rank], ranks, dist.group.WORLD.group_name)
                assert torch.equal(collectives.all_gathered(pending, each[rank], ranks), torch.cat(each))
            assert group.asked == ["_allgather_base"]
            opcheck(
                collectives.gather_exchange,
                (each[rank].reshape(-1).view(torch.uint8), ranks, dist.group.WORLD.group_name),
                test_utils=IN_FLIGHT,
            )


def test_an_all_gather_is_not_torchs_functional_one_which_corrupts_gloos_heap() -> None:
    for ranks in (1, 2):
        run_ranks(gathered_here, ranks)
