"""Activation checkpointing around layers: right without a policy, and with moecomm's policies no exchange and no host sync is repeated."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint

from moecomm.compile.checkpoint import contexts, save_matmuls, save_received
from tests import layers, one_process
from tests.compile.graphs import exchanges, keeping
from tests.one_process import Run, Sizes
from tests.parallel import test_fsdp
from tests.spawn import run_ranks
from tests.traffic import Traffic

D, H, NUM_EXPERTS, K = 16, 24, 8, 2
SELECTIVE: dict[str, Any] = {"context_fn": partial(contexts, save_received)}


def layer(x: Tensor, gate: Tensor, into: Tensor, out: Tensor) -> Tensor:
    y, balance = layers.moe(x, gate, into, out, K, None, None)
    return x + (y + balance).sin()


def two_layers(*args: Tensor) -> Tensor:
    return layer(layer(*args), *args[1:])


def plain(region: Any, *args: Tensor) -> Tensor:
    return region(*args)


def full(region: Any, *args: Tensor) -> Tensor:
    return checkpoint(region, *args, use_reentrant=False)


def selective(region: Any, *args: Tensor) -> Tensor:
    return checkpoint(region, *args, use_reentrant=False, **SELECTIVE)


def matmuls_kept(region: Any, *args: Tensor) -> Tensor:
    return checkpoint(region, *args, use_reentrant=False, context_fn=partial(contexts, save_matmuls))


def inputs(dtype: torch.dtype, tokens: int) -> list[Tensor]:
    """This rank's x, its gate, which all ranks have alike, and its experts."""
    alike, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(dist.get_rank())
    local = NUM_EXPERTS // dist.get_world_size()
    gate = torch.randn(NUM_EXPERTS, D, generator=alike)
    x, into, out = (torch.randn(*shape, generator=own) for shape in ((tokens, D), (local, H, D), (local, D, H)))
    return [tensor.to(dtype).requires_grad_() for tensor in (x, gate, into / D**0.5, out / H**0.5)]


def results(function: Any, region: Any, given: list[Tensor]) -> tuple[list[Tensor], Traffic, Traffic]:
    """y and all gradients, and what forward and backward sent and read."""
    with Traffic() as forward:
        y = function(region, *given)
    with Traffic() as backward:
        grads = torch.autograd.grad(y, given, torch.arange(y.numel()).view_as(y).cos().to(y.dtype))
    return [y.detach(), *grads], forward, backward


def eager_here(dtype: torch.dtype) -> None:
    there = dist.get_world_size() > 1
    for region, number in ((layer, 1), (two_layers, 2)):
        # In the second case rank 0 has no tokens; in the third the slots are too many to travel with the counts.
        for tokens, messages in ((5 + dist.get_rank(), 3), (4 * dist.get_rank(), 3), (3000, 4)):
            given = inputs(dtype, tokens)
            want, _, expected = results(plain, region, given)
            for function, again in ((full, True), (selective, False), (matmuls_kept, False)):
                got, forward, backward = results(function, region, given)
                for one, other in zip(got, want, strict=True):
                    assert torch.equal(one, other), function.__name__
                    # The layer's exchanges and the gather of the balance loss; three and one backward. The sum that comes home is
                    # made again too, but what stands last in a region is not.
                assert len(forward.collectives) == (messages + 1) * number * there
                assert forward.reads == ["plan_sizes"] * number
                assert len(backward.collectives) == (4 + (messages + 1) * again) * number * there
                assert backward.reads == ["plan_sizes"] * number * again
                assert again or backward.collectives == expected.collectives


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (4, torch.bfloat16)])
def test_checkpointed_layers_are_the_plain_ones_and_the_policy_repeats_no_exchange_and_no_host_sync(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(eager_here, ranks, dtype, timeout=200)


def compiled_here(dtype: torch.dtype) -> list[list[list[str]]]:
    """What each graph sends and reads: forward and backward; plain, checkpointed, and with the policy."""
    told = []
    for function in (plain, full, selective):
        torch._dynamo.reset()
        graphs: list[torch.fx.Graph] = []
        compiled = torch.compile(partial(function, layer), fullgraph=True, backend=keeping(graphs))
        for tokens in (5 + dist.get_rank(), 6 * dist.get_rank()):
            given = inputs(dtype, tokens)
            torch._dynamo.decorators.mark_unbacked(given[0], 0)
            answers = []
            for here in (partial(function, layer), compiled):
                y = here(*given)
                answers.append([y.detach(), *torch.autograd.grad(y, given, torch.arange(y.numel()).view_as(y).cos().to(y.dtype))])
            for one, other in zip(*answers, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert len(graphs) == 2
        told.append([exchanges(graph) for graph in graphs])
        saved = [node.meta["val"].shape for node in graphs[0].output_node().all_input_nodes if isinstance(node.meta.get("val"), Tensor)]
        kept = [shape for shape in saved if {H, int} <= {size if isinstance(size, int) else int for size in shape}]  # N is no int
        assert bool(kept) == (function is plain), "the experts' activations are what checkpointing does not keep"
    return told


FORWARD = ["messages_exchange", "plan_sizes", "slots_exchange", "dispatch_exchange", "combine_exchange", "gather_exchange"]
BACKWARD = ["all_to_all_single", "dispatch_exchange", "combine_exchange", "return_exchange"]


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/compile/test_kept.py compiles a layer with a policy in every run
@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (1, torch.bfloat16), (4, torch.bfloat16)])
def test_compiled_the_policy_repeats_no_exchange_and_no_host_sync_either(ranks: int, dtype: torch.dtype) -> None:
    for told in run_ranks(compiled_here, ranks, dtype, timeout=500):
        plain_graphs, full_graphs, selective_graphs = ([sorted(graph) for graph in graphs] for graphs in told)
        forward, backward = (FORWARD, BACKWARD) if ranks > 1 else (["plan_sizes"], [])
        assert plain_graphs == selective_graphs == [sorted(forward), sorted(backward)]
        assert full_graphs == [sorted(forward), sorted(backward + forward)]


def train_here(compiled: bool) -> Run:
    """Under FSDP2, every block checkpointed with the policy inside what FSDP2 wraps, so that its gathers are no part of the region."""
    torch._dynamo.reset()
    sizes, ranks = Sizes(), dist.get_world_size()
    model = test_fsdp.build(sizes, ranks, 2, True, MixedPrecisionPolicy(), OffloadPolicy(), torch.float64)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **SELECTIVE)
        if compiled:
            block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager_decomp_partition")
    return test_fsdp.train(sizes, model, ranks, torch.float64)


@test_fsdp.lacking
@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_checkpointed_blocks_under_fsdp_train_as_one_process(compiled: bool) -> None:
    expected = one_process.train(Sizes(), test_fsdp.STEPS, test_fsdp.CLIP)
    for run in run_ranks(train_here, 4, compiled, timeout=400):
        torch.testing.assert_close(run.losses, expected.losses, rtol=1e-10, atol=1e-12)  # float64: only the order of sums differs
        torch.testing.assert_close(run.parameters, expected.parameters, rtol=1e-8, atol=1e-10)


def told(op: Any, policy: Any = save_received) -> CheckpointPolicy:
    return policy(SelectiveCheckpointContext(is_recompute=False), op)


def test_the_policies_keep_what_came_and_only_that_or_matmuls_too() -> None:
    names = torch.ops.moecomm, torch.ops._c10d_functional
    kept = [getattr(names[0], name).default for name in ("dispatch_exchange", "combine_exchange", "slots_exchange", "plan_sizes")]
    kept += [getattr(names[1], name).default for name in ("all_to_all_single", "all_reduce", "wait_tensor")]
    assert {told(op) for op in kept} == {CheckpointPolicy.MUST_SAVE}
    made = [names[0].gather.default, names[0].weighted_sum.default, torch.ops.aten.mm.default, names[1].all_reduce_.default]
    assert {told(op) for op in made} == {CheckpointPolicy.PREFER_RECOMPUTE}
    matmuls = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, torch.ops.aten._grouped_mm.default]
    assert {told(op, save_matmuls) for op in kept + matmuls} == {CheckpointPolicy.MUST_SAVE}
    assert {told(op, save_matmuls) for op in made if op not in matmuls} == {CheckpointPolicy.PREFER_RECOMPUTE}
