"""A lean layer keeps what came from other ranks and its first matmul's result, and makes the rest again: by a policy, or by `keep_less`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from functorch.compile import min_cut_rematerialization_partition as torchs
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import grouped_mm, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint

import moecomm.functional as mf
from moecomm.compile.checkpoint import contexts, save_matmuls
from moecomm.compile.keep_less import keep_less
from moecomm.compile.overlap import MATMULS
from moecomm.compile.passes import options
from tests.compile.graphs import exchanges, keeping
from tests.spawn import run_ranks
from tests.traffic import Traffic

D, H, NUM_EXPERTS, K = 64, 1024, 4, 2  # wide, so that a plan's indices do not count; matmuls of bfloat16 are slow on many CPUs
TOKENS = (256, 96)
STATIC: dict[str, Any] = {"max_rows": max(TOKENS)}


def layer(x: Tensor, gate: Tensor, into: Tensor, out: Tensor, **mode: Any) -> Tensor:
    weights, experts = mf.route((x @ gate.T).float(), K)
    plan = mf.plan(experts, weights, NUM_EXPERTS, like=x, **mode)
    left, right = grouped_mm(mf.dispatch(x, plan), into.transpose(1, 2), offs=plan.offsets).float().chunk(2, -1)
    hidden = (silu(left) * right * mf.row_weights(plan).unsqueeze(1)).to(x.dtype)
    return mf.combine(grouped_mm(hidden, out.transpose(1, 2), offs=plan.offsets), plan, weighted=False)


def inside(x: Tensor, *rest: Tensor, **mode: Any) -> Tensor:
    """A layer whose result the backward needs: the sums that came home are not made again by an exchange."""
    return x + layer(x, *rest, **mode).sin()


def inputs() -> list[Tensor]:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    seed = torch.Generator().manual_seed(rank)
    gate = torch.randn(NUM_EXPERTS, D, generator=torch.Generator().manual_seed(9))
    local = NUM_EXPERTS // ranks
    x, into, out = (torch.randn(*shape, generator=seed) for shape in ((TOKENS[rank], D), (local, 2 * H, D), (local, D, H)))
    return [tensor.bfloat16().requires_grad_() for tensor in (x, gate, into / D**0.5, out / H**0.5)]


def lean_bytes(given: list[Tensor], **mode: Any) -> int:
    """R * D, but nothing on one rank, and N * 2 H, in bfloat16."""
    weights, experts = mf.route((given[0] @ given[1].T).float(), K)
    plan = mf.plan(experts, weights, NUM_EXPERTS, **mode)
    pairs = plan.row_position.shape[0] if plan.send_order is not None else 0
    return 2 * (pairs * D + plan.row_order.shape[0] * 2 * H)


class Ops(TorchDispatchMode):
    """What runs, and the memory of all results that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.memory: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.names.append(op._opname)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.memory[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self, *without: Tensor) -> int:
        own = {tensor.untyped_storage().data_ptr() for tensor in without}
        return sum(size for pointer, (storage, size) in self.memory.items() if not storage.expired() and pointer not in own)

    def matmuls(self) -> list[str]:
        return [name for name in self.names if name in MATMULS]


def step(run: Callable[..., Tensor], given: list[Tensor]) -> tuple[list[Tensor], int, Ops, Traffic]:
    """y and all gradients, the bytes kept between the two passes, and what the backward runs and sends."""
    with Ops() as forward:
        y = run(*given)
    kept = min(forward.alive(y, *given) for _ in range(20) if not time.sleep(0.01))  # gloo's thread holds what it had for some ms
    with Traffic() as traffic, Ops() as backward:
        grads = torch.autograd.grad(y, given, torch.arange(y.numel()).view_as(y).cos().to(y.dtype))
    return [y.detach(), *grads], kept, backward, traffic


def checkpointed(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: checkpoint(run, *args, use_reentrant=False, context_fn=partial(contexts, save_matmuls))


def eager_here() -> None:
    given = inputs()
    for mode in ({}, STATIC):
        for region in (layer, inside) if not mode else (layer,):
            run = partial(region, **mode)
            want, much, plain, expected = step(run, given)
            got, kept, backward, traffic = step(checkpointed(run), given)
            for one, other in zip(got, want, strict=True):
                assert torch.equal(one, other)
            assert backward.matmuls() == plain.matmuls()
            assert traffic.collectives == expected.collectives
            assert traffic.reads == expected.reads == []
            least = lean_bytes(given, **mode)
            assert kept < 0.5 * much
            assert region is inside or least <= kept < 1.03 * least, (kept, least, mode)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_eager_the_policy_keeps_the_received_tokens_and_the_first_matmul_and_repeats_neither(ranks: int) -> None:
    run_ranks(eager_here, ranks)


class Kept(NamedTuple):
    bytes: int
    wide: set[str]  # the ops whose results of at least D columns are kept
    backward: list[str]  # the exchanges and the matmuls of the backward


def compiled(run: Callable[..., Tensor], given: list[Tensor], want: list[Tensor], partition: Any) -> Kept:
    torch._dynamo.reset()
    graphs: list[torch.fx.Graph] = []
    function = torch.compile(run, fullgraph=True, backend=keeping(graphs, partition=partition))
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            saved[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(*given)
    got = [y.detach(), *torch.autograd.grad(y, given, torch.arange(y.numel()).view_as(y).cos().to(y.dtype))]
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    matmuls = sorted(name for node in graphs[1].nodes if (name := name_of(node)) in MATMULS)
    return Kept(sum(saved.values()), wide(graphs[0]), [*exchanges(graphs[1]), *matmuls])


def name_of(node: torch.fx.Node) -> str:
    return getattr(node.target, "_opname", "") if node.op == "call_function" else ""


def wide(forward: torch.fx.Graph) -> set[str]:
    """The ops whose results of at least D columns are kept, but for views of parameters."""
    values = {name_of(node): node.meta["val"] for node in forward.output_node().args[0][1:] if name_of(node)}  # type: ignore[index]
    views = {"t", "transpose", "permute"}
    return {name for name, value in values.items() if name not in views and value.dim() == 2 and value.shape[1] >= D}


def compiled_here(mode: dict[str, Any]) -> None:
    given = inputs()
    there = dist.get_world_size() > 1
    run, least = partial(layer, **mode), lean_bytes(given, **mode)
    want, *_ = step(run, given)
    ways = (run, torchs), (checkpointed(run), torchs), (run, keep_less)
    plain, *lean = (compiled(way, given, want, partition) for way, partition in ways)
    assert plain.bytes > 1.2 * least  # torch's own choice: the rows and the activation as well
    for found in lean:
        assert least <= found.bytes < 1.03 * least, (found.bytes, least)
        assert found.wide == {"_grouped_mm", *(["wait_tensor"] if there else [])}
        assert found.backward == plain.backward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "mode"),
    [(2, {}), *(pytest.param(ranks, mode, marks=pytest.mark.exhaustive) for ranks, mode in ((1, {}), (1, STATIC), (2, STATIC)))],
)
def test_compiled_the_policy_and_keep_less_keep_just_that_and_repeat_no_exchange_and_no_matmul(ranks: int, mode: dict[str, Any]) -> None:
    run_ranks(compiled_here, ranks, mode, timeout=300)


@pytest.mark.slow
def test_keep_less_makes_no_rows_again_that_no_backward_reads() -> None:
    x, gate, into, out = inputs()
    graphs: list[torch.fx.Graph] = []
    function = torch.compile(layer, fullgraph=True, backend=keeping(graphs, partition=keep_less))
    function(x, gate, into.detach(), out).sum().backward()  # the rows are for the gradient of ``into``
    assert sum(name_of(node) == "gather" for node in graphs[1].nodes) == 2  # the gradient's, and the weights of the rows
    assert wide(graphs[0]) == {"_grouped_mm"}


def test_a_second_backward_and_second_derivatives_are_those_of_the_plain_layer() -> None:
    given = [tensor[:16].detach().requires_grad_() if tensor.dim() == 2 else tensor for tensor in inputs()]
    answers = []
    for run in (inside, checkpointed(inside)):
        y = run(*given)
        first = torch.autograd.grad(y.sum(), given, retain_graph=True)
        again = torch.autograd.grad(y.sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in again), given)
        answers.append([*first, *again, *second])
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)


def test_a_policy_of_ones_own_sees_the_result_and_what_it_saves_is_not_computed_again() -> None:
    def wide(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if context.op_output.numel() > 4 else CheckpointPolicy.PREFER_RECOMPUTE

    def region(x: Tensor) -> Tensor:
        return x.expand(3, 4).exp().sin().sum(0).cos().sin()

    x = torch.ones(4, requires_grad=True)
    y = checkpoint(region, x, use_reentrant=False, context_fn=partial(contexts, wide))
    with Ops() as ops:
        y.sum().backward()
    assert ops.names.count("exp") == 0
    assert ops.names.count("cos") == 3  # the one of the region, and the gradients of two sines
    torch.testing.assert_close(x.grad, torch.autograd.grad(region(x).sum(), x)[0], rtol=0, atol=0)


def test_what_is_kept_may_not_be_changed_in_place() -> None:
    x = torch.ones(2, 2, requires_grad=True)

    def region(x: Tensor) -> Tensor:
        return (x @ x).relu_().sin()

    y = checkpoint(region, x, use_reentrant=False, context_fn=partial(contexts, save_matmuls))
    with pytest.raises(RuntimeError, match="result of aten.mm.default was changed in place"):
        y.sum().backward()


def test_contexts_are_for_checkpoint_alone_and_a_partition_is_a_function() -> None:
    with pytest.raises(RuntimeError, match="must be the context_fn"), contexts(save_matmuls)[0]:
        pass
    with pytest.raises(TypeError, match="partition was 'least'"):
        options(partition="least")  # type: ignore[arg-type]
    ours = options(partition=keep_less)["custom_partitioner_fn"]
    assert ours.uuid() == options(partition=keep_less)["custom_partitioner_fn"].uuid()
    assert ours.uuid() != options(partition=lambda *args, **keywords: keep_less(*args, **keywords))["custom_partitioner_fn"].uuid()
