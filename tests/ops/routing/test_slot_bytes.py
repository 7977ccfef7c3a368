"""What is sent of a pair's slots: packed and unpacked, byte by byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.routing.count_pairs import count
from moecomm.ops.routing.counting_sort import bounded_sort, counting_sort
from moecomm.ops.routing.slot_bytes import message_cpu, message_fake, message_triton, unpack_cpu, unpack_fake, unpack_slots, unpack_triton
from tests.ops.cases import assert_same_layout, guarded, routing, seeded, strided


@pytest.mark.slow
def test_unpack_passes_opcheck(device: str) -> None:
    for received, k, local, dtype, width in ((3, 2, 4, torch.float32, 10), (0, 2, 4, torch.float32, 10), (2, 3, 300, torch.bfloat16, 12)):
        message = torch.randint(0, 256, (received, width), dtype=torch.uint8, generator=seeded(k))
        opcheck(unpack_slots, (message.to(device), k, local, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "k", "local"), [(5, 2, 3), (33, 1, 2), (70, 3, 129), (9, 8, 2**15 + 1), (0, 2, 3), (40, 5, 1)])
def test_both_paths_pack_and_unpack_alike(tokens: int, k: int, local: int, dtype: torch.dtype, device: str) -> None:
    ranks = 3
    experts = routing(tokens, k, ranks * local, seed=tokens)
    weights = torch.rand(tokens, k, dtype=torch.float64, generator=seeded(k)).to(dtype)
    keys, _ = count(experts, ranks * local, ranks, [])
    pairs, _, _ = counting_sort(keys, ranks, int((keys >= 0).sum()))
    for order, padded in ((pairs, False), (bounded_sort(keys, ranks, max(1, tokens // 2))[0], True)):
        for ids, factors in zip(strided(experts), strided(weights), strict=True):
            args = ids, factors, keys, order, local, padded
            messages = message_cpu(*args), guarded(message_triton, *(a.to(device) if isinstance(a, Tensor) else a for a in args))
            assert torch.equal(messages[0], messages[1].cpu())
            assert_same_layout(message_fake(*args), messages[1])
            want_ids, want = torch.full((order.shape[0], k), -1), torch.zeros(order.shape[0], k, dtype=dtype)
            for row, pair in enumerate(order.tolist()):
                if pair >= 0:
                    here = ids[pair // k] - int(keys.flatten()[pair]) * local
                    want_ids[row], want[row] = torch.where((here >= 0) & (here < local), here, -1), factors[pair // k]
            for unpack in (unpack_cpu, unpack_triton):
                message = messages[0].to(device) if unpack is unpack_triton else messages[0]
                got = guarded(unpack, message, k, local, dtype)
                assert_same_layout(unpack_fake(message, k, local, dtype), got)
                assert torch.equal(got[0].cpu(), want_ids.to(torch.int32))
                assert torch.equal(got[1].cpu(), want)
