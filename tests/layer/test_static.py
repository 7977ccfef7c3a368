"""Static mode: every size follows from shapes, what has no room is dropped and counted, and the host reads nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.nn.functional import grouped_mm, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moecomm.functional as mf
from tests import reference
from tests.compile.graphs import keeping, text_of
from tests.faults.test_bad_input import first_sentence
from tests.layer.test_layer import UNITS, Case, D, H, grouped, loop, problem
from tests.ops.routing.test_place_slots import expected as places_by_loop
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

NAN = float("nan")
TOKENS = {1: [(13,), (0,)], 2: [(9, 4), (0, 17)], 4: [(5, 0, 11, 1)]}
SIZES = [(1, 4), (2, 8), (8, 8)]  # K, E; with K = 8 a rank of several has fewer experts than a token has slots
MOST = (1, 4)  # rows of a pair of ranks, beside as many as no token lacks


def fitting(experts: Tensor, num_experts: int, ranks: int, most: int) -> Tensor:
    """One rank's ids, with -1 where there is no room: ``most`` tokens have it on each rank, for as many slots as that has experts."""
    local, taken, ids = num_experts // ranks, [0] * ranks, experts.tolist()
    for row in ids:
        for rank in range(ranks):
            slots = [j for j, e in enumerate(row) if rank * local <= e < (rank + 1) * local]
            taken[rank] += bool(slots)
            for j in slots[local:] if taken[rank] <= most else slots:
                row[j] = -1
    return torch.tensor(ids, dtype=torch.int64).view(experts.shape)


class Layer(NamedTuple):
    """What one rank has of a layer."""

    tensors: dict[str, Tensor]  # y, and the gradients
    rows: Tensor  # that are not padding
    dropped: int | None


def poisoned(computed: Tensor, size: int) -> Tensor:
    """``size`` rows, NaN in those that are padding, whose gradient must be zero."""
    rows = torch.cat((computed, computed.new_full((size - computed.shape[0], computed.shape[1]), NAN)))

    def check(grad: Tensor) -> None:
        assert not grad[computed.shape[0] :].any()

    rows.register_hook(check)
    return rows


def layer_here(case: Case, max_rows: int | None) -> Layer:
    """A layer of this rank; in static mode with NaN in all padding of the experts' results, and of the gradient that they hand back."""
    of, rank, ranks = problem(case), dist.get_rank() if dist.is_initialized() else 0, len(case.tokens)
    own = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
    local = case.num_experts // ranks
    mine = slice(rank * local, (rank + 1) * local)
    leaves = {"x": of.x[own], "weights": of.weights[own], "up": of.up[mine], "down": of.down[mine]}
    x, weights, up, down = (leaf.clone().requires_grad_() for leaf in leaves.values())
    plan = mf.plan(of.experts[own], weights, case.num_experts, max_rows=max_rows, like=x)
    rows = mf.dispatch(x, plan)
    here = int(plan.offsets[-1])
    if max_rows is not None:
        assert rows.shape[0] == ranks * max_rows * min(case.k, local)
        assert not rows[here:].any()
        rows.register_hook(lambda grad: torch.cat((grad[:here], torch.full_like(grad[here:], NAN))))
    if case.experts == "loop":
        y = mf.combine(poisoned(loop(rows[:here], up, down, plan.offsets), rows.shape[0]), plan)
    else:
        y = mf.combine(grouped(rows, up, down, plan.offsets), plan)
    gradients = torch.autograd.grad(y, (x, weights, up, down), of.grad[own])
    tensors = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    return Layer(tensors, rows.detach()[:here], None if plan.dropped is None else int(plan.dropped))


def cases(ranks: int) -> list[Case]:
    routings = ("random", "some dropped", "repeated", "all to one", "all dropped")
    sizes = [(TOKENS[ranks][0], size) for size in SIZES] + [(tokens, SIZES[1]) for tokens in TOKENS[ranks][1:]]
    kinds = [(torch.float64, "loop"), (torch.bfloat16, "grouped_mm")]
    return [Case(tokens, *size, routing, *kind) for tokens, size in sizes for routing in routings for kind in kinds]


def layers_here(of: list[Case]) -> list[list[Layer]]:
    return [[layer_here(case, most) for most in (None, max(1, *case.tokens), *MOST)] for case in of]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_layer_is_that_of_the_slots_that_fit_and_with_room_for_all_it_is_dynamic_modes_bit_for_bit(ranks: int) -> None:
    for case, *parts in zip(cases(ranks), *run_ranks(layers_here, ranks, cases(ranks), timeout=300), strict=True):
        of = problem(case)
        for most, *here in zip((None, max(1, *case.tokens), *MOST), *parts, strict=True):
            if most is None:
                dynamic = here
                continue
            ids = [fitting(experts, case.num_experts, ranks, most) for experts in of.experts.split(case.tokens)]
            lost = [int((asked != kept).sum()) for asked, kept in zip(of.experts.split(case.tokens), ids, strict=True)]
            assert [layer.dropped for layer in here] == lost, case
            want = reference.layer_and_gradients(*of._replace(experts=torch.cat(ids)))
            for name, value in want.items():
                got = torch.cat([layer.tensors[name] for layer in here])
                largest = max(1.0, value.abs().max().item()) if value.numel() else 1.0
                tolerance = UNITS[case.dtype] * torch.finfo(case.dtype).eps * largest
                torch.testing.assert_close(got.double(), value, rtol=0, atol=tolerance)
            if not any(lost):
                for got, same in zip(here, dynamic, strict=True):
                    assert torch.equal(bits(got.rows), bits(same.rows))
                    assert all(torch.equal(bits(got.tensors[name]), bits(same.tensors[name])) for name in want), case


def test_static_mode_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    case = Case((7,), 2, 8, "random", torch.float64, "loop")
    room, dynamic = layer_here(case, 7), layer_here(case, None)
    assert all(torch.equal(room.tensors[name], dynamic.tensors[name]) for name in dynamic.tensors)
    assert room.dropped == 0
    assert layer_here(case, 3).dropped == 8


def wrong_ids_here() -> list[tuple[Tensor, int]]:
    """Ids out of range, in signed and unsigned dtypes: the sums without them, and how many they are."""
    results = []
    for ids in (torch.tensor([[0, -2], [4, -1], [2**40, 3]]), torch.tensor([[0, 255], [4, 9], [1, 3]], dtype=torch.uint8)):
        plan = mf.plan(ids, torch.ones(3, 2), 4, max_rows=3)
        results.append((mf.combine(mf.dispatch(torch.tensor([1.0, 2.0, 4.0]), plan), plan), int(plan.dropped)))
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_ids_out_of_range_are_dropped_and_counted(ranks: int) -> None:
    for signed, unsigned in run_ranks(wrong_ids_here, ranks):
        assert (signed[0].tolist(), signed[1]) == ([1.0, 0.0, 4.0], 3)
        assert (unsigned[0].tolist(), unsigned[1]) == ([1.0, 0.0, 8.0], 3)


def cost_here(most: int) -> list[tuple[list[str], list[list[int]], list[str]]]:
    """The collectives, bytes and host reads of a layer, forward and backward."""
    rank = dist.get_rank()
    experts = torch.randint(-1, 8, (3 * rank, 2), generator=torch.Generator().manual_seed(rank))
    weights, x = torch.ones(3 * rank, 2, requires_grad=True), torch.ones(3 * rank, D, requires_grad=True)
    with Traffic() as forward:
        plan = mf.plan(experts, weights, 8, max_rows=most, like=x)
        y = mf.combine(mf.dispatch(x, plan) * 2, plan)
    with Traffic() as backward:
        torch.autograd.grad(y, (x, weights), torch.ones_like(y))
    return [(traffic.collectives, traffic.bytes, traffic.reads) for traffic in (forward, backward)]


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_a_layer_is_three_equal_exchanges_forward_and_three_backward_and_reads_nothing(ranks: int) -> None:
    token, slots, weights = 4 * D, 2 * (4 + 1), 2 * 4  # bytes of a pair
    for most in (2, 9):
        for forward, backward in run_ranks(cost_here, ranks, most):
            assert (forward[2], backward[2]) == ([], [])
            assert forward[0] == backward[0] == (["all_to_all_single"] * 3 if ranks > 1 else [])
            equal = {row: [most * row] * ranks for row in (token, slots, weights)}
            assert forward[1] == ([equal[slots], equal[token], equal[token]] if ranks > 1 else [])
            assert sorted(backward[1]) == (sorted([equal[token], equal[token], equal[weights]]) if ranks > 1 else [])


def layer(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, max_rows: int | None) -> tuple[Tensor, Tensor | None]:
    plan = mf.plan(experts, weights, 8, like=x, max_rows=max_rows)
    rows = mf.dispatch(x, plan)
    rows = grouped_mm(silu(grouped_mm(rows, up, offs=plan.offsets)), down, offs=plan.offsets)
    return mf.combine(rows, plan), plan.dropped


def step(function: Callable[..., Any], given: list[Tensor], max_rows: int | None) -> list[Tensor]:
    """The layer's results, and the gradients of its floating arguments."""
    y, dropped = function(*given, max_rows)
    return [y.detach(), dropped, *torch.autograd.grad(y, [x for x in given if x.requires_grad], torch.ones_like(y))]


def arguments(tokens: int, seed: int, device: str = "cpu") -> list[Tensor]:
    generator, local = torch.Generator().manual_seed(seed), 8 // (dist.get_world_size() if dist.is_initialized() else 1)
    experts = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :2].contiguous()
    shapes = {"x": (tokens, D), "weights": (tokens, 2), "up": (local, D, H), "down": (local, H, D)}
    x, weights, up, down = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes.values())
    given = [x, torch.full_like(experts, 7) if seed % 3 == 2 else experts, weights.float(), up, down]
    return [tensor.to(device).requires_grad_(tensor.is_floating_point()) for tensor in given]


class Devices(TorchDispatchMode):
    """The device of every tensor that an op takes or gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.seen |= {str(leaf.device) for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        return out


def without_data_here() -> set[str]:
    """Tensors of the meta device have no data: what would read any raises, and so does what asks for sizes that depend on it."""
    given = arguments(5, 0, "meta")
    with pytest.raises(RuntimeError):
        step(layer, given, None)
    with Devices() as devices:
        step(layer, given, 3)
    return devices.seen


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_forward_and_backward_takes_no_data_to_run_and_no_tensor_of_another_device(ranks: int) -> None:
    assert run_ranks(without_data_here, ranks) == [{"meta"}] * ranks


def compiled_here(backend: str) -> list[str]:
    """The graphs, forward and backward, once they have served many routings, each rank with its own number of tokens."""
    torch._dynamo.reset()
    graphs: list[torch.fx.Graph] = []
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor") if backend == "inductor" else None
    compiled = torch.compile(layer, fullgraph=True, backend=counter or keeping(graphs))
    exchanges = 6 if dist.get_world_size() > 1 else 0
    tokens = 6 if backend == "inductor" else 6 - dist.get_rank()
    for seed in range(6):
        given = arguments(tokens, 10 * dist.get_rank() + seed)
        with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
            got = step(compiled, given, 3)
        assert exchange.call_count == exchanges
        for one, want in zip(got, step(layer, given, 3), strict=True):
            if backend == "inductor":  # it fuses the experts, and so rounds less often
                torch.testing.assert_close(one, want, rtol=0, atol=8 * 2.0**-7 * max(1.0, float(want.abs().max())))
            else:
                assert torch.equal(bits(one.view(-1)), bits(want.view(-1)))
    if counter is not None:
        assert counter.frame_count == 1
        return []
    for graph in graphs:
        for node in graph.nodes:
            assert not free_symbols([leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]), node
    return list(map(text_of, graphs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "backend"),
    [(2, "aot"), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((1, "aot"), (4, "aot"), (2, "inductor")))],
)
def test_a_compiled_layer_has_constant_sizes_and_no_read_and_serves_every_routing(ranks: int, backend: str) -> None:
    for graphs in run_ranks(compiled_here, ranks, backend, timeout=300):
        assert len(graphs) == (0 if backend == "inductor" else 2)  # forward and backward, compiled once
        for text in graphs:
            assert not re.search(r"plan_sizes|_local_scalar_dense|nonzero|masked_select|all_to_all|\bu\d", text)
        texts = "\n".join(graphs)
        for name, count in (("slots", 1), ("dispatch", 2), ("combine", 2), ("return", 1)):
            sent = re.findall(rf"moecomm::{name}_exchange\((.*)\)", texts)
            assert len(sent) == (count if texts and ranks > 1 else 0)
            assert all(re.search(rf"None, {3 * ranks}, GROUP", arguments) for arguments in sent)  # no splits, and P * C pairs


PLACEMENT = [[3, 0, 4], [1, 4, 2]]  # out of order, and expert 4 on both ranks


def placed_here() -> list[list[list[Tensor]]]:
    """For room for all, and for less: rows, y and gradients, and those of dynamic mode for the slots that fit alone."""
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(dist.get_rank())
    experts = torch.rand(9, 5, generator=generator).argsort(1)[:, :2]
    x, weights = (torch.randn(9, width, generator=generator, dtype=torch.float64).requires_grad_() for width in (D, 2))
    places, _ = places_by_loop(experts, PLACEMENT, rank)
    results = []
    for most in (9, 4, 1):
        ids = torch.where(fitting(places, 6, 2, most) < 0, -1, experts)
        pair = []
        for plan in (
            mf.plan(experts, weights, 5, placement=PLACEMENT, max_rows=most),
            mf.plan(ids, weights, 5, placement=PLACEMENT),
        ):
            rows = mf.dispatch(x, plan)
            y = mf.combine(rows.sin(), plan)
            gradients = torch.autograd.grad(y.cos().sum(), (x, weights))
            lost = (ids != experts).sum() if plan.dropped is None else plan.dropped
            pair.append([rows[: int(plan.offsets[-1])].detach(), y.detach(), *gradients, lost.int()])
        results.append(pair)
    return results


def test_a_placement_with_replicas_works_in_static_mode() -> None:
    lost = [0, 0, 0]
    for results in run_ranks(placed_here, 2):
        for i, (static, dynamic) in enumerate(results):
            assert all(torch.equal(one, other) for one, other in zip(static, dynamic, strict=True))
            lost[i] += int(static[-1])
    assert lost[0] == 0 < lost[1] < lost[2]


def dtensors_here() -> None:
    mesh = init_device_mesh("cpu", (2,))
    x, experts, weights, *_ = arguments(4, dist.get_rank())
    x, weights = x.detach(), weights.detach()
    plain = mf.plan(experts, weights, 8, max_rows=3)
    placed = [DTensor.from_local(part, mesh, [Shard(0)]) for part in (experts, weights, x)]
    plan = mf.plan(*placed[:2], 8, like=placed[2], max_rows=3)
    assert torch.equal(plan.dropped, plain.dropped)
    y = mf.combine(mf.dispatch(placed[2], plan), plan)
    assert isinstance(y, DTensor)
    assert y.placements == (Shard(0),)
    assert torch.equal(y.to_local(), mf.combine(mf.dispatch(x, plain), plain))


def test_dtensors_go_through_static_mode() -> None:
    run_ranks(dtensors_here, 2)


def without_rows_here() -> None:
    """C = 0: with T = 0, as ``max_rows=x.shape[0]`` of an empty batch gives it, and with tokens, which are then all dropped."""
    for tokens, check, align, wire in ((0, False, 1, None), (0, True, 16, "mxfp8"), (3, True, 1, None), (3, False, 16, "mxfp8")):
        x, weights = torch.ones(tokens, D, requires_grad=True), torch.ones(tokens, 2, requires_grad=True)
        experts = torch.tensor([[0, 1], [-1, 3], [2, 2]])[:tokens]
        plan = mf.plan(experts, weights, 4, max_rows=0, check=check, align=align)
        rows = mf.dispatch(x, plan, wire=wire, backward_wire=wire)
        y = mf.combine(rows, plan, wire=wire, backward_wire=wire)
        y.sum().backward()
        assert y.shape == x.shape
        assert not any(value.any() for value in (y, rows, plan.offsets, x.grad, weights.grad))
        assert int(plan.dropped) == (experts >= 0).sum()


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_row_for_any_token_is_a_layer_too(ranks: int) -> None:
    run_ranks(without_rows_here, ranks)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (2.0, TypeError, "max_rows was float; it must be an int or None"),
        (True, TypeError, "max_rows was bool; it must be an int or None"),
        (torch.tensor(2), TypeError, "max_rows was Tensor; it must be an int or None"),
        (-1, ValueError, "max_rows was -1; it must be 0 or more"),
    ],
)
def test_a_wrong_max_rows_is_named(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        mf.plan(torch.tensor([[0]]), torch.ones(1, 1), 1, max_rows=wrong)
    assert first_sentence(raised.value) == message
