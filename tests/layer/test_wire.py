"""Rows that are quantised for their way: what arrives, what it weighs, what becomes of the gradients, and how far a layer is off."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.autograd.functional import hvp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.library import opcheck
from torch.nn.functional import silu

import moecomm.functional as mf
from moecomm.compile.bucket import merge_exchanges
from moecomm.compile.overlap import is_start, reorder
from moecomm.ops.exchange.all_to_all_wire import wire_exchange
from moecomm.ops.exchange.dispatch_combine_wire import combine_wire, dispatch_wire
from moecomm.ops.exchange.start_op import STARTS
from moecomm.ops.rows.dequantize import dequantize
from moecomm.ops.rows.quantize import quantize
from moecomm.ops.rows.wire_formats import WIRES, blocks
from tests import reference
from tests.compile.graphs import exchanges, keeping, unbacked
from tests.faults.test_bad_input import first_sentence
from tests.layer.test_layer import Problem
from tests.ops.cases import COMPOSED, IN_FLIGHT
from tests.ops.rows.test_quantize import bound
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

E, K, H = 4, 2, 8
TOKENS = {1: (7,), 2: (9, 4), 4: (5, 0, 8, 1)}


def problem(tokens: int, d: int, dtype: torch.dtype = torch.float32) -> Problem:
    """Rows, and values of a row, of different magnitudes."""
    seed = torch.Generator().manual_seed(d)
    experts = torch.rand(tokens, E + 1, generator=seed).argsort(1)[:, :K] - 1
    x, grad = (torch.randn(tokens, d, generator=seed) * 2.0 ** torch.randint(-9, 3, (tokens, d), generator=seed) for _ in range(2))
    up, down = torch.randn(E, d, H, generator=seed) / d**0.5, torch.randn(E, H, d, generator=seed) / H**0.5
    return Problem(x.to(dtype), experts, torch.rand(tokens, K, generator=seed), up, down, grad.to(dtype))


def mine(whole: Tensor) -> Tensor:
    """This rank's tokens."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return whole[sum(TOKENS[ranks][:rank]) : sum(TOKENS[ranks][: rank + 1])].clone()


def arrived(x: Tensor, wire: str | None) -> Tensor:
    """x as it arrives."""
    return x if wire is None else dequantize(quantize(x, None, 1, wire), None, 1, x.shape[1], x.dtype, wire)


def assert_same(got: Any, want: Any) -> None:
    """The same bits, NaN too."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def rows_here(dtype: torch.dtype) -> None:
    for d in (40, 128, 300, 0):
        of = problem(sum(TOKENS[dist.get_world_size()]), d, dtype)
        x, experts, weights = mine(of.x), mine(of.experts), mine(of.weights)
        if x.numel():
            x[0], x[-1, -2:] = 0, torch.tensor([float("nan"), float("inf")], dtype=dtype)
        for plan in (mf.plan(experts, weights, E), mf.plan(experts, weights, E, max_rows=9)):
            for wire in WIRES:
                rows = mf.dispatch(x, plan, wire=wire)
                assert_same(rows, mf.dispatch(arrived(x, wire), plan))
                assert_same(mf.dispatch(x.unflatten(1, (2, d // 2)), plan, wire=wire).flatten(1), rows)
                sent = mf.dispatch_quantized(x, plan, wire)
                assert sent.data.dtype == torch.float8_e4m3fn
                assert (sent.scales.dtype, sent.scales.shape[1]) == (WIRES[wire].scale, blocks(d, wire))
                assert (sent.rows.shape, sent.rows.dtype) == (rows.shape, dtype)
                each = sent.scales.float().repeat_interleave(WIRES[wire].block, 1)[:, :d]
                assert_same((sent.data.float() * each).to(dtype), rows)
                # Home again: a rank's sum for a token is rounded, and then added to the others'.
                there = mf.combine(rows, plan)
                assert_same(mf.combine(rows, plan, backward_wire=wire), there)
                if dist.get_world_size() == 1:
                    assert_same(mf.combine(rows, plan, wire=wire), arrived(there, wire))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_arrive_as_their_tokens_do_when_rounded_first_also_in_static_mode(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(rows_here, ranks, dtype)


def test_no_process_group_is_needed() -> None:
    assert not dist.is_initialized()
    x, plan = torch.randn(3, 5), mf.plan(torch.tensor([[0], [1], [0]]), torch.ones(3, 1), 2)
    assert_same(mf.combine(mf.dispatch(x, plan, wire="mxfp8"), plan, wire="mxfp8"), arrived(x, "mxfp8"))


class Experts(torch.autograd.Function):
    """The squares of the rows, times 3, from the values and scales."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, data: Tensor, scales: Tensor, block: int) -> Tensor:
        values = data.to(rows.dtype) * scales.to(rows.dtype).repeat_interleave(block, 1)[:, : data.shape[1]]
        ctx.save_for_backward(values)
        return 3 * values**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 6 * ctx.saved_tensors[0] * grad, None, None, None


def gradients_here() -> None:
    of = problem(sum(TOKENS[dist.get_world_size()]), 40)
    experts, weights, cotangent = mine(of.experts), mine(of.weights).requires_grad_(), mine(of.grad)
    plan = mf.plan(experts, weights, E)

    def gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
        return torch.autograd.grad(function(x), x, grad, retain_graph=True)[0]

    for wire in WIRES:
        x = mine(of.x).requires_grad_()
        there = arrived(x.detach(), wire).requires_grad_()
        squares = gradient(lambda x: mf.combine(3 * mf.dispatch(x, plan) ** 2, plan), there, cotangent)
        got = gradient(lambda x, wire=wire: mf.combine(3 * mf.dispatch(x, plan, wire=wire) ** 2, plan), x, cotangent)
        assert_same(got, squares)  # straight through: the gradient of what arrived

        sent = mf.dispatch_quantized(x, plan, wire)
        y = mf.combine(Experts.apply(sent.rows, sent.data, sent.scales, WIRES[wire].block), plan)
        torch.testing.assert_close(torch.autograd.grad(y, x, cotangent)[0], squares)
        assert [part.requires_grad for part in sent] == [False, False, True]

        # A gradient goes home as rows do: the transposed functions, with the same rounding.
        ones = plan._replace(weights=(plan.row_position >= 0).float())  # the unweighted combine
        rows = mf.dispatch(x.detach(), plan).requires_grad_()
        grad_rows = torch.randn(rows.shape, generator=torch.Generator().manual_seed(dist.get_rank()))
        back = gradient(lambda x, wire=wire: mf.dispatch(x, plan, backward_wire=wire), x, grad_rows)
        assert_same(back, mf.combine(grad_rows, ones, wire=wire))
        through = gradient(lambda rows, wire=wire: mf.combine(rows, plan, backward_wire=wire), rows, cotangent)
        assert_same(through, gradient(lambda rows: mf.combine(rows, plan), rows, arrived(cotangent, wire)))
        of_weights = [
            torch.autograd.grad(mf.combine(rows, plan, backward_wire=each), weights, grad, retain_graph=True)[0]
            for each, grad in ((wire, cotangent), (None, arrived(cotangent, wire)))
        ]
        assert_same(*of_weights)

        # The second derivative of a sum of squares, straight through four times.
        direction = torch.ones_like(x)
        for back in (None, wire):
            _, second = hvp(lambda x, wire=wire, back=back: (mf.dispatch(x, plan, wire=wire, backward_wire=back) ** 2).sum(), x, direction)
            slots = (experts >= 0).sum(1, keepdim=True).float()
            assert_same(second, (2 * slots).expand_as(x))  # small integers, which every format has


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_gradients_pass_the_rounding_as_they_are_and_are_rounded_by_a_wire_of_their_own(ranks: int) -> None:
    run_ranks(gradients_here, ranks)


def static_here() -> None:
    """With room for all, and NaN in the padding of the experts' rows and of the gradient that they hand back."""
    of = problem(sum(TOKENS[dist.get_world_size()]), 40)
    experts, found = mine(of.experts), []
    for max_rows in (None, 9):
        x, weights = mine(of.x).requires_grad_(), mine(of.weights).requires_grad_()
        plan = mf.plan(experts, weights, E, max_rows=max_rows)
        rows = mf.dispatch(x, plan, wire="mxfp8", backward_wire="float8_e4m3")
        padding = torch.arange(rows.shape[0]).unsqueeze(1) >= plan.offsets[-1]
        assert not rows[padding.flatten()].any()
        rows.register_hook(lambda grad, padding=padding: grad.masked_fill(padding, float("nan")))
        y = mf.combine((rows**2).masked_fill(padding, float("nan")), plan, wire="float8_e4m3", backward_wire="mxfp8")
        found.append([y, *torch.autograd.grad(y, (x, weights), mine(of.grad))])
    assert_same(*found)


@pytest.mark.parametrize("ranks", [1, 2])
def test_static_mode_reads_no_padding_forward_or_backward(ranks: int) -> None:
    run_ranks(static_here, ranks)


def dtensors_here() -> None:
    """Tokens over ranks, as plain tensors are; and the hidden dim over ranks, whose slices are quantised as they are."""
    of, mesh = problem(sum(TOKENS[2]), 200), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    experts, weights, whole = (each[:4].clone() for each in (of.experts, of.weights, of.x))
    part, alone = whole.chunk(2, 1)[dist.get_rank()].contiguous(), dist.new_subgroups(group_size=1)[0]
    for own, placement, over, group in ((whole, Shard(0), Shard(0), mesh), (part, Shard(1), Replicate(), alone)):
        x = DTensor.from_local(own, mesh, [placement], run_check=False)
        routed = [DTensor.from_local(each, mesh, [over], run_check=False) for each in (experts, weights)]
        plan, plain = mf.plan(*routed, E, group, like=x), mf.plan(experts, weights, E, group)
        rows = mf.dispatch(x, plan, wire="float8_e4m3")
        assert_same(rows, mf.dispatch(own, plain, wire="float8_e4m3"))
        assert_same(mf.dispatch_quantized(x, plan, "mxfp8").scales.float(), mf.dispatch_quantized(own, plain, "mxfp8").scales.float())
        y = mf.combine(rows, plan, wire="mxfp8")
        assert isinstance(y, DTensor)
        assert y.placements == (placement,)
        assert_same(y.to_local(), mf.combine(rows, plain, wire="mxfp8"))


def test_dtensors_go_in_as_their_shards() -> None:
    run_ranks(dtensors_here, 2)


def layer(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, wire: str | None) -> Tensor:
    """As DeepSeek-V3 sends: forward dispatch and the gradient's dispatch in 8 bits, both combines as they are."""
    plan = mf.plan(experts, weights, E, like=x)
    rows = mf.dispatch(x, plan, wire=wire)
    expert = torch.searchsorted(plan.offsets, torch.arange(rows.shape[0], dtype=torch.int32), right=True)  # [N]
    rows = (silu(rows.unsqueeze(1) @ up[expert]) @ down[expert]).squeeze(1)
    return mf.combine(rows, plan, backward_wire=wire)


def layer_here(d: int, wire: str) -> tuple[Tensor, Tensor]:
    of, rank, ranks = problem(sum(TOKENS[2]), d), dist.get_rank(), dist.get_world_size()
    x, weights = mine(of.x).requires_grad_(), mine(of.weights).requires_grad_()
    y = layer(x, mine(of.experts), weights, of.up.chunk(ranks)[rank], of.down.chunk(ranks)[rank], wire)
    return y.detach(), torch.autograd.grad(y, x, mine(of.grad))[0]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("d", [40, 200])
def test_a_layer_on_two_ranks_is_as_near_to_the_exact_one_as_its_rows_are(d: int, wire: str) -> None:
    """By the mean value theorem, element by element: the slope of silu is at most 1.1 in size, that of its slope at most 0.5."""
    of = problem(sum(TOKENS[2]), d)
    want = reference.layer_and_gradients(*of)
    mix = reference.mix(of.experts, of.weights, E)
    up, down, grad = of.up.double(), of.down.double(), of.grad.double()
    off, grad_off = bound(of.x, wire), bound(of.grad, wire)  # [T, D]
    hidden = off @ up.abs()  # [E, T, H]: how far off the experts' inputs to silu are
    most = torch.einsum("te,etd->td", mix, 1.1 * hidden @ down.abs())
    reach = (grad.abs() + grad_off) @ down.abs().transpose(1, 2) * 0.5 * hidden + 1.1 * grad_off @ down.abs().transpose(1, 2)
    grad_most = torch.einsum("te,etd->td", mix, reach @ up.abs().transpose(1, 2))
    y, grad_x = map(torch.cat, zip(*run_ranks(layer_here, 2, d, wire), strict=True))
    for got, exact, limit in ((y, want["y"], most), (grad_x, want["x"], grad_most)):
        error = (got.double() - exact).abs()
        assert (error <= limit + 1e-5 * exact.abs().max()).all()
        assert 1e-3 < error.max() / exact.abs().max() < 0.05  # it was rounded, and not worse than to 3 bits


def bytes_here(wire: str, d: int) -> tuple[list[list[int]], list[list[int]]]:
    of = problem(sum(TOKENS[dist.get_world_size()]), d, torch.bfloat16)
    x, plan = mine(of.x).requires_grad_(), mf.plan(mine(of.experts), mine(of.weights), E)
    with Traffic() as forward:
        y = mf.combine(mf.dispatch(x, plan, wire=wire, backward_wire=wire), plan, wire=wire, backward_wire=wire)
    with Traffic() as backward:
        y.backward(mine(of.grad))
    assert forward.reads == backward.reads == []
    return forward.bytes, backward.bytes


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_message_is_a_byte_a_value_and_the_scales_in_one_exchange(ranks: int) -> None:
    for wire, d, row in (
        ("float8_e4m3", 256, 256 + 4 * 2),
        ("float8_e4m3", 130, 130 + 4 * 2),
        ("mxfp8", 256, 256 + 8),
        ("mxfp8", 5, 5 + 1),
    ):
        of_rank = problem(sum(TOKENS[ranks]), d).experts.split(TOKENS[ranks])
        local = E // ranks
        pairs = torch.tensor([[reference.pairs(of, p * local, (p + 1) * local) for p in range(ranks)] for of in of_rank])  # [from, to]
        for rank, (forward, backward) in enumerate(run_ranks(bytes_here, ranks, wire, d)):
            out, back = (pairs[rank] * row).tolist(), (pairs[:, rank] * row).tolist()
            assert forward == [out, back]
            assert backward[0] == out
            assert backward[1] == back


def opcheck_here() -> None:
    of = problem(sum(TOKENS[2]), 40)
    x, experts, weights = mine(of.x).requires_grad_(), mine(of.experts), mine(of.weights)
    for wire, max_rows in (("float8_e4m3", None), ("mxfp8", 3)):
        plan = mf.plan(experts, weights, E, max_rows=max_rows)
        indices = plan.send_order, plan.send_position, plan.row_order, plan.row_position, plan.splits, plan.group
        rows, pairs = torch.randn(plan.row_order.shape[0], 40).requires_grad_(), torch.randn(plan.row_position.shape[0], 40)
        sent = plan.splits, pairs.shape[0], plan.group
        opcheck(wire_exchange, (x.detach(), plan.send_order, K, wire, 0, *sent), test_utils=IN_FLIGHT)
        opcheck(wire_exchange, (pairs, None, 1, wire, 1, plan.splits, plan.send_order.shape[0], plan.group), test_utils=IN_FLIGHT)
        opcheck(dispatch_wire, (x, *indices, wire, wire), test_utils=COMPOSED)
        opcheck(combine_wire, (rows, plan.weights.detach().requires_grad_(), *indices, None, wire), test_utils=COMPOSED)


@pytest.mark.slow
def test_the_ops_pass_opcheck_on_two_ranks() -> None:
    run_ranks(opcheck_here, 2)


def compiled_here() -> list[list[str]]:
    """The exchanges of the graphs, forward and backward, merged and not."""
    of = problem(sum(TOKENS[2]), 40)
    up, down = (each.chunk(2)[dist.get_rank()].clone().requires_grad_() for each in (of.up, of.down))
    given = [mine(of.x).requires_grad_(), mine(of.experts), mine(of.weights).requires_grad_(), up, down]
    leaves = [each for each in given if each.requires_grad]
    seen = []

    def quantized(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        plan = mf.plan(experts, weights, E)
        sent = mf.dispatch_quantized(x, plan, "mxfp8", backward_wire="float8_e4m3")
        return mf.combine(Experts.apply(sent.rows, sent.data, sent.scales, 32), plan)

    def check(function: Callable[..., Tensor], given: list[Any], leaves: list[Tensor], backend: Any) -> None:
        torch._dynamo.reset()
        unbacked(*given[:3])
        got, want = torch.compile(function, fullgraph=True, backend=backend)(*given), function(*given)
        gradients = [torch.autograd.grad(y, leaves, mine(of.grad)) for y in (got, want)]
        assert_same([got, *gradients[0]], [want, *gradients[1]])

    for change in (None, lambda graph: (merge_exchanges(graph), reorder(graph))):
        graphs: list[torch.fx.Graph] = []
        check(layer, [*given, "float8_e4m3"], leaves, keeping(graphs, change))
        for graph in graphs:
            assert all(is_start(node) for node in graph.nodes if node.target in STARTS)
        seen += [exchanges(graph) for graph in graphs]
    check(quantized, given[:3], [leaves[0]], "aot_eager")
    return seen


@pytest.mark.slow
def test_a_compiled_layer_is_the_eager_one_and_its_passes_know_the_exchange() -> None:
    assert wire_exchange in STARTS
    first, second = run_ranks(compiled_here, 2, timeout=300)
    assert first == second
    forward, backward, merged, merged_backward = first
    assert forward == ["messages_exchange", "plan_sizes", "slots_exchange", "wire_exchange", "combine_exchange"]
    assert backward == ["wire_exchange", "combine_exchange", "return_exchange"]
    assert merged == ["messages_exchange", "plan_sizes", "rows_exchange", "combine_exchange"]
    assert merged_backward == ["wire_exchange", "rows_exchange"]


def inductor_here() -> str:
    """The code of a dispatch and a combine, both with a wire."""
    of = problem(sum(TOKENS[2]), 40)
    x, plan = mine(of.x), mf.plan(mine(of.experts), mine(of.weights), E)

    def there_and_back(x: Tensor) -> Tensor:
        return mf.combine(2 * mf.dispatch(x, plan, wire="float8_e4m3"), plan, wire="mxfp8")

    torch._dynamo.reset()
    got, (code,) = run_and_get_code(torch.compile(there_and_back, fullgraph=True), x)
    assert_same(got, there_and_back(x))
    return code


@pytest.mark.slow
def test_inductor_takes_the_exchange_for_the_collective_that_it_is() -> None:
    for code in run_ranks(inductor_here, 2, timeout=300):
        calls = re.findall(r"torch\.ops\.(?:moecomm|_c10d_functional)\.(\w+)\.default\(", code)
        assert [call for call in calls if call.startswith(("wire", "wait"))] == ["wire_exchange", "wait_tensor"] * 2


def wrong_here() -> list[tuple[type[Exception], str]]:
    experts, weights = torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    plan = mf.plan(experts, weights, E)
    x, rows = torch.ones(2, 3), torch.ones(plan.row_order.shape[0], 3)
    calls: list[Callable[[], Any]] = [
        lambda: mf.dispatch(x, plan, wire="fp8"),
        lambda: mf.dispatch(x, plan, wire=torch.float8_e4m3fn),
        lambda: mf.dispatch(x, plan, backward_wire="mxfp4"),
        lambda: mf.dispatch(x.double(), plan, wire="mxfp8"),
        lambda: mf.dispatch({"x": x, "position": torch.arange(2)}, plan, wire="mxfp8"),
        lambda: mf.combine(rows, plan, wire="e4m3"),
        lambda: mf.combine(rows.double(), plan, backward_wire="float8_e4m3"),
        lambda: mf.dispatch_quantized(x, plan, None),
        lambda: mf.dispatch_quantized(x.unsqueeze(2), plan, "mxfp8"),
        lambda: mf.dispatch_quantized(x[:1], plan, "mxfp8"),
    ]
    raised = []
    with Traffic() as traffic:
        for call in calls:
            with pytest.raises((TypeError, ValueError)) as error:
                call()
            raised.append((type(error.value), first_sentence(error.value)))
    assert traffic.collectives == []
    return raised


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_wrong_is_named_before_anything_is_sent(ranks: int) -> None:
    formats, floats = "None, 'float8_e4m3' or 'mxfp8'", "of dtype float32, bfloat16 or float16, with"
    for raised in run_ranks(wrong_here, ranks):
        assert raised == [
            (ValueError, f"wire was 'fp8'; it must be {formats}"),
            (TypeError, f"wire was dtype; it must be {formats}"),
            (ValueError, f"backward_wire was 'mxfp4'; it must be {formats}"),
            (TypeError, f"x was of dtype torch.float64; it must be {floats} wire 'mxfp8'"),
            (TypeError, f"x was of dtype torch.int64; it must be {floats} wire 'mxfp8'"),
            (ValueError, f"wire was 'e4m3'; it must be {formats}"),
            (TypeError, f"rows was of dtype torch.float64; it must be {floats} backward_wire 'float8_e4m3'"),
            (TypeError, "wire was None; it must be 'float8_e4m3' or 'mxfp8'"),
            (ValueError, "x was of shape [2, 3, 1]; it must be of shape [T, D]"),
            (ValueError, "x was of shape [1, 3]; it must be of shape [2, ...], the plan's T = 2"),
        ]


def test_transforms_of_torch_func_are_refused_as_elsewhere() -> None:
    plan = mf.plan(torch.tensor([[0]]), torch.ones(1, 1), 1)
    for function in (lambda x: mf.dispatch(x, plan, wire="mxfp8"), lambda x: mf.dispatch_quantized(x, plan, "mxfp8").rows):
        with pytest.raises(NotImplementedError, match=re.escape("inside a Grad transform of torch.func")):
            torch.func.grad(lambda x, function=function: function(x).sum())(torch.ones(1, 2))


def test_the_snippet_of_the_document_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "wire.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert_same(names["rows"], mf.dispatch(arrived(names["x"], "float8_e4m3"), names["plan"]))
    assert names["y"].shape == names["x"].shape
