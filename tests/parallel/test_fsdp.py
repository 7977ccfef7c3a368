"""Blocks of dense layers and experts under FSDP2, each wrapped once and each one graph: the same training as on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import mse_loss

import moecomm.functional as mf
from tests import layers, one_process
from tests.one_process import BALANCE, RATE, Run, Sizes
from tests.spawn import run_ranks

fsdp = pytest.importorskip("torch.distributed.fsdp._fully_shard._fsdp_common")
lacking = pytest.mark.skipif(not hasattr(fsdp, "ShardPlacementResult"), reason="this torch has one mesh for all parameters of a block")
pytestmark = [lacking, pytest.mark.slow]  # whole trainings
STEPS = 3
CLIP = 0.3  # below the norms of all steps


class Block(nn.Module):
    """A layer of `one_process.py`; the experts' weights are DTensors, Shard(0) over ep."""

    def __init__(self, initial: dict[str, Tensor], ep: DeviceMesh, k: int) -> None:
        super().__init__()
        self.into, self.out, self.gate = (nn.Parameter(initial[name].clone()) for name in ("dense.into", "dense.out", "gate"))
        self.experts = nn.ParameterDict(
            {name: distribute_tensor(initial[f"experts.{name}"], ep, [Shard(0)], src_data_rank=None) for name in ("into", "out")}
        )
        self.ep, self.k = ep.get_group().group_name, k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + one_process.dense(x, self.into, self.out)
        into, out = (self.experts[name].to_local() for name in ("into", "out"))
        y, balance = layers.moe(x.flatten(0, 1), self.gate, into, out, self.k, self.ep, None)
        return x + y.view_as(x), balance


class Model(nn.Module):
    def __init__(self, initial: dict[str, Tensor], ep: DeviceMesh, sizes: Sizes) -> None:
        super().__init__()
        own = [{n.removeprefix(f"{i}."): p for n, p in initial.items() if n.startswith(f"{i}.")} for i in range(sizes.layers)]
        self.blocks = nn.ModuleList(Block(of_block, ep, sizes.top_k) for of_block in own)
        self.head = nn.Parameter(initial["head"].clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        balances = []
        for block in self.blocks:
            x, balance = block(x)
            balances.append(balance)
        return x @ self.head.T, torch.stack(balances).sum()


def build(
    sizes: Sizes, ranks: int, ep: int, reshard: bool, policy: MixedPrecisionPolicy, offload: OffloadPolicy, dtype: torch.dtype
) -> Model:  # fmt: skip
    """Experts over ep and, under FSDP2, edp; all else over all ranks."""
    expert = init_device_mesh("cpu", (ranks // ep, ep), mesh_dim_names=("edp", "ep"))
    edp = expert["edp"]
    everything = edp if ep == 1 else expert._flatten("dp")
    over_edp = Shard(1) if edp is everything else fsdp.ShardPlacementResult(Shard(1), fsdp.FSDPMeshInfo(edp, shard_mesh_dim=0))
    model = Model({name: p.to(dtype) for name, p in one_process.initial(sizes).items()}, expert["ep"], sizes)
    options: dict[str, Any] = {"mesh": everything, "mp_policy": policy, "offload_policy": offload, "reshard_after_forward": reshard}
    for block in model.blocks:
        experts = set(block.experts.parameters())
        fully_shard(block, **options, shard_placement_fn=lambda p, experts=experts: over_edp if p in experts else None)
    fully_shard(model, **options)
    for module in (model, *model.blocks):
        module.set_gradient_divide_factor(1)  # sums: the loss is divided by the ranks
        module.set_force_sum_reduction_for_comms(True)
    return model


def full(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole, and under the names of `one_process.py`."""
    names = {name: name.removeprefix("blocks.") for name in parameters}
    names = {name: short.replace(".into", ".dense.into").replace(".out", ".dense.out") for name, short in names.items()}
    return {short.replace("experts.dense", "experts"): parameters[name].full_tensor() for name, short in names.items()}


def train(sizes: Sizes, model: Model, ranks: int, dtype: torch.dtype) -> Run:
    """`one_process.train` on this rank's share of the batch."""
    rank = torch.distributed.get_rank()
    named = dict(model.named_parameters())
    experts = [p for name, p in named.items() if "experts" in name]
    dense = [p for name, p in named.items() if "experts" not in name]
    optimizer = torch.optim.AdamW([{"params": dense}, {"params": experts}], lr=RATE)  # of one mesh each
    losses, norms = [], []
    for step in range(STEPS):
        x, y = (whole.chunk(ranks)[rank].to(dtype) for whole in one_process.batch(sizes, step))
        output, balance = model(x)
        loss = mse_loss(output.to(dtype), y) + BALANCE * balance
        (loss / ranks).backward()
        norms.append(mf.clip_grad_norm_(model, CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mf.slice_gather(loss.detach()[None], None).mean().item())
    return Run(losses, norms, {name: p.detach() for name, p in full(named).items()})


def train_exactly(sizes: Sizes, ranks: int, cases: list[tuple[int, bool]]) -> list[Run]:
    exact = MixedPrecisionPolicy(), OffloadPolicy(), torch.float64
    return [train(sizes, build(sizes, ranks, ep, reshard, *exact), ranks, torch.float64) for ep, reshard in cases]


def test_training_under_fsdp_is_that_of_one_process() -> None:
    sizes = Sizes()
    expected = one_process.train(sizes, STEPS, CLIP)
    for runs in run_ranks(train_exactly, 4, sizes, 4, [(2, True), (2, False), (4, True), (1, False)]):
        for run in runs:
            # float64 on both sides: only the order of sums differs.
            torch.testing.assert_close(run.losses, expected.losses, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(run.norms, expected.norms, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(run.parameters, expected.parameters, rtol=1e-8, atol=1e-10)


def train_compiled(sizes: Sizes, ranks: int, ep: int, reshard: bool) -> tuple[Run, list[list[str]]]:
    """The run, and what each graph sends."""
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        names = [name.split(".")[1] for name in called if name.startswith(("c10d", "_c10d", "fsdp")) or "exchange" in name]
        graphs.append(sorted(name for name in names if name != "wait_tensor"))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)  # what to save is chosen as by Inductor
    model = build(sizes, ranks, ep, reshard, MixedPrecisionPolicy(), OffloadPolicy(), torch.float64)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    return train(sizes, model, ranks, torch.float64), graphs


# The plan's counts and slots, the tokens and their sums, and the balance loss; backward the mirrors of the last four.
FORWARD = ["combine_exchange", "dispatch_exchange", "gather_exchange", "messages_exchange", "slots_exchange"]
BACKWARD = ["all_to_all_single", "combine_exchange", "dispatch_exchange", "return_exchange"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ep", "reshard", "layers"),
    [
        (2, True, 1),
        *(pytest.param(*case, 2, marks=pytest.mark.exhaustive) for case in ((2, True), (2, False), (4, False), (1, True))),
    ],
)
def test_each_block_is_one_graph_that_sends_nothing_but_its_exchanges(ep: int, reshard: bool, layers: int) -> None:
    sizes = Sizes(layers=layers)
    expected = one_process.train(sizes, STEPS, CLIP)
    for run, graphs in run_ranks(train_compiled, 4, sizes, 4, ep, reshard):
        torch.testing.assert_close(run.losses, expected.losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(run.norms, expected.norms, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(run.parameters, expected.parameters, rtol=1e-8, atol=1e-10)
        forward, backward = (FORWARD, BACKWARD) if ep > 1 else (["gather_exchange"], ["all_to_all_single"])
        assert sorted(graphs) == sorted([forward, backward] * sizes.layers)


def train_in_bfloat16(sizes: Sizes, ranks: int, ep: int, cases: list[tuple[bool, bool]]) -> list[Run]:
    """For each case, whether parameters are resharded after the forward pass, and whether each block is compiled."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    runs = []
    for reshard, compiled in cases:
        torch._dynamo.reset()
        model = build(sizes, ranks, ep, reshard, policy, OffloadPolicy(), torch.float32)
        if compiled:
            for block in model.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
        runs.append(train(sizes, model, ranks, torch.float32))
    return runs


WIDE = Sizes(dim=16, hidden=16)  # rows of 32 bytes: grouped_mm takes multiples of 16


def test_mixed_precision_stays_near_one_process() -> None:
    expected = one_process.train(WIDE, STEPS, CLIP)
    for runs in run_ranks(train_in_bfloat16, 4, WIDE, 4, 2, [(True, False), (False, False)], timeout=200):
        for run in runs:
            # bfloat16 has 8 bits, and a token whose second and third expert are close may get the other one.
            torch.testing.assert_close(run.losses, expected.losses, rtol=2e-2, atol=0.0)
            torch.testing.assert_close(run.norms, expected.norms, rtol=5e-2, atol=0.0)
            assert all(p.dtype == torch.float32 for p in run.parameters.values())


@pytest.mark.exhaustive  # the demo's test compiles a model of mixed precision in every run
@pytest.mark.parametrize("reshard", [True, False])
def test_compiled_mixed_precision_is_the_eager_one(reshard: bool) -> None:
    cases = [(True, False), (reshard, True)]
    for eager, *compiled in run_ranks(train_in_bfloat16, 4, WIDE._replace(layers=1), 4, 2, cases, timeout=400):
        for run in compiled:
            # The same kernels in the same order, forward and backward: not one bit may differ.
            torch.testing.assert_close(run, eager, rtol=0.0, atol=0.0)


def train_offloaded(sizes: Sizes, ranks: int, ep: int) -> Run:
    offload = CPUOffloadPolicy(pin_memory=False)
    return train(sizes, build(sizes, ranks, ep, True, MixedPrecisionPolicy(), offload, torch.float64), ranks, torch.float64)


def test_offloaded_parameters_train_alike() -> None:
    sizes = Sizes()
    expected = one_process.train(sizes, STEPS, CLIP)
    for run in run_ranks(train_offloaded, 4, sizes, 4, 2):
        torch.testing.assert_close(run.losses, expected.losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(run.parameters, expected.parameters, rtol=1e-8, atol=1e-10)


def pinned_here() -> None:
    with pytest.raises(RuntimeError, match="Cannot access accelerator device when none is available"):
        build(Sizes(), 2, 2, True, MixedPrecisionPolicy(), CPUOffloadPolicy(), torch.float64)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator, torch pins the parameters' memory")
def test_pinned_memory_without_an_accelerator_is_an_error_of_torch_when_the_model_is_wrapped() -> None:
    """`CPUOffloadPolicy()` has pin_memory=True; without an accelerator it must be False, and torch says that it looks for one."""
    run_ranks(pinned_here, 2)
