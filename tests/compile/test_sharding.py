"""The sharding rules of the local ops: the numbers of whole tensors, the placements that stay, and nothing sent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import moecomm.compile.sharding  # noqa: F401 - registers the rules
from moecomm.ops.rows.gather import gather
from moecomm.ops.rows.weighted_sum import weighted_sum
from tests.spawn import run_ranks

ORDER = torch.tensor([1, 0, 2, -1], dtype=torch.int32)  # [N], with one row of padding
POSITION = torch.tensor([[1, 0], [2, -1], [-1, -1]], dtype=torch.int32)  # [M, K]


def there_and_back(x: Tensor, weights: Tensor, order: Tensor, position: Tensor) -> list[Tensor]:
    """The rows, y, and the gradients of a function of both sums that is linear in each."""
    rows = gather(x, order, position)
    y = weighted_sum(rows, weights, order, position)
    plain = weighted_sum(rows, None, order, position)
    return [rows, y, plain, *torch.autograd.grad(y.sum() + 2 * plain.sum(), (x, weights))]


def on_ranks() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.rand(3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    expected = there_and_back(x, weights, ORDER, POSITION)

    def placed(t: Tensor, *placements: Placement) -> DTensor:
        return distribute_tensor(t.detach(), mesh, placements, src_data_rank=None)

    whole = Replicate(), Replicate()
    indices = placed(ORDER, *whole), placed(POSITION, *whole)
    for placements in ((Shard(1), Replicate()), (Shard(1), Shard(1)), (Replicate(), Shard(1))):
        leaves = placed(x, *placements).requires_grad_(), placed(weights, *whole).requires_grad_()
        with CommDebugMode() as sent:
            results = there_and_back(*leaves, *indices)
        assert sent.get_total_counts() == 0
        assert [r.placements for r in results[:4]] == [placements] * 4
        assert results[4].placements == tuple(Partial() if p == Shard(1) else p for p in placements)
        for result, right in zip(results, expected, strict=True):
            torch.testing.assert_close(result.full_tensor(), right, rtol=1e-12, atol=1e-12)

    part = DTensor.from_local(x.detach() / 2, mesh, [Partial(), Replicate()], run_check=False)
    leaves = part.requires_grad_(), placed(weights, *whole).requires_grad_()
    with CommDebugMode() as sent:
        rows = gather(leaves[0], *indices)
        y = weighted_sum(rows, leaves[1], *indices)
    assert sent.get_total_counts() == 0
    assert rows.placements == y.placements == (Partial(), Replicate())
    torch.testing.assert_close(y.full_tensor(), expected[1], rtol=1e-12, atol=1e-12)
    to_x, to_weights = torch.autograd.grad(y.full_tensor().sum(), leaves)
    whole_x = x.detach().requires_grad_()
    right = torch.autograd.grad(weighted_sum(gather(whole_x, ORDER, POSITION), weights, ORDER, POSITION).sum(), (whole_x, weights))
    torch.testing.assert_close(to_x.full_tensor(), right[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(to_weights.full_tensor(), right[1], rtol=1e-12, atol=1e-12)

    with pytest.raises(Exception, match=r"x was Shard\(dim=0\) on dim 1 of its mesh"):
        gather(placed(x, Replicate(), Shard(0)), *indices)


@pytest.mark.slow
def test_hidden_slices_and_partial_sums_pass_through_the_local_ops_and_nothing_is_sent() -> None:
    run_ranks(on_ranks, 4)
