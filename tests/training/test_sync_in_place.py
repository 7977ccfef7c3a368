"""sync_params_ and sync_grads_: any model's parameters and gradients, in place, the same bits on every rank; and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import moecomm.functional as mf
from moecomm.errors import MoECommError
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic
from tests.training.test_sync_params import A2A, GATHER, assert_reduced, same


class Model(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        seed = torch.Generator().manual_seed(rank)
        self.dense = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 3, bias=False)
        self.low = nn.Parameter(torch.randn(6, 2, generator=seed).bfloat16().t())
        self.frozen = nn.Parameter(torch.randn((), generator=seed, dtype=torch.float64), requires_grad=False)
        self.register_buffer("steps", torch.arange(5) * rank)
        self.register_buffer("mask", torch.randn(3, generator=seed) > 0, persistent=False)
        self.register_buffer("nothing", torch.zeros(0, 3))
        with torch.no_grad():
            self.dense.weight.normal_(generator=seed)
            self.dense.bias.normal_(generator=seed)
        self.tied.weight = self.dense.weight

    def tensors(self) -> list[Tensor]:
        return [tensor.detach() for tensor in (*self.parameters(), *self.buffers())]


def in_place_here(src: int, bucket_bytes: int) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with patch("moecomm.training.sync_params.BUCKET_BYTES", bucket_bytes):
        model = Model(rank)
        strides = [tensor.stride() for tensor in model.tensors()]
        assert mf.sync_params_(model, None, src) is None
        assert same(model.tensors(), Model(src).tensors())
        assert [tensor.stride() for tensor in model.tensors()] == strides
        assert model.dense.weight.requires_grad
        assert model.dense.weight.grad_fn is None
        forms: list[Callable[[Model], Any]] = [
            lambda model: dict(model.named_parameters()),
            lambda model: list(model.parameters()) * 2,
            lambda model: model.parameters(),
        ]
        for form in forms:
            model = Model(rank)
            mf.sync_params_(form(model), None, src)
            assert same([*model.parameters()], [*Model(src).parameters()])
            assert same([*model.buffers()], [*Model(rank).buffers()])
        model = Model(rank)
        mf.sync_params_(model.low, None, src)
        assert torch.equal(model.low, Model(src).low)
        assert torch.equal(model.frozen, Model(rank).frozen)
    if ranks > 1:
        model = Model(rank)
        with Traffic() as traffic:
            mf.sync_params_(model, None, src)
        assert traffic.collectives == [A2A] + ["broadcast"] * 5  # what is to be sent, then a dtype each


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
@pytest.mark.parametrize("bucket_bytes", [1, 30, 2**20])
def test_the_parameters_and_buffers_of_src_overwrite_the_others(ranks: int, bucket_bytes: int) -> None:
    run_ranks(in_place_here, ranks, ranks - 1, bucket_bytes)


def trained(rank: int, some_missing: bool) -> list[Tensor]:
    """Parameters and their gradients on a rank: tied, frozen and empty ones, ones of other strides, and ones that lack a gradient."""
    seed = torch.Generator().manual_seed(rank)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64] * 2
    shapes = [(5, 3), (7,), (2, 2), (), (0, 4), (1,), (3,), (2, 3)]
    params = []
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        param = torch.zeros(shape, dtype=dtype).requires_grad_()
        param.grad = torch.randn(shape, generator=seed).to(dtype)
        if some_missing and (i == 1 or (i == 2 and rank > 0) or (i == 5 and rank == 0)):
            param.grad = None
        params.append(param)
    params[7].grad = params[7].grad.t().contiguous().t()  # type: ignore[union-attr]
    frozen = torch.ones(3)
    frozen.grad = torch.full((3,), float(rank))
    return [*params, params[0], frozen, torch.ones(2)]


def grads_here(some_missing: bool) -> dict[tuple[str, str], list[Tensor | None]]:
    results = {}
    for reduce, scale in (("mean", "before"), ("mean", "after"), ("sum", "after")):
        for bucket_bytes in (1, 40, 2**20):
            params = trained(dist.get_rank(), some_missing)
            own = [param.grad for param in params]
            mf.sync_grads_(params, None, reduce, scale, bucket_bytes)  # type: ignore[arg-type]
            for param, before in zip(params, own, strict=True):
                assert before is None or param.grad is before  # in place: whoever holds it sees the sum
            first = results.setdefault((reduce, scale), [param.grad for param in params])
            for want, param in zip(first, params, strict=True):
                assert (want is None) == (param.grad is None)
                assert want is None or torch.equal(want, param.grad)  # whatever the buckets
    return results


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
@pytest.mark.parametrize("some_missing", [False, True])
def test_gradients_become_the_ranks_mean_or_sum_in_place(ranks: int, some_missing: bool) -> None:
    params = [trained(rank, some_missing) for rank in range(ranks)]
    results = run_ranks(grads_here, ranks, some_missing)
    for how, first in results[0].items():
        for i, got in enumerate(first[:8]):
            parts = [its[i].grad for its in params]
            if all(part is None for part in parts):
                assert all(here[how][i] is None for here in results)
                continue
            assert_reduced([got], [[torch.zeros_like(got) if part is None else part] for part in parts], 1 if how[0] == "sum" else ranks)
            assert all(torch.equal(here[how][i], got) for here in results)
        for rank, here in enumerate(results):
            assert torch.equal(here[how][8], here[how][0])  # tied: reduced once
            assert torch.equal(here[how][9], torch.full((3,), float(rank)))  # frozen: left alone
            assert here[how][10] is None


def grads_traffic_here() -> None:
    rank = dist.get_rank()
    for bucket_bytes, buckets in ((1, 8), (2**20, 4)):
        with Traffic() as traffic:
            mf.sync_grads_(trained(rank, some_missing=False), None, bucket_bytes=bucket_bytes)
        assert traffic.collectives == [A2A] * buckets + [GATHER] * buckets  # all are on their way before the first is waited for
        assert traffic.reads == []
    with Traffic() as traffic:
        mf.sync_grads_(trained(rank, some_missing=True), None)
    assert traffic.collectives == [A2A] * 4 + [GATHER] * 4
    assert traffic.reads == ["tolist"] * (1 if rank == 0 else 2)  # for the dtypes in which a gradient is missing
    with Traffic() as traffic:
        mf.sync_grads_([torch.ones(3)], None)
        mf.sync_grads_([], None)
    assert traffic.collectives == []


def test_all_buckets_are_sent_before_one_is_waited_for_and_only_a_missing_gradient_is_asked_for() -> None:
    run_ranks(grads_traffic_here, 2)


def gradient_dtypes_here() -> None:
    """A gradient of another dtype than its parameter's is sent in its own, also where it is missing."""
    rank = dist.get_rank()
    param = torch.zeros(3, dtype=torch.bfloat16).requires_grad_()
    param.grad_dtype = torch.float32
    if rank == 0:
        param.grad = torch.full((3,), 1 + 2.0**-20)
    mf.sync_grads_(param, None, "sum")
    assert param.grad.dtype == torch.float32
    assert torch.equal(param.grad, torch.full((3,), 1 + 2.0**-20))


def test_gradients_are_sent_in_their_own_dtype() -> None:
    run_ranks(gradient_dtypes_here, 2)


def on_a_mesh_here() -> None:
    """2 x 2 ranks: the experts' weights sharded over ep, all alike over dp."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    dp, ep = mesh.get_local_rank("dp"), mesh.get_local_rank("ep")

    def weight_of(dp: int) -> DTensor:
        local = torch.full((3, 2), 10.0 * dp + ep)
        return DTensor.from_local(local, mesh["ep"], [Shard(0)]).requires_grad_()

    for group in (mesh["dp"], (mesh, 0), mesh.get_group("dp")):
        weight = weight_of(dp)
        synced = mf.sync_params({"weight": weight}, group, src=1)["weight"]  # rank 1 of the group: of the world, rank 2 or 3
        assert synced.placements == weight.placements
        assert synced.shape == (6, 2)
        assert torch.equal(synced.to_local(), torch.full((3, 2), 10.0 + ep))
        (synced.to_local() * (1.0 + 2 * dp + ep)).sum().backward()
        assert torch.equal(weight.grad.to_local(), torch.full((3, 2), 2.0 + ep))  # the mean over dp of 1 + ep and 3 + ep

        mf.sync_params_([weight], group, src=1)
        assert torch.equal(weight.to_local(), torch.full((3, 2), 10.0 + ep))

        weight.grad = None
        if dp == 0:
            (weight.to_local() * (1.0 + ep)).sum().backward()
        mf.sync_grads_([weight], group, "sum")
        assert weight.grad.placements == weight.placements
        assert torch.equal(weight.grad.to_local(), torch.full((3, 2), 1.0 + ep))

    alike = DTensor.from_local(torch.full((2,), float(dp)), mesh, [Replicate(), Replicate()], run_check=False)
    mf.sync_params_([alike], mesh["dp"])
    assert torch.equal(alike.to_local(), torch.zeros(2))
    for call in (mf.sync_params, mf.sync_params_, mf.sync_grads_):
        with pytest.raises(
            ValueError, match=r"params was a DTensor with .*Shard.* on the group's mesh dim 0; it must be one with Replicate"
        ):
            call([weight_of(dp)], mesh["ep"])


def test_a_dtensor_goes_as_its_local_shard_over_a_group_of_any_name() -> None:
    run_ranks(on_a_mesh_here, 4)


def errors_here() -> None:
    rank, ones = dist.get_rank(), torch.ones(2, requires_grad=True)
    sparse = torch.ones(2, requires_grad=True)
    sparse.grad = torch.ones(2).to_sparse()
    wrong = [
        (lambda: mf.sync_params(ones, None, grad="max"), ValueError, 'grad was \'max\'; it must be "mean", "sum" or None'),
        (lambda: mf.sync_params(ones, None, src=2), ValueError, "src was 2; it must be a rank of the group, 0 to 1"),
        (lambda: mf.sync_params(ones, None, src=-1), ValueError, "src was -1; it must be a rank of the group, 0 to 1"),
        (lambda: mf.sync_params(ones, None, src=None), TypeError, "src was NoneType; it must be an int"),
        (lambda: mf.sync_params({"a": ones, "b": 3}, None), TypeError, "params' leaf 1 was int; it must be a tensor of any shape"),
        (lambda: mf.sync_params([ones, ones.to("meta")], None), ValueError, "params was on cpu and on meta; it must be on one device"),
        (lambda: mf.sync_params(ones, 3), TypeError, "group was int"),
        (lambda: mf.sync_params(ones, dist.GroupMember.NON_GROUP_MEMBER), ValueError, "group was a group that this rank is not in"),
        (lambda: mf.sync_params_(3, None), TypeError, "params was int; it must be an nn.Module, a mapping to tensors, or tensors"),
        (lambda: mf.sync_params_({"a": 3}, None), TypeError, "params['a'] was int; it must be a tensor of any shape"),
        (lambda: mf.sync_grads_([ones, None], None), TypeError, "params[1] was NoneType; it must be a tensor of any shape"),
        (lambda: mf.sync_grads_(ones, None, "max"), ValueError, 'reduce was \'max\'; it must be "mean" or "sum"'),
        (lambda: mf.sync_grads_(ones, None, scale="now"), ValueError, 'scale was \'now\'; it must be "before" or "after"'),
        (lambda: mf.sync_grads_(ones, None, bucket_bytes=0), ValueError, "bucket_bytes was 0; it must be at least 1"),
        (lambda: mf.sync_grads_(ones, None, bucket_bytes=1e6), TypeError, "bucket_bytes was float; it must be an int"),
        (lambda: mf.sync_grads_(sparse, None), TypeError, "params was a tensor with a gradient of layout torch.sparse_coo"),
    ]
    if rank == 0:
        for call, error, message in wrong:
            with pytest.raises(error, match=re.escape(message)), Traffic() as traffic:
                call()
            assert traffic.collectives == []
    mf.sync_params(ones, None)  # nothing is in the way of what follows


def test_a_wrong_argument_is_named_before_anything_is_sent() -> None:
    run_ranks(errors_here, 2)


def other_model_here() -> None:
    rank = dist.get_rank()
    others: list[tuple[list[Tensor], str]] = [
        ([torch.ones(2), torch.ones(2 + rank, 3)], "tensor 1 was float32 [2, 3] on rank 0, float32 [3, 3] on rank 1 of the group"),
        ([torch.ones(2) for _ in range(1 + rank)], "tensor 1 was missing on rank 0, float32 [2] on rank 1 of the group"),
        ([torch.ones(2, dtype=[torch.int8, torch.bool][rank])], "tensor 0 was int8 [2] on rank 0, bool [2] on rank 1 of the group"),
    ]
    for params, message in others:
        with pytest.raises(MoECommError, match=re.escape(message)):
            mf.sync_params_(params, None)


def test_models_that_differ_are_an_error_on_every_rank() -> None:
    run_ranks(other_model_here, 2)
