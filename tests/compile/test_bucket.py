"""Exchanges of one plan in one message: fewer messages, as many bytes but for the words' ends, and the same results to the bit."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import expecttest
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import grouped_mm

import moecomm.functional as mf
from moecomm.compile.bucket import merge_exchanges
from moecomm.compile.overlap import overlap_exchanges, reorder
from moecomm.compile.passes import options
from moecomm.ops.exchange import merged as bucket
from tests.compile.graphs import keeping, text_of, unbacked
from tests.compile.test_layer import NUM_EXPERTS, layer, parameters, step, tokens_here
from tests.spawn import run_ranks

OPS, TORCH = torch.ops.moecomm, torch.ops._c10d_functional


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_rows_come_out_of_a_message_as_they_went_in(dtype: torch.dtype, width: int, count: int) -> None:
    seed = torch.Generator().manual_seed(width)
    rows = [
        torch.randint(0, 9, (count, 2 * w), generator=seed).to(d)[:, ::2] for w, d in ((width, dtype), (2, torch.int16), (width, dtype))
    ]
    with patch.object(bucket, "start", lambda send, *rest: send):
        message = bucket.rows(rows, None, count, 0, "")
    assert message.shape == bucket.rows_fake(rows, None, count, 0, "").shape
    offset = 0
    for each in rows:
        assert torch.equal(bucket.take(message, offset, each.shape[1], each.dtype), each)
        if count:
            torch.library.opcheck(
                bucket.take_rows, (message, offset, each.shape[1], each.dtype), test_utils=("test_schema", "test_faketensor")
            )
        offset += bucket.words(each.shape[1], each.dtype)


def test_exchanges_that_need_each_other_or_have_other_splits_are_left_alone() -> None:
    def there(x: Tensor, splits: Tensor) -> Tensor:
        return TORCH.wait_tensor(OPS.dispatch_exchange(x, torch.zeros(9, dtype=torch.int32), 1, splits, 9, "group"))

    def function(x: Tensor, splits: Tensor, others: Tensor) -> list[Tensor]:
        first = there(x, splits)
        return [first, there(first, splits), there(x, others), there(x.double(), splits)]

    module = make_fx(function, tracing_mode="fake")(torch.ones(9, 4), *(torch.zeros(2, 2, dtype=torch.int64) for _ in range(2)))
    merge_exchanges(module.graph)
    names = [node.name for node in module.graph.nodes if node.name.startswith(("dispatch_ex", "rows_ex"))]
    assert names == ["dispatch_exchange_2", "rows_exchange_default", "dispatch_exchange_1"]


def test_equal_splits_of_a_static_plan_are_merged_too() -> None:
    def function(x: Tensor, order: Tensor) -> list[Tensor]:
        return [TORCH.wait_tensor(OPS.dispatch_exchange(rows, order, 1, None, 9, "group")) for rows in (x, x[:, :3].double())]

    module = make_fx(function, tracing_mode="fake")(torch.ones(9, 4), torch.zeros(9, dtype=torch.int32))
    merge_exchanges(module.graph)
    (message,) = [node for node in module.graph.nodes if node.name.startswith("rows_ex")]
    assert message.args[1:] == (None, 9, 0, "group")
    assert message.meta["val"].shape == (9, 2 + 3)  # words of 8 bytes
    results = [node.meta["val"] for node in next(iter(reversed(module.graph.nodes))).args[0]]
    assert [(result.dtype, result.shape[1]) for result in results] == [(torch.float32, 4), (torch.float64, 3)]


def tree(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A layer of two tensors a token."""
    plan = mf.plan(experts, weights, NUM_EXPERTS, None, like=x)
    rows = mf.dispatch((x, x[:, :3].float()), plan)
    expert = torch.searchsorted(plan.offsets, torch.arange(rows[0].shape[0]), right=True)
    y = mf.combine(((rows[0].float().unsqueeze(1) @ up[expert]).squeeze(1) @ down[0], rows[1].cos()), plan)
    return torch.cat(y, 1)


def messages(function: Any, merged: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[int], list[str]]:
    """Results and gradients of the function compiled, the bytes of each message, and the graphs."""
    torch._dynamo.reset()
    graphs: list[torch.fx.Graph] = []

    def merge(graph: torch.fx.Graph) -> None:
        merge_exchanges(graph)
        reorder(graph)

    backend = keeping(graphs, merge if merged else None)
    given = tokens_here(0, 5 + dist.get_rank(), dtype, "random")
    unbacked(*given)
    with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        results = step(torch.compile(function, fullgraph=True, backend=backend), given, parameters(dtype))
    return results, [call.args[1].nbytes for call in exchange.call_args_list], list(map(text_of, graphs))


def merged_here() -> list[str]:
    for function, dtype, before, after in ((tree, torch.float32, 10, 5), (layer, torch.bfloat16, 6, 5)):  # the counts' among them
        want, apart, _ = messages(function, False, dtype)
        got, together, texts = messages(function, True, dtype)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
        assert (len(apart), len(together)) == (before, after)
        pairs = 2 * (5 + dist.get_rank())  # at most
        slots = 2 * (4 + 1)  # bytes a pair: apart they travel with the counts
        assert sum(apart) <= sum(together) <= sum(apart) + (7 * before + slots) * pairs
    return texts


@pytest.mark.slow
def test_a_layer_sends_3_messages_forward_and_2_for_3_backward_and_gives_the_same_bits() -> None:
    (forward, backward), other = run_ranks(merged_here, 2, timeout=300)
    assert other == [forward, backward]
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
slots_message_default = moecomm::slots_message(primals_4, primals_6, getitem, first, 4, False)
gather_pairs_default = moecomm::gather_pairs(primals_2, first, 2)
rows_exchange_default = moecomm::rows_exchange([slots_message_default, gather_pairs_default], getitem_8, getitem_6, 0, GROUP)
wait_tensor_default = _c10d_functional::wait_tensor(rows_exchange_default)
take_rows_default = moecomm::take_rows(wait_tensor_default, 0, 10, torch.uint8)
getitem_10, getitem_11 = moecomm::unpack_slots(take_rows_default, 2, 4, torch.float32)
getitem_12, getitem_13, getitem_14 = moecomm::counting_sort(getitem_10, 4, getitem_7)
take_rows_default_1 = moecomm::take_rows(wait_tensor_default, 2, 16, torch.bfloat16)
gather = moecomm::gather(take_rows_default_1, getitem_12, getitem_13)
_grouped_mm = aten::_grouped_mm(gather, primals_7, getitem_14)
silu = aten::silu(_grouped_mm)
_grouped_mm_1 = aten::_grouped_mm(silu, primals_8, getitem_14)
combine_exchange = moecomm::combine_exchange(_grouped_mm_1, getitem_11, getitem_12, getitem_13, getitem_8, getitem_5, GROUP)
transpose = aten::transpose.int(silu, -2, -1)
transpose_1 = aten::transpose.int(primals_8, -2, -1)
transpose_2 = aten::transpose.int(gather, -2, -1)
transpose_3 = aten::transpose.int(primals_7, -2, -1)
wait_tensor_3 = _c10d_functional::wait_tensor(combine_exchange)
weighted_sum = moecomm::weighted_sum(wait_tensor_3, None, first, getitem_3)
return weighted_sum, getitem_3, getitem_8, first, getitem_11, getitem_12, getitem_13, getitem_14, _grouped_mm,
    _grouped_mm_1, transpose, transpose_1, transpose_2, transpose_3, getitem_5, getitem_6, primals_1, getitem_7""",
    )
    expecttest.assert_expected_inline(
        backward,
        """\
dispatch_exchange_1 = moecomm::dispatch_exchange(tangents_1, first, 2, getitem_8, getitem_6, GROUP)
wait_tensor_4 = _c10d_functional::wait_tensor(dispatch_exchange_1)
getitem_15, getitem_16 = moecomm::weighted_sum_backward(wait_tensor_4, _grouped_mm_1, getitem_11, getitem_12, getitem_13)
_grouped_mm_3 = aten::_grouped_mm(getitem_15, transpose_1, getitem_14)
silu_backward = aten::silu_backward(_grouped_mm_3, _grouped_mm)
_grouped_mm_5 = aten::_grouped_mm(silu_backward, transpose_3, getitem_14)
weighted_sum_default = moecomm::weighted_sum(_grouped_mm_5, None, getitem_12, getitem_13)
rows_exchange_default = moecomm::rows_exchange([weighted_sum_default, getitem_16], getitem_8, getitem_5, 1, GROUP)
_grouped_mm_2 = aten::_grouped_mm(transpose, getitem_15, getitem_14)
_grouped_mm_4 = aten::_grouped_mm(transpose_2, silu_backward, getitem_14)
wait_tensor_default = _c10d_functional::wait_tensor(rows_exchange_default)
take_rows_default = moecomm::take_rows(wait_tensor_default, 0, 16, torch.bfloat16)
weighted_sum_1 = moecomm::weighted_sum(take_rows_default, None, first, getitem_3)
take_rows_default_1 = moecomm::take_rows(wait_tensor_default, 4, 2, torch.float32)
weighted_sum_2 = moecomm::weighted_sum(take_rows_default_1, None, first, getitem_3)
return None, weighted_sum_1, None, None, None, weighted_sum_2, _grouped_mm_4, _grouped_mm_2""",
    )


def products(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A layer without any kernel of Inductor's own, each of which its C++ compiler would take a second for."""
    plan = mf.plan(experts, weights, NUM_EXPERTS, like=x)
    rows = grouped_mm(grouped_mm(mf.dispatch(x, plan), up, offs=plan.offsets), down, offs=plan.offsets)
    return mf.combine(rows, plan)


def inductor_here() -> None:
    given, experts = tokens_here(0, 5 + dist.get_rank(), torch.bfloat16, "random"), parameters(torch.bfloat16)
    unbacked(*given)
    torch._dynamo.reset()
    want = step(torch.compile(products, fullgraph=True), given, experts)
    torch._dynamo.reset()
    compiled = torch.compile(products, fullgraph=True, options=options(merge_exchanges, overlap_exchanges))
    with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        got = step(compiled, given, experts)
    assert exchange.call_count == 5
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_merged_and_overlapped_code_gives_the_bits_of_neither() -> None:
    run_ranks(inductor_here, 2, timeout=300)
