"""Compiled blocks and training steps: one graph for any routing, equal to eager mode, and together with what else a training is made of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import linear, mse_loss, rms_norm, scaled_dot_product_attention

import moecomm.functional as mf
from tests.compile.graphs import exchanges, keeping
from tests.layers import experts_by_row
from tests.spawn import run_ranks

pytestmark = pytest.mark.slow  # all of it compiles
D, H, NUM_EXPERTS, K, LENGTH = 16, 24, 8, 2, 6


class Block(nn.Module):
    """Attention and a MoE layer. ``favour`` [E] is added to the logits; the tokens of a rank whose ``drop`` is set go nowhere."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        alike, local = torch.Generator().manual_seed(seed), NUM_EXPERTS // dist.get_world_size()
        own = torch.Generator().manual_seed(100 * seed + dist.get_rank())
        self.qkv, self.proj, self.gate = (nn.Parameter(torch.randn(n, D, generator=alike) / D**0.5) for n in (3 * D, D, NUM_EXPERTS))
        self.into = nn.Parameter(torch.randn(local, H, D, generator=own) / D**0.5)
        self.out = nn.Parameter(torch.randn(local, D, H, generator=own) / H**0.5)

    def forward(self, x: Tensor, favour: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
        qkv = linear(rms_norm(x, (D,)), self.qkv).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, length, D / 2]
        x = x + linear(scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2), self.proj)
        flat = rms_norm(x, (D,)).flatten(0, 1)  # [T, D]
        logits = linear(flat, self.gate).float() + favour  # [T, E]
        weights, experts = mf.route(logits, K)
        experts = torch.where(drop, -1, experts)
        plan = mf.plan(experts, weights, NUM_EXPERTS, like=flat)
        into, out = (w.to_local() if isinstance(w, DTensor) else w for w in (self.into, self.out))
        rows = experts_by_row(mf.dispatch(flat, plan), into, out, plan.offsets)
        return x + mf.combine(rows, plan).view_as(x), mf.load_balance_loss(logits.softmax(-1), experts, None)


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(seed) for seed in range(layers))

    def forward(self, x: Tensor, y: Tensor, favour: Tensor, drop: Tensor) -> Tensor:
        """The loss of a step."""
        total = []
        for block in self.blocks:
            x, balance = block(x, favour, drop)
            total.append(balance)
        return mse_loss(x.float(), y.float()) + 0.01 * torch.stack(total).sum()


def data(step: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's x, y, favour and drop: at every fifth step all tokens go to the last rank's experts, at every seventh half of the
    experts are empty, and from every third step on one of the ranks, or the only one, has no token that goes anywhere."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x, y = (torch.randn(batch, LENGTH, D, generator=generator).to(dtype) for _ in range(2))
    favour = torch.zeros(NUM_EXPERTS)
    if step % 5 == 0:
        favour[-K:] = 100.0
    elif step % 7 == 0:
        favour[::2] = 100.0
    return x, y, favour, torch.tensor(step % 3 == 2 and (step // 3) % dist.get_world_size() == dist.get_rank())


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    """Equal up to the rounding of ops that the compiler takes apart in another way."""
    for one, other in zip(got, want, strict=True):
        largest = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=16 * torch.finfo(dtype).eps * largest)


def fifty_steps_here(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    counters.clear()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = Model(1).to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(50):
        given = data(step, dtype)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = compiled(*given)
            loss.backward()
        if step % 10 == 0:
            close([loss.detach(), *(p.grad for p in model.parameters())], [*gradients_of(model, given)], dtype)
        optimizer.step()
        optimizer.zero_grad()
    assert (counter.frame_count, dict(counters["graph_break"])) == (1, {})
    for batch in (3, 5, 4, 2, 7):  # the second number of tokens may compile once more, and none after it
        with torch._dynamo.config.patch(error_on_recompile=counter.frame_count > 1):
            compiled(*data(batch, dtype, batch)).backward()
    assert (counter.frame_count, dict(counters["graph_break"])) == (2, {})


def gradients_of(model: nn.Module, given: Any) -> list[Tensor]:
    """The loss in eager mode, and its gradients."""
    loss = model(*given)
    return [loss.detach(), *gradients(loss, model)]


EVERYTHING = [(ranks, dtype) for ranks in (1, 2, 4) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.exhaustive  # tests/compile/test_layer.py compiles a layer for as many routings in every run
@pytest.mark.parametrize(("ranks", "dtype"), EVERYTHING)
def test_a_training_step_is_one_graph_each_way_and_fifty_routings_recompile_nothing(ranks: int, dtype: torch.dtype) -> None:
    run_ranks(fifty_steps_here, ranks, dtype, timeout=600)


def accumulated_here() -> None:
    """Gradients of two micro-batches added up, and functional_call with parameters that are not the module's, with one compilation."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = Model(1)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    batches = [data(step, torch.float32) for step in (1, 2)]
    for given in batches:
        compiled(*given).backward()
    want = [sum(parts) for parts in zip(*(gradients_of(model, given)[1:] for given in batches), strict=True)]
    close([p.grad for p in model.parameters()], want, torch.float32)
    assert counter.frame_count == 1

    other = {name: (p.detach() * 0.5).requires_grad_() for name, p in model.named_parameters()}

    def called(parameters: dict[str, Tensor], *given: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, given)

    functions = called, torch.compile(called, fullgraph=True, backend="aot_eager")
    eager, traced = ([*torch.autograd.grad(function(other, *batches[0]), list(other.values()))] for function in functions)
    close(traced, eager, torch.float32)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_micro_batches_add_up_and_functional_call_takes_other_parameters(ranks: int) -> None:
    run_ranks(accumulated_here, ranks, timeout=400)


def autocast_here() -> None:
    torch._dynamo.reset()
    model, given = Model(1), data(1, torch.float32)

    def called(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*given)

    answers = []
    for function in (called, torch.compile(called, fullgraph=True, backend="aot_eager")):
        loss = function(*given)
        answers.append([loss.detach(), *gradients(loss, model)])
    assert {each.dtype for each in answers[1]} == {torch.float32}
    close(answers[1], answers[0], torch.bfloat16)
    close(answers[1][:1], gradients_of(model, given)[:1], torch.bfloat16)


@pytest.mark.exhaustive
def test_autocast_is_traced_with_the_layer() -> None:
    run_ranks(autocast_here, 2, timeout=400)


def blocks_here() -> int:
    """How many times a block is compiled in a model of 8 equal blocks."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, (x, *rest) = Model(8), data(1, torch.float32)
    given = x.requires_grad_().clone(), *rest  # as an embedding would give it, and each block gives it to the next
    want = gradients_of(model, given)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=counter)  # type: ignore[method-assign]
    close(gradients_of(model, given), want, torch.float32)
    return counter.frame_count


def test_eight_equal_blocks_compiled_each_are_compiled_once() -> None:
    assert run_ranks(blocks_here, 2, timeout=400) == [1, 1]


@torch.compiler.nested_compile_region
def region(block: Block, x: Tensor, favour: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    return block(x, favour, drop)


class Regions(Model):
    """The same model, each block a region that the compiler traces once."""

    def forward(self, x: Tensor, y: Tensor, favour: Tensor, drop: Tensor) -> Tensor:
        total = []
        for block in self.blocks:
            x, balance = region(block, x, favour, drop)
            total.append(balance)
        return mse_loss(x.float(), y.float()) + 0.01 * torch.stack(total).sum()


def regions_here() -> int:
    torch._dynamo.reset()
    model, (x, *rest) = Regions(2), data(1, torch.float32)
    given = x.requires_grad_().clone(), *rest
    want = gradients_of(model, given)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    close(gradients_of(torch.compile(model, fullgraph=True, backend=counter), given), want, torch.float32)
    [graph] = counter.graphs
    return sum(1 for name, _ in graph.named_children() if name.startswith("subgraph"))


@pytest.mark.exhaustive
def test_equal_blocks_as_nested_regions_are_traced_once() -> None:
    assert run_ranks(regions_here, 2, timeout=400) == [1, 1]


def compiled_autograd_here() -> None:
    """The backward pass as the autograd engine would run it, traced whole and compiled: right for every routing."""
    torch._dynamo.reset()
    counters.clear()
    model = Model(1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(4):
        given = data(step, torch.float32)
        want = gradients_of(model, given)[1:]
        model.zero_grad()
        with torch._dynamo.compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
            compiled(*given).backward()
        close([p.grad for p in model.parameters()], want, torch.float32)
    assert counters["compiled_autograd"]["captures"] > 0
    assert dict(counters["graph_break"]) == {}


@pytest.mark.exhaustive
def test_compiled_autograd_traces_the_backward_pass_whole() -> None:
    run_ranks(compiled_autograd_here, 2, timeout=400)


def dtensor_here() -> list[list[str]]:
    """Experts as DTensors over the ranks, without FSDP2: what the two graphs send."""
    torch._dynamo.reset()
    graphs: list[torch.fx.Graph] = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    plain, given = Model(1), data(1, torch.float32)
    model = copy.deepcopy(plain)
    for name in ("into", "out"):
        whole = mf.slice_gather(getattr(plain.blocks[0], name).detach(), None, size=NUM_EXPERTS)
        setattr(model.blocks[0], name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)))
    loss = torch.compile(model, fullgraph=True, backend=keeping(graphs))(*given)
    got = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients(loss, model)]
    close([loss.detach(), *got], gradients_of(plain, given), torch.float32)
    return [sorted(exchanges(graph)) for graph in graphs]


@pytest.mark.exhaustive
def test_experts_as_dtensors_are_the_plain_ones_and_send_nothing_more() -> None:
    forward = ["combine_exchange", "dispatch_exchange", "gather_exchange", "messages_exchange", "plan_sizes", "slots_exchange"]
    backward = ["all_to_all_single", "combine_exchange", "dispatch_exchange", "return_exchange"]
    for graphs in run_ranks(dtensor_here, 2, timeout=400):
        assert graphs == [forward, backward]
