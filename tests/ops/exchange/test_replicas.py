"""replicas_exchange, put_replicas and replica_shares: replicas as a loop over experts and ranks has them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.exchange.collectives import wait
from moecomm.ops.exchange.replicas import put_replicas, replica_shares, replicas_exchange, replicas_to_send
from tests.spawn import run_ranks

PLACEMENTS = [[[0, 1, 2], [2, 0, 3], [3, 4, 0]], [[0, 1], [2, 3], [4, 5]], [[1, 0], [0, 1], [1, 0]]]
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others run on one rank of another graph


def weights(rank: int, local: int, dtype: torch.dtype) -> list[Tensor]:
    seed = torch.Generator().manual_seed(rank)
    return [torch.randn(local, *shape, generator=seed).to(dtype) for shape in ((3, 2), (), (0,))]


def expected(rows: list[list[int]], rank: int, dtype: torch.dtype, add: bool) -> list[Tensor]:
    every = [weights(p, len(rows[0]), dtype) for p in range(len(rows))]
    result = [tensor.clone() for tensor in every[rank]]
    for slot, expert in enumerate(rows[rank]):
        holders = [(p, row.index(expert)) for p, row in enumerate(rows) if expert in row]
        for i, tensor in enumerate(result):
            parts = torch.stack([every[p][i][there] for p, there in holders]).double()
            tensor[slot] = parts.sum(0) if add else parts[0]
    return result


def exchanged(tensors: list[Tensor], flat: list[int]) -> Tensor:
    here = flat, dist.get_world_size(), dist.group.WORLD.group_name  # type: ignore[union-attr]
    return wait(replicas_exchange(tensors, replicas_to_send(tensors[0], *here), *here))


def here() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    for rows in PLACEMENTS:
        flat = sum(rows, [])
        for dtype in (torch.float64, torch.bfloat16):
            for add in (False, True):
                tensors = weights(rank, len(rows[0]), dtype)
                put_replicas(tensors, exchanged(tensors, flat), flat, ranks, add, name)
                torch.testing.assert_close(tensors, expected(rows, rank, dtype, add))
        shares = replica_shares(torch.zeros(1), flat, ranks, name)
        assert shares.tolist() == [1 / sum(expert in row for row in rows) for expert in rows[rank]]
        tensors = weights(rank, len(rows[0]), torch.float32)
        opcheck(replicas_to_send, (tensors[0], flat, ranks, name), test_utils=TESTS)
        send = replicas_to_send(tensors[0], flat, ranks, name)
        opcheck(replicas_exchange, (tensors, send, flat, ranks, name), test_utils=TESTS)
        opcheck(put_replicas, (tensors, exchanged(tensors, flat), flat, ranks, True, name), test_utils=TESTS)
        opcheck(replica_shares, (tensors[0], flat, ranks, name), test_utils=TESTS)


@pytest.mark.slow
def test_replicas_become_the_first_or_the_sum_of_all_and_the_ops_pass_opcheck() -> None:
    run_ranks(here, 3)
