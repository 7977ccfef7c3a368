"""The overlap pass: what does not depend on an exchange runs during it, in the graph and in the code that Inductor makes of it."""

from __future__ import annotations

import re
from typing import Any

import expecttest
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import silu

from moecomm.compile.overlap import overlap_exchanges, reorder
from moecomm.compile.passes import options
from tests.compile.graphs import keeping, text_of, unbacked
from tests.compile.test_layer import D, H, layer, parameters, step, tokens_here
from tests.spawn import run_ranks

T, S = 64, 96
OPS, TORCH = torch.ops.moecomm, torch.ops._c10d_functional


def wait(pending: Tensor) -> Tensor:
    return TORCH.wait_tensor(pending)


def there(x: Tensor, order: Tensor, splits: Tensor) -> Tensor:
    return wait(OPS.dispatch_exchange(x, order, 1, splits, S, "group"))


def back(rows: Tensor, order: Tensor, splits: Tensor) -> Tensor:
    return wait(OPS.combine_exchange(rows, None, order, order[:, None], splits, S, "group"))


def order_of(function: Any, *args: Tensor) -> list[str]:
    """The exchanges, waits and matmuls of the function's graph, in the order of the pass."""
    module = make_fx(function, tracing_mode="fake")(*args)
    reorder(module.graph)
    names = [node.name for node in module.graph.nodes if node.op == "call_function"]
    return [name for name in names if re.match(r"(dispatch_ex|combine_ex|all_|wait|mm|copy|add_$)", name)]


X, W, ORDER, SPLITS = torch.ones(T, D), torch.ones(D, D), torch.zeros(S, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int64)


def test_what_feeds_an_exchange_comes_first_and_other_work_is_shared_out_among_exchanges_before_their_waits() -> None:
    def function(x: Tensor, w: Tensor, order: Tensor, splits: Tensor) -> tuple[Tensor, Tensor]:
        shared = x @ w @ w @ w @ w  # mm to mm_3
        rows = there(x @ w, order, splits) @ w  # mm_4, mm_5
        return shared, back(rows, order, splits)

    dispatch, combine = ["dispatch_exchange", "mm", "mm_1", "wait_tensor"], ["combine_exchange", "mm_2", "mm_3", "wait_tensor_1"]
    assert order_of(function, X, W, ORDER, SPLITS) == ["mm_4", *dispatch, "mm_5", *combine]


def test_of_two_micro_batches_one_exchange_is_under_way_while_the_other_ones_experts_run() -> None:
    def function(x: Tensor, w: Tensor, order: Tensor, splits: Tensor) -> Tensor:
        return torch.cat([back(there(part, order, splits) @ w, order, splits) for part in x.split(T // 2)])

    names = order_of(function, X, W, ORDER, SPLITS)
    starts = ["dispatch_exchange", "dispatch_exchange_1"]
    first, second = ["wait_tensor", "mm", "combine_exchange"], ["wait_tensor_2", "mm_1", "combine_exchange_1"]
    assert names == [*starts, *first, *second, "wait_tensor_1", "wait_tensor_3"]


def test_the_order_of_collectives_does_not_depend_on_other_work() -> None:
    def function(x: Tensor, w: Tensor, order: Tensor, splits: Tensor, extra: bool) -> Any:
        more = [x @ w @ w for _ in range(3 * extra)]
        total = TORCH.all_reduce(x.sum(), "sum", "group")
        first = back(there(x, order, splits) @ w, order, splits)
        more += [first @ w] * extra
        weights = TORCH.all_gather_into_tensor(w, 2, "group")
        return wait(total), back(there(first, order, splits) @ wait(weights)[:D], order, splits), more

    orders = []
    for extra in (False, True):
        names = order_of(lambda *args, extra=extra: function(*args, extra), X, W, ORDER, SPLITS)
        orders.append([name for name in names if not name.startswith(("wait", "mm"))])
    assert orders[0] == orders[1]
    assert orders[0] == [
        "dispatch_exchange",
        "all_reduce",
        "combine_exchange",
        "all_gather_into_tensor",
        "dispatch_exchange_1",
        "combine_exchange_1",
    ]


def test_work_is_put_off_by_two_large_exchanges_and_no_more() -> None:
    def function(x: Tensor, w: Tensor, order: Tensor, splits: Tensor) -> Any:
        late = x @ w  # one piece of work, that the end alone needs
        for _ in range(6):
            x = there(x, order, splits)
        return x, late

    names = order_of(function, X, W, ORDER, SPLITS)
    assert names.index("mm") < names.index("dispatch_exchange_2")


def test_what_reads_memory_comes_before_what_writes_it() -> None:
    graph = torch.fx.Graph()
    x, w, order, splits = map(graph.placeholder, ("x", "w", "order", "splits"))
    with torch._subclasses.FakeTensorMode() as mode:
        for node, value in zip((x, w, order, splits), (X, W, ORDER, SPLITS), strict=True):
            node.meta["val"] = mode.from_tensor(value)

        def call(op: Any, *args: Any) -> torch.fx.Node:
            node = graph.call_function(op, args)
            node.meta["val"] = op(*(arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in args))
            return node

        before = call(torch.ops.aten.mm.default, x, w)
        call(torch.ops.aten.add_.Tensor, x, 1)
        pending = call(OPS.dispatch_exchange.default, x, order, 1, splits, S, "group")
        rows = call(TORCH.wait_tensor.default, pending)
        call(torch.ops.aten.copy_.default, x, call(torch.ops.aten.slice.Tensor, rows, 0, 0, T))
        graph.output((before, rows, call(torch.ops.aten.mm.default, x, w)))
    reorder(graph)
    names = [node.name for node in graph.nodes if node.op == "call_function"]
    exchange = ["dispatch_exchange_default", "wait_tensor_default"]
    assert names == ["mm_default", "add__tensor", *exchange, "slice_tensor", "copy__default", "mm_default_1"]


def test_options_name_the_passes_for_the_compilers_cache() -> None:
    ours = options(overlap_exchanges)["post_grad_custom_post_pass"]
    assert ours.uuid() == options(overlap_exchanges)["post_grad_custom_post_pass"].uuid()
    assert ours.uuid() != options(reorder)["post_grad_custom_post_pass"].uuid()
    assert options(overlap_exchanges, ours)["post_grad_custom_post_pass"].uuid() == (*ours.uuid(), ours.uuid())
    assert options(overlap_exchanges, lambda graph, pass_=ours: None)["post_grad_custom_post_pass"].uuid() is not None
    assert options(ours.__call__)["post_grad_custom_post_pass"].uuid() is None  # what cannot be known is not kept
    with pytest.raises(TypeError, match="passes held 'overlap', must be functions"):
        options("overlap")


def block(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, shared_up: Tensor, shared_down: Tensor) -> Tensor:
    """A layer beside a shared expert."""
    return layer(x, experts, weights, up, down) + silu(x @ shared_up) @ shared_down


def shared() -> list[Tensor]:
    seed = torch.Generator().manual_seed(5)
    return [(torch.randn(*shape, generator=seed) / D**0.5).bfloat16().requires_grad_() for shape in ((D, H), (H, D))]


def order_of_code(code: str) -> list[str]:
    """What the code calls, in its order: starts and waits of exchanges, ops and matmuls, with the names of what they work on."""
    calls, names = [], {}
    for result, op, arguments in re.findall(
        r"(?:(buf\d+) = )?(?:torch\.ops|extern_kernels)\.([\w.]+)\((.*)\)", code[code.index("def call") :]
    ):
        op = op.split(".")[min(1, op.count("."))]
        if op == "wait_tensor":
            pending = re.findall(r"buf\d+", arguments)[0]
            op = f"wait {names.get(pending, 'counts')}"
        names[result] = op
        names[f"buf{int(result[3:]) + 1}" if result else ""] = op  # a fallback's tensor is the buffer after its result
        calls.append(op)
    return calls


def inductor_here() -> tuple[list[str], list[str], int]:
    """Compiled with the pass and without: equal to the bit; gives the order of the code, and how often a user's own pass ran."""
    seen: list[torch.fx.Graph] = []
    given, experts = tokens_here(0, 5 + dist.get_rank(), torch.bfloat16, "random"), (*parameters(torch.bfloat16), *shared())
    unbacked(*given)
    want = step(block, given, experts)
    compiled = torch.compile(block, fullgraph=True, options=options(overlap_exchanges, seen.append))
    (got, again), codes = run_and_get_code(lambda: [step(compiled, given, experts) for _ in range(2)])
    for one, other, right in zip(got, again, want, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, right, rtol=0, atol=8 * torch.finfo(one.dtype).eps * max(1.0, right.abs().max().item()))
    forward, backward = map(order_of_code, codes)
    return forward, backward, len(seen)


@pytest.mark.slow
def test_the_generated_code_keeps_the_order_beside_a_users_own_pass() -> None:
    (forward, backward, seen), other = run_ranks(inductor_here, 2, timeout=300)
    assert seen == 2
    assert (forward, backward, seen) == other
    expecttest.assert_expected_inline(
        "\n".join(forward),
        """\
count
counting_sort
few_slots
messages_exchange
mm
wait messages_exchange
plan_sizes
first
slots_exchange
dispatch_exchange
mm
wait slots_exchange
unpack_slots
counting_sort
wait dispatch_exchange
gather
_grouped_mm
_grouped_mm
combine_exchange
wait combine_exchange
weighted_sum""",
    )
    expecttest.assert_expected_inline(
        "\n".join(backward),
        """\
dispatch_exchange
mm
mm
mm
wait dispatch_exchange
weighted_sum_backward
return_exchange
_grouped_mm
_grouped_mm
combine_exchange
_grouped_mm
_grouped_mm
mm
wait return_exchange
weighted_sum
wait combine_exchange
weighted_sum""",
    )


def graphs_here() -> list[str]:
    """The forward and backward graph of the block after the pass."""
    torch._dynamo.reset()
    graphs: list[torch.fx.Graph] = []
    given, experts = tokens_here(0, 5 + dist.get_rank(), torch.bfloat16, "random"), (*parameters(torch.bfloat16), *shared())
    unbacked(*given)
    got = step(torch.compile(block, fullgraph=True, backend=keeping(graphs, reorder)), given, experts)
    for one, right in zip(got, step(block, given, experts), strict=True):
        assert torch.equal(one, right)
    return [with_inputs_numbered(text_of(graph)) for graph in graphs]


def with_inputs_numbered(text: str) -> str:
    """By their first use: versions of torch number them differently."""
    seen: dict[str, str] = {}
    return re.sub(r"primals_\d+", lambda match: seen.setdefault(match[0], f"input_{len(seen) + 1}"), text)


@pytest.mark.slow
def test_in_the_graph_the_shared_expert_runs_during_the_exchanges_and_weights_gradients_too() -> None:
    (forward, backward), other = run_ranks(graphs_here, 2, timeout=200)
    assert other == [forward, backward]
    expecttest.assert_expected_inline(
        forward,
        """\
getitem, getitem_1 = moecomm::count(input_1, 8, 2, [0, 2, 8, 15, 16, 0, -1, -1, -1, 3, 0])
getitem_2, getitem_3, getitem_4 = moecomm::counting_sort(getitem, 2, mul_2, True)
few_slots = moecomm::few_slots(input_1, input_2, getitem, getitem_2, getitem_4, 4)
messages_exchange = moecomm::messages_exchange(getitem_1, few_slots, 'the counts of plan', GROUP)
mm = aten::mm(input_3, input_4)
wait_tensor = _c10d_functional::wait_tensor(messages_exchange)
getitem_5, getitem_6, getitem_7, getitem_8, getitem_9 = moecomm::plan_sizes(getitem_1, wait_tensor)
first = moecomm::first(getitem_2, getitem_5)
slots_exchange = moecomm::slots_exchange(input_1, input_2, getitem, first, 4, wait_tensor, getitem_9, getitem_8, getitem_6, GROUP)
dispatch_exchange = moecomm::dispatch_exchange(input_3, first, 2, getitem_8, getitem_6, GROUP)
silu_1 = aten::silu(mm)
mm_1 = aten::mm(silu_1, input_5)
wait_tensor_1 = _c10d_functional::wait_tensor(slots_exchange)
getitem_10, getitem_11 = moecomm::unpack_slots(wait_tensor_1, 2, 4, torch.float32)
getitem_12, getitem_13, getitem_14 = moecomm::counting_sort(getitem_10, 4, getitem_7)
wait_tensor_2 = _c10d_functional::wait_tensor(dispatch_exchange)
gather = moecomm::gather(wait_tensor_2, getitem_12, getitem_13)
_grouped_mm = aten::_grouped_mm(gather, input_6, getitem_14)
silu = aten::silu(_grouped_mm)
_grouped_mm_1 = aten::_grouped_mm(silu, input_7, getitem_14)
combine_exchange = moecomm::combine_exchange(_grouped_mm_1, getitem_11, getitem_12, getitem_13, getitem_8, getitem_5, GROUP)
t = aten::t(silu_1)
t_1 = aten::t(input_5)
t_2 = aten::t(input_3)
t_3 = aten::t(input_4)
transpose = aten::transpose.int(silu, -2, -1)
transpose_1 = aten::transpose.int(input_7, -2, -1)
transpose_2 = aten::transpose.int(gather, -2, -1)
transpose_3 = aten::transpose.int(input_6, -2, -1)
wait_tensor_3 = _c10d_functional::wait_tensor(combine_exchange)
weighted_sum = moecomm::weighted_sum(wait_tensor_3, None, first, getitem_3)
add_63 = aten::add.Tensor(weighted_sum, mm_1)
return add_63, getitem_3, getitem_8, first, getitem_11, getitem_12, getitem_13, getitem_14, _grouped_mm, _grouped_mm_1,
    mm, t, t_1, t_2, t_3, transpose, transpose_1, transpose_2, transpose_3, getitem_5, getitem_6, input_8, getitem_7""",
    )
    expecttest.assert_expected_inline(
        backward,
        """\
dispatch_exchange_1 = moecomm::dispatch_exchange(tangents_1, first, 2, getitem_8, getitem_6, GROUP)
mm_2 = aten::mm(t, tangents_1)
mm_3 = aten::mm(tangents_1, t_1)
silu_backward = aten::silu_backward(mm_3, mm)
wait_tensor_4 = _c10d_functional::wait_tensor(dispatch_exchange_1)
getitem_15, getitem_16 = moecomm::weighted_sum_backward(wait_tensor_4, _grouped_mm_1, getitem_11, getitem_12, getitem_13)
return_exchange = moecomm::return_exchange(getitem_16, getitem_8, getitem_5, GROUP)
_grouped_mm_3 = aten::_grouped_mm(getitem_15, transpose_1, getitem_14)
silu_backward_1 = aten::silu_backward(_grouped_mm_3, _grouped_mm)
_grouped_mm_5 = aten::_grouped_mm(silu_backward_1, transpose_3, getitem_14)
combine_exchange_1 = moecomm::combine_exchange(_grouped_mm_5, None, getitem_12, getitem_13, getitem_8, getitem_5, GROUP)
mm_4 = aten::mm(t_2, silu_backward)
mm_5 = aten::mm(silu_backward, t_3)
_grouped_mm_2 = aten::_grouped_mm(transpose, getitem_15, getitem_14)
_grouped_mm_4 = aten::_grouped_mm(transpose_2, silu_backward_1, getitem_14)
wait_tensor_6 = _c10d_functional::wait_tensor(return_exchange)
weighted_sum_2 = moecomm::weighted_sum(wait_tensor_6, None, first, getitem_3)
wait_tensor_5 = _c10d_functional::wait_tensor(combine_exchange_1)
weighted_sum_1 = moecomm::weighted_sum(wait_tensor_5, None, first, getitem_3)
add_67 = aten::add.Tensor(mm_5, weighted_sum_1)
return None, add_67, None, None, None, weighted_sum_2, _grouped_mm_4, _grouped_mm_2, mm_4, mm_2""",
    )
