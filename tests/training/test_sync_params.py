"""sync_params: rank src's parameters on every rank, the ranks' gradients against float64, one graph for all ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._pytree import tree_flatten, tree_leaves

import moecomm.functional as mf
from tests.ops.cases import assert_within_rounding
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

A2A, GATHER = "all_to_all_single", "all_gather_into_tensor"


class Scales(NamedTuple):
    steps: Tensor
    mask: Tensor


def tree_of(rank: int) -> dict[str, Any]:
    """The parameters that a rank starts with: 5 floating leaves, one of which is empty, one frozen and one of which nobody uses."""
    seed = torch.Generator().manual_seed(rank)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=seed).to(dtype)

    return {
        "matrix": normal(3, 4).requires_grad_(),
        "transposed": normal(4, 3, dtype=torch.bfloat16).t().requires_grad_(),
        "list": [normal(0, 2).requires_grad_(), normal(dtype=torch.float64).requires_grad_(), normal(2)],
        "half": normal(7, dtype=torch.float16).requires_grad_(),
        "unused": normal(3, dtype=torch.float16).requires_grad_(),
        "scales": Scales(torch.arange(3) + rank, normal(4) > 0),
    }


ON_RANK_0, UNUSED = 5, 6  # the leaves "half", used on rank 0 alone, and "unused"


def gradients_of(rank: int) -> list[Tensor]:
    """The gradients of the leaves on a rank, where its loss is the sum of the leaves times these; zeros for what it does not use."""
    leaves = [leaf.detach() for leaf in tree_leaves(tree_of(10 + rank))]
    for i in (UNUSED,) if rank == 0 else (ON_RANK_0, UNUSED):
        leaves[i] = torch.zeros_like(leaves[i])
    return leaves


def loss_of(leaves: list[Tensor], gradients: list[Tensor], rank: int) -> Tensor:
    used = [i for i, leaf in enumerate(leaves) if leaf.requires_grad and i != UNUSED and (i != ON_RANK_0 or rank == 0)]
    return torch.stack([(leaves[i] * gradients[i]).sum().double() for i in used]).sum()


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(mine.dtype == its.dtype and mine.shape == its.shape and torch.equal(mine, its) for mine, its in zip(got, want, strict=True))


def params_here(src: int) -> None:
    mine = tree_of(dist.get_rank())
    synced = mf.sync_params(mine, None, src)
    (before, spec), (got, spec_after) = tree_flatten(mine), tree_flatten(synced)
    assert spec == spec_after
    assert same(got, tree_leaves(tree_of(src)))
    assert [leaf.requires_grad for leaf in got] == [leaf.requires_grad for leaf in before]
    assert same(before, tree_leaves(tree_of(dist.get_rank())))
    if dist.get_world_size() == 1:
        assert synced is mine
        return
    with torch.no_grad():
        for leaf in got:
            leaf.zero_()  # each has memory of its own
    assert same(before, tree_leaves(tree_of(dist.get_rank())))
    assert mf.sync_params({}, None, src) == {}
    assert torch.equal(mf.sync_params(torch.tensor(dist.get_rank()), None, src), torch.tensor(src))


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_every_rank_has_the_parameters_of_src(ranks: int) -> None:
    for src in {0, ranks - 1}:
        run_ranks(params_here, ranks, src)


def params_and_gradients(grad: str | None, function: Callable[..., Any] | None = None) -> list[Tensor]:
    """The synced leaves, then the gradients of the rank's own."""
    rank = dist.get_rank()
    mine, gradients = tree_of(rank), gradients_of(rank)

    def forward(tree: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
        leaves = tree_leaves(mf.sync_params(tree, None, dist.get_world_size() - 1, grad))  # type: ignore[arg-type]
        return leaves, loss_of(leaves, gradients, rank)

    leaves, loss = (forward if function is None else function(forward))(mine)
    loss.backward()
    needed = [leaf for leaf in tree_leaves(mine) if leaf.requires_grad]
    assert all(leaf.grad is None for leaf in tree_leaves(mine) if not leaf.requires_grad)
    if dist.get_world_size() == 1:
        mine["unused"].grad = torch.zeros(3, dtype=torch.float16)  # what nobody uses has none where nothing is sent
    return [leaf.detach() for leaf in leaves] + [leaf.grad for leaf in needed]


def assert_reduced(got: list[Tensor], parts: list[list[Tensor]], divisor: int) -> None:
    """``got`` is the sum of the ranks' ``parts`` over the divisor, rounded once."""
    for mine, *its in zip(got, *parts, strict=True):
        stacked = torch.stack(its).double() / divisor
        wide = torch.finfo(torch.float64 if mine.dtype == torch.float64 else torch.float32).eps
        assert mine.dtype == its[0].dtype
        assert_within_rounding(mine, stacked.sum(0), stacked.abs().sum(0), len(parts) * wide)


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_the_gradients_are_the_mean_the_sum_or_the_ranks_own(ranks: int) -> None:
    needed = [i for i, leaf in enumerate(tree_leaves(tree_of(0))) if leaf.requires_grad]
    parts = [[gradients_of(rank)[i] for i in needed] for rank in range(ranks)]
    for grad, divisor in (("mean", ranks), ("sum", 1)):
        gradients = [here[-len(needed) :] for here in run_ranks(params_and_gradients, ranks, grad)]
        assert all(same(its, gradients[0]) for its in gradients)  # bit for bit on all ranks
        assert_reduced(gradients[0], parts, divisor)
    if ranks > 1:
        for own, here in zip(parts, run_ranks(params_and_gradients, ranks, None), strict=True):
            assert same(here[-len(needed) :], own)


def traffic_here() -> None:
    for grad, back in (("mean", [A2A] * 4 + [GATHER] * 4), ("sum", [A2A] * 4 + [GATHER] * 4), (None, [])):
        mine = tree_of(dist.get_rank())
        with Traffic() as forward:
            leaves = tree_leaves(mf.sync_params(mine, None, 0, grad))  # type: ignore[arg-type]
        assert forward.collectives == ["broadcast"] * 6  # a dtype each
        assert forward.reads == []
        loss = loss_of(leaves, gradients_of(dist.get_rank()), dist.get_rank())
        with Traffic() as backward:
            loss.backward()
        assert backward.collectives == back
        assert backward.reads == []


def test_a_call_sends_one_message_a_dtype_forward_and_two_back() -> None:
    run_ranks(traffic_here, 2)


def test_without_a_process_group_nothing_is_sent_and_the_parameters_are_as_they_were() -> None:
    assert not dist.is_initialized()
    tree = tree_of(0)
    assert mf.sync_params(tree, None) is tree
    mf.sync_params_(tree["list"], None)
    assert same(tree_leaves(tree), tree_leaves(tree_of(0)))
    tree["matrix"].grad = torch.ones(3, 4)
    mf.sync_grads_([tree["matrix"], tree["half"]], None, "sum")
    assert torch.equal(tree["matrix"].grad, torch.ones(3, 4))
    assert tree["half"].grad is None


def compiled_here(grad: str | None, backend: str) -> None:
    torch._dynamo.reset()
    eager = params_and_gradients(grad)
    assert same(params_and_gradients(grad), eager)
    for _ in range(2):
        assert same(params_and_gradients(grad, lambda forward: torch.compile(forward, fullgraph=True, backend=backend)), eager)


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/test_functions.py compiles it in every run
@pytest.mark.parametrize(("grad", "backend"), [("mean", "aot_eager"), *((grad, "inductor") for grad in ("mean", "sum", None))])
def test_a_compiled_call_gives_the_eager_bits_and_gives_them_again(grad: str | None, backend: str) -> None:
    run_ranks(compiled_here, 2, grad, backend, timeout=300)


def graphs_here() -> list[str]:
    """The forward and the backward graph."""
    texts: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        texts.append(module.code.replace(repr(dist.group.WORLD.group_name), "GROUP"))
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    weight = torch.randn(3, 5).requires_grad_()

    def forward(weight: Tensor, x: Tensor) -> Tensor:
        return mf.sync_params({"weight": weight}, None)["weight"] @ x

    torch.compile(forward, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(weight, torch.ones(5)).sum().backward()
    return texts


@pytest.mark.slow
def test_the_graph_is_the_same_on_every_rank() -> None:
    first, *others = run_ranks(graphs_here, 4, timeout=200)
    assert all(texts == first for texts in others)
    calls = [re.findall(r"torch\.ops\.((?:moecomm|_c10d_functional)\.\w+)", text) for text in first]
    wait = "_c10d_functional.wait_tensor"
    assert calls == [
        ["moecomm.start_broadcast", wait, "moecomm.split_copy"],
        [f"_c10d_functional.{A2A}", wait, "moecomm.rank_sum", "moecomm.gather_exchange", wait, "moecomm.split_copy"],
    ]


def hessian_here() -> None:
    """<v, Hessian>, of a loss that is the mean over the ranks, by a gradient of a gradient; and torch.func.grad of the same loss."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    data = [torch.randn(5, 3, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(ranks)]
    weight = torch.randn(3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    direction = torch.arange(3.0, dtype=torch.float64)

    def loss(weight: Tensor, rows: Tensor) -> Tensor:
        return (rows @ weight).tanh().pow(2).mean()

    def whole(weight: Tensor) -> Tensor:
        return torch.stack([loss(weight, rows) for rows in data]).mean()

    want = torch.autograd.functional.hvp(whole, weight, direction)[1]
    leaf = weight.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(mf.sync_params(leaf, None), data[rank]), leaf, create_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(gradient @ direction, leaf)[0], want, rtol=1e-12, atol=1e-12)

    got = torch.func.grad(lambda weight: loss(mf.sync_params(weight, None), data[rank]))(weight)
    torch.testing.assert_close(got, torch.func.grad(whole)(weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2])
def test_second_derivatives_and_torch_func_see_the_mean_over_the_ranks(ranks: int) -> None:
    run_ranks(hessian_here, ranks)
