"""Static mode in a CUDA graph, captured by hand and by mode="reduce-overhead". Skipped where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import grouped_mm, silu

import moecomm.functional as mf
from moecomm.ops.exchange import dispatch_combine as ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

T, D, H, E, K = 64, 64, 96, 8, 2


@pytest.fixture(autouse=True)
def _alone_on_nccl(tmp_path: Path) -> Iterator[None]:
    """A store in a file takes no port and no environment variable, so that these tests may run side by side."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


def arguments(seed: int) -> list[Tensor]:
    """x, experts, weights, and the experts' parameters."""
    generator = torch.Generator().manual_seed(seed)
    x, up, down = (torch.randn(shape, generator=generator).bfloat16() / 8 for shape in ((T, D), (E, D, H), (E, H, D)))
    experts = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    if seed % 3 == 2:
        experts.fill_(7)
    given = [x, experts, torch.rand(T, K, generator=generator), up, down]
    return [tensor.cuda().requires_grad_(tensor.is_floating_point()) for tensor in given]


def layer(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor | None]:
    plan = mf.plan(experts, weights, E, like=x, max_rows=T // 2)
    rows = mf.dispatch(x, plan)
    rows = grouped_mm(silu(grouped_mm(rows, up, offs=plan.offsets)), down, offs=plan.offsets)
    return mf.combine(rows, plan), plan.dropped


def step(function: Callable[..., Any], given: list[Tensor]) -> list[Tensor]:
    y, dropped = function(*given)
    return [y.detach().clone(), dropped.clone(), *torch.autograd.grad(y.float().square().sum(), [x for x in given if x.requires_grad])]


def test_the_host_waits_for_nothing() -> None:
    given = arguments(0)
    step(layer, given)  # compiles the kernels
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")  # inside the try: torch warns after it has set the mode
        step(layer, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_layer_serves_every_routing() -> None:
    given = arguments(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, given)
    for seed in range(6):
        with torch.no_grad():
            for tensor, other in zip(given, arguments(seed), strict=True):
                tensor.copy_(other)
        graph.replay()
        for got, want in zip(captured, step(layer, given), strict=True):
            assert torch.equal(got, want)


def test_reduce_overhead_captures_the_layer_and_skips_no_graph() -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for seed in range(6):
        given = arguments(seed)
        torch.compiler.cudagraph_mark_step_begin()
        for got, want in zip(step(compiled, given), step(layer, given), strict=True):
            torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2 * max(1.0, want.abs().max().item()))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1


def test_the_exchanges_are_captured_with_what_runs_around_them() -> None:
    """A group of one sends nothing by itself: here it sends to itself, as static mode does, without splits."""
    order = torch.arange(T, dtype=torch.int32, device="cuda")
    position = order.view(T, 1)
    group = dist.group.WORLD.group_name
    x = torch.zeros(T, D, device="cuda", requires_grad=True)

    def there_and_back() -> list[Tensor]:
        rows = ops.dispatch(x, order, position, order, position, None, group)
        y = ops.combine(rows.sin(), torch.full((T, 1), 2.0, device="cuda"), order, position, order, position, None, group)
        return [y.detach(), *torch.autograd.grad(y.sum(), x)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            there_and_back()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradient = there_and_back()
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(T, D, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.testing.assert_close(y, 2 * x.detach().sin())
        torch.testing.assert_close(gradient, 2 * x.detach().cos())
