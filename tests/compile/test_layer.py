"""Layers as one graph: equal to eager mode, compiled once whatever the routing, and the same graph on every rank."""

from __future__ import annotations

from functools import partial
from itertools import permutations
from typing import Any
from unittest.mock import patch

import expecttest
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import grouped_mm, silu

import moecomm.functional as mf
from tests.compile.graphs import keeping, text_of, unbacked
from tests.spawn import run_ranks

pytestmark = pytest.mark.slow

D, H, NUM_EXPERTS, K = 16, 24, 8, 2


def layer(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, group: Any = None) -> Tensor:
    plan = mf.plan(experts, weights, NUM_EXPERTS, group, like=x)
    rows = mf.dispatch(x, plan)
    if x.dtype == torch.bfloat16:
        rows = grouped_mm(silu(grouped_mm(rows, up, offs=plan.offsets)), down, offs=plan.offsets)
    else:  # that a compiler takes grouped_mm of bfloat16 alone is torch 2.13's rule: here each row looks its expert up
        expert = torch.searchsorted(plan.offsets, torch.arange(rows.shape[0]), right=True)  # [N]
        rows = (silu(rows.unsqueeze(1) @ up[expert]) @ down[expert]).squeeze(1)
    return mf.combine(rows, plan)


def parameters(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    seed = torch.Generator().manual_seed(dist.get_rank())
    local = NUM_EXPERTS // dist.get_world_size()
    up, down = (torch.randn(local, *shape, generator=seed).to(dtype) / shape[0] ** 0.5 for shape in ((D, H), (H, D)))
    return up.requires_grad_(), down.requires_grad_()


def tokens_here(seed: int, tokens: int, dtype: torch.dtype, routing: str) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's x, experts and weights."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    x = torch.randn(tokens, D, generator=generator).to(dtype).requires_grad_()
    experts = torch.randint(-1, NUM_EXPERTS, (tokens, K), generator=generator)
    if routing == "all to one":
        experts.fill_(NUM_EXPERTS - 1)
    if routing == "all dropped":
        experts.fill_(-1)
    return x, experts, torch.rand(tokens, K, generator=generator).requires_grad_()


def step(function: Any, tokens: tuple[Tensor, Tensor, Tensor], experts: tuple[Tensor, ...]) -> list[Tensor]:
    """The layer's result, and the gradients of its floating arguments."""
    x, ids, weights = tokens
    y = function(x, ids, weights, *experts)
    return [y.detach(), *torch.autograd.grad(y, (x, weights, *experts), torch.cos(torch.arange(y.numel()).view_as(y)).to(y.dtype))]


# Each rank's number of tokens, uneven and 0 and 1 among them, and where they go.
CALLS = [
    ((5, 9, 2, 7), "random"),
    ((0, 3, 1, 0), "random"),
    ((4, 0, 0, 0), "random"),
    ((1, 1, 1, 1), "random"),
    ((6, 2, 30, 0), "all to one"),
    ((8, 5, 3, 2), "all dropped"),
    ((0, 0, 0, 0), "random"),
    *(((3 + i, 17 - i, 2 * i, 5), "random") for i in range(6)),
    ((5, 3000, 2, 7), "random"),  # with too many slots to travel with the counts
]


def compiled_here(dtype: torch.dtype) -> None:
    """A layer of unbacked T: compiled at the first call, and never again."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    experts = parameters(dtype)
    eps = torch.finfo(dtype).eps  # the compiler fuses the experts, and so rounds less often: as much is tolerated as in test_layer.py
    for seed, (tokens, routing) in enumerate(CALLS):
        given = tokens_here(seed, tokens[dist.get_rank()], dtype, routing)
        unbacked(*given)
        got = step(compiled, given, experts)
        with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
            again = step(compiled, given, experts)
        assert exchange.call_count == (0 if dist.get_world_size() == 1 else 7 if max(tokens) > 1000 else 6)
        for one, other, want in zip(got, again, step(layer, given, experts), strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
            largest = max(1.0, want.abs().max().item()) if want.numel() else 1.0
            torch.testing.assert_close(one, want, rtol=0, atol=8 * eps * largest)
        assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("ranks", "dtype"), [(2, torch.bfloat16), *(pytest.param(ranks, torch.float32, marks=pytest.mark.exhaustive) for ranks in (1, 4))]
)
def test_a_compiled_layer_is_the_eager_one_bit_for_bit_again_and_never_recompiled(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(compiled_here, ranks, dtype, timeout=300)


def fifty_here(dtype: torch.dtype) -> None:
    """T, the routing, and who has tokens at all: new at each of fifty calls."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    experts, ranks = parameters(dtype), dist.get_world_size()
    for seed in range(50):
        tokens = 0 if seed % 4 == dist.get_rank() or seed == 13 else (7 * seed + 3 * dist.get_rank()) % 19
        given = tokens_here(seed, tokens, dtype, ["random", "random", "all to one", "all dropped", "random"][seed % 5])
        unbacked(*given)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            got = step(compiled, given, experts)
        for one, want in zip(got, step(layer, given, experts), strict=True):
            assert torch.equal(one, want), f"call {seed} of {ranks} ranks"
    assert counter.frame_count == 1


EVERYTHING = [(ranks, dtype) for ranks in (1, 2, 4) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(
    ("ranks", "dtype"), [pytest.param(*case, marks=() if case == (2, torch.bfloat16) else pytest.mark.exhaustive) for case in EVERYTHING]
)
def test_fifty_routings_and_token_counts_recompile_nothing_and_are_eager_bit_for_bit(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(fifty_here, ranks, dtype, timeout=500)


def orders_here(order: tuple[int, ...]) -> None:
    """T = 0, 1 and 2 of nothing but shapes, first in inference mode and then in a training."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    experts = parameters(torch.float32)
    for seed, tokens in enumerate((order[0], *order, order[0])):
        given = tokens_here(seed, (tokens + dist.get_rank()) % 3, torch.float32, "random")
        if seed == 0:
            with torch.inference_mode():
                assert torch.equal(compiled(*given, *experts), layer(*given, *experts))
            continue
        for got, want in zip(step(compiled, given, experts), step(layer, given, experts), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("ranks", "order"),
    [pytest.param(ranks, order, marks=() if (ranks, order) == (1, (2, 0, 1)) else pytest.mark.exhaustive)
     for ranks in (1, 2) for order in permutations((0, 1, 2))],
)  # fmt: skip
def test_none_one_or_two_tokens_compile_in_any_order_and_after_inference(ranks: int, order: tuple[int, ...]) -> None:
    run_ranks(orders_here, ranks, order, timeout=300)


def ops_alone(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """All of moecomm, and nothing that a compiler could fuse."""
    plan = mf.plan(experts, weights, NUM_EXPERTS, like=x)
    return mf.combine(mf.dispatch(x, plan), plan)


def ops_alone_here(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops_alone, fullgraph=True)
    for seed, (tokens, routing) in enumerate(CALLS):
        given = tokens_here(seed, tokens[dist.get_rank()], dtype, routing)
        unbacked(*given)
        for got, want in zip(step(compiled, given, ()), step(ops_alone, given, ()), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("ranks", "dtype"), [pytest.param(*case, marks=() if case == (2, torch.float32) else pytest.mark.exhaustive) for case in EVERYTHING]
)
def test_the_ops_alone_are_eager_bit_for_bit_under_inductor(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(ops_alone_here, ranks, dtype, timeout=500)


def automatic_here() -> None:
    """Without a mark: the first T is a constant, the second makes it a variable, and that is all."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    experts = parameters(torch.float32)
    for seed, tokens in enumerate(((5, 9), (5, 9), (7, 3), (2, 30), (4, 4), (50, 2))):
        given = tokens_here(seed, tokens[dist.get_rank()], torch.float32, ["random", "all to one", "all dropped"][seed % 3])
        for got, want in zip(step(compiled, given, experts), step(layer, given, experts), strict=True):
            assert torch.equal(got, want)
        assert counter.frame_count == (1 if seed < 2 else 2)


def test_another_number_of_tokens_recompiles_once_and_another_routing_never() -> None:
    run_ranks(automatic_here, 2, timeout=200)


def groups_here(names: slice) -> None:
    """Each pair of ranks has a layer of its own, whatever names the pair."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    up, down = (torch.ones(NUM_EXPERTS // 2, *shape, dtype=torch.bfloat16).requires_grad_() for shape in ((D, H), (H, D)))
    given = tokens_here(0, 3 + dist.get_rank(), torch.bfloat16, "random")
    for group in (mesh["ep"], (mesh, 1), mesh.get_group("ep"), mesh.get_group("ep").group_name)[names]:
        torch._dynamo.reset()
        here = partial(layer, group=group)
        compiled = torch.compile(here, fullgraph=True, backend="aot_eager")
        for got, want in zip(step(compiled, given, (up, down)), step(here, given, (up, down)), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("names", [slice(1), pytest.param(slice(1, 4), marks=pytest.mark.exhaustive)], ids=["a mesh", "all others"])
def test_a_layer_compiles_with_any_name_of_its_group(names: slice) -> None:
    run_ranks(groups_here, 4, names, timeout=200)


def refused_here() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, experts, weights = tokens_here(0, 5, torch.float32, "random")
    for bad in ((x[:4], experts, weights), (x, experts, weights[:4]), (x, experts.float(), weights)):
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):  # fullgraph: Dynamo's, that names the error it traced
            compiled(*bad, *parameters(torch.float32))
    x, experts, weights = tokens_here(0, 5, torch.float32, "random")
    experts[3, 1] = NUM_EXPERTS
    with pytest.raises(ValueError, match="ids must be in"):
        compiled(x, experts, weights, *parameters(torch.float32))


def test_a_compiled_layer_refuses_what_the_eager_one_refuses() -> None:
    run_ranks(refused_here, 2, timeout=200)


def graphs_here() -> tuple[str, str]:
    """The forward and backward graph of a layer, as the compiler gets them."""
    torch._dynamo.reset()
    graphs: list[torch.fx.Graph] = []
    compiled = torch.compile(layer, fullgraph=True, backend=keeping(graphs))
    given = tokens_here(0, 5 + dist.get_rank(), torch.bfloat16, "random")
    unbacked(*given)
    step(compiled, given, parameters(torch.bfloat16))
    forward, backward = map(text_of, graphs)
    return forward, backward


def test_all_ranks_have_one_graph_and_it_is_this() -> None:
    (forward, backward), other = run_ranks(graphs_here, 2, timeout=200)
    assert other == (forward, backward)
    expecttest.assert_expected_inline(
        forward,
        """\
getitem, getitem_1 = moecomm::count(primals_4, 8, 2, [0, 2, 8, 15, 16, 0, -1, -1, -1, 3, 0])
getitem_2, getitem_3, getitem_4 = moecomm::counting_sort(getitem, 2, mul_2, True)
few_slots = moecomm::few_slots(primals_4, primals_6, getitem, getitem_2, getitem_4, 4)
messages_exchange = moecomm::messages_exchange(getitem_1, few_slots, 'the counts of plan', GROUP)
wait_tensor = _c10d_functional::wait_tensor(messages_exchange)
getitem_5, getitem_6, getitem_7, getitem_8, getitem_9 = moecomm::plan_sizes(getitem_1, wait_tensor)
first = moecomm::first(getitem_2, getitem_5)
slots_exchange = moecomm::slots_exchange(primals_4, primals_6, getitem, first, 4, wait_tensor, getitem_9, getitem_8, getitem_6, GROUP)
wait_tensor_1 = _c10d_functional::wait_tensor(slots_exchange)
getitem_10, getitem_11 = moecomm::unpack_slots(wait_tensor_1, 2, 4, torch.float32)
getitem_12, getitem_13, getitem_14 = moecomm::counting_sort(getitem_10, 4, getitem_7)
dispatch_exchange = moecomm::dispatch_exchange(primals_2, first, 2, getitem_8, getitem_6, GROUP)
wait_tensor_2 = _c10d_functional::wait_tensor(dispatch_exchange)
gather = moecomm::gather(wait_tensor_2, getitem_12, getitem_13)
_grouped_mm = aten::_grouped_mm(gather, primals_7, getitem_14)
silu = aten::silu(_grouped_mm)
_grouped_mm_1 = aten::_grouped_mm(silu, primals_8, getitem_14)
combine_exchange = moecomm::combine_exchange(_grouped_mm_1, getitem_11, getitem_12, getitem_13, getitem_8, getitem_5, GROUP)
wait_tensor_3 = _c10d_functional::wait_tensor(combine_exchange)
weighted_sum = moecomm::weighted_sum(wait_tensor_3, None, first, getitem_3)
transpose = aten::transpose.int(silu, -2, -1)
transpose_1 = aten::transpose.int(primals_8, -2, -1)
transpose_2 = aten::transpose.int(gather, -2, -1)
transpose_3 = aten::transpose.int(primals_7, -2, -1)
return weighted_sum, getitem_3, getitem_8, first, getitem_11, getitem_12, getitem_13, getitem_14, _grouped_mm,
    _grouped_mm_1, transpose, transpose_1, transpose_2, transpose_3, getitem_5, getitem_6, primals_1, getitem_7""",
    )
    expecttest.assert_expected_inline(
        backward,
        """\
dispatch_exchange_1 = moecomm::dispatch_exchange(tangents_1, first, 2, getitem_8, getitem_6, GROUP)
wait_tensor_4 = _c10d_functional::wait_tensor(dispatch_exchange_1)
getitem_15, getitem_16 = moecomm::weighted_sum_backward(wait_tensor_4, _grouped_mm_1, getitem_11, getitem_12, getitem_13)
_grouped_mm_2 = aten::_grouped_mm(transpose, getitem_15, getitem_14)
_grouped_mm_3 = aten::_grouped_mm(getitem_15, transpose_1, getitem_14)
silu_backward = aten::silu_backward(_grouped_mm_3, _grouped_mm)
_grouped_mm_4 = aten::_grouped_mm(transpose_2, silu_backward, getitem_14)
_grouped_mm_5 = aten::_grouped_mm(silu_backward, transpose_3, getitem_14)
combine_exchange_1 = moecomm::combine_exchange(_grouped_mm_5, None, getitem_12, getitem_13, getitem_8, getitem_5, GROUP)
wait_tensor_5 = _c10d_functional::wait_tensor(combine_exchange_1)
weighted_sum_1 = moecomm::weighted_sum(wait_tensor_5, None, first, getitem_3)
return_exchange = moecomm::return_exchange(getitem_16, getitem_8, getitem_5, GROUP)
wait_tensor_6 = _c10d_functional::wait_tensor(return_exchange)
weighted_sum_2 = moecomm::weighted_sum(wait_tensor_6, None, first, getitem_3)
return None, weighted_sum_1, None, None, None, weighted_sum_2, _grouped_mm_4, _grouped_mm_2""",
    )
