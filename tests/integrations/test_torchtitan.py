"""torchtitan's models with moecomm's token dispatcher: the logits and gradients that they have with torchtitan's own all-to-all."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, silu

from tests import reference
from tests.spawn import run_ranks
from tests.traffic import Traffic

with patch("torch._utils._get_available_device_type", lambda: "cpu"):  # where there is no GPU torchtitan would take "cuda" all the same
    pytest.importorskip("torchtitan.tools.utils", reason="torchtitan is not installed: make test-torchtitan")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

DISPATCHER, CHECKPOINTING = "moecomm.integrations.torchtitan.token_dispatcher", "moecomm.integrations.torchtitan.selective_ac"
Outcome = dict[str, Tensor]


# The dispatcher alone


class Sizes(NamedTuple):
    dim: int = 8
    hidden: int = 16
    experts: int = 8
    k: int = 3


def by_expert(rows: Tensor, counts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """rows [N, D] through their experts; rows behind those that are counted stay as they are."""
    *of_each, rest = rows.split([*counts.tolist(), rows.shape[0] - int(counts.sum())])
    return torch.cat([*(silu(part @ up[e]) @ down[e] for e, part in enumerate(of_each)), rest])


def dispatched(tokens: list[int], options: dict[str, Any], alone: bool) -> tuple[Outcome, Outcome, Outcome]:
    """Results and gradients of a layer with moecomm's dispatcher, with torchtitan's, and of the dense one; ``tokens`` of each rank."""
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    from moecomm.integrations.torchtitan import TokenDispatcher

    set_spmd_backend("partial_dtensor")
    rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    mesh = None if alone else dist.init_device_mesh("cpu", (ranks,))
    dim, hidden, experts, k = Sizes()
    seed = torch.Generator().manual_seed(0)
    up, down = torch.randn(experts, dim, hidden, generator=seed), torch.randn(experts, hidden, dim, generator=seed)
    seed = torch.Generator().manual_seed(dist.get_rank())
    x, weights, grad = (torch.randn(tokens[rank], width, generator=seed) for width in (dim, k, dim))
    ids = torch.rand(tokens[rank], experts, generator=seed).argsort(1)[:, :k].contiguous()
    outcomes = []
    for config, given in ((TokenDispatcher.Config, options), (AllToAllTokenDispatcher.Config, {})):
        dispatcher = config(num_experts=experts, top_k=k, **given).build()
        dispatcher.wire_meshes(ep_mesh=mesh)
        here = torch.arange(experts).view(ranks, -1)[rank].tolist()
        if "placement" in given:
            here = given["placement"][rank]
        leaves = [t.clone().requires_grad_() for t in (x, weights, up[here], down[here])]
        rows, counts, metadata = dispatcher.dispatch(leaves[0], leaves[1], ids, torch.bincount(ids.flatten(), minlength=experts))
        y = dispatcher.combine(by_expert(rows, counts, *leaves[2:]), metadata, leaves[0])
        gradients = dict(zip(("x", "weights", "up", "down"), torch.autograd.grad(y, leaves, grad), strict=True))
        for name, whole in (("up", up), ("down", down)):  # of all experts
            gradients[name] = torch.zeros_like(whole).index_copy(0, torch.tensor(here), gradients[name])
        outcomes.append({"y": y.detach()} | gradients)
    dense = reference.layer_and_gradients(x, ids, weights, up, down, grad)
    for outcome in (*outcomes, dense) if not alone else ():
        dist.all_reduce(outcome["up"])
        dist.all_reduce(outcome["down"])
    return *outcomes, dense


def assert_alike(got: Outcome, want: Outcome, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        torch.testing.assert_close(
            got[name], tensor.to(got[name].dtype), rtol=0, atol=tolerance * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


EXACT, WIRE = 1e-5, 0.1
OPTIONS: list[tuple[dict[str, Any], float]] = [
    ({}, EXACT),
    ({"max_rows": 12}, EXACT),
    ({"align": 4}, EXACT),
    ({"max_rows": 12, "align": 4, "check": True}, EXACT),
    ({"placement": [[6, 1, 4, 3], [2, 0, 7, 5]]}, EXACT),
    ({"wire": "float8_e4m3", "backward_wire": "mxfp8"}, WIRE),
]


@pytest.mark.parametrize("tokens", [[9, 12], [0, 5], [0, 0]], ids=str)
@pytest.mark.parametrize(("options", "tolerance"), OPTIONS, ids=str)
def test_a_layer_is_the_dense_one_and_torchtitans(options: dict[str, Any], tolerance: float, tokens: list[int]) -> None:
    for got, own, dense in run_ranks(dispatched, 2, tokens, options, False, timeout=120):
        assert_alike(got, dense, tolerance)
        assert_alike(own, dense, EXACT)


def test_a_wire_rounds_rows_and_gradients() -> None:
    wires = {"wire": "float8_e4m3", "backward_wire": "float8_e4m3"}
    for rounded, exact, _ in run_ranks(dispatched, 2, [9, 12], wires, False, timeout=120):
        far = {name: (rounded[name] - exact[name]).abs().max().item() / exact[name].abs().max().item() for name in exact}
        assert all(1e-3 < error < WIRE for error in far.values()), far


@pytest.mark.parametrize("options", [{}, {"max_rows": 12, "align": 4}], ids=str)
def test_without_expert_parallelism_each_rank_is_alone(options: dict[str, Any]) -> None:
    for got, own, dense in run_ranks(dispatched, 2, [9], options, True, timeout=120):
        assert_alike(got, dense, EXACT)
        assert_alike(own, dense, EXACT)


def test_a_placement_with_replicas_is_refused_when_the_mesh_is_known() -> None:
    from moecomm.integrations.torchtitan import TokenDispatcher

    dispatcher = TokenDispatcher.Config(num_experts=4, top_k=2, placement=[[0, 1, 2], [3, 0, 1]]).build()
    with pytest.raises(
        ValueError, match="placement was of 6 experts; it must be of 4, each once: torchtitan has parameters for no replicas"
    ):
        dispatcher.wire_meshes(ep_mesh=None)


# Its switches


def test_the_command_line_gives_every_layer_the_dispatcher_with_its_options() -> None:
    from torchtitan.config import ConfigManager, apply_overrides
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    from moecomm.integrations.torchtitan import SelectiveCheckpointing, TokenDispatcher

    line = "--module qwen3 --config qwen3_moe_debug --parallelism.expert_parallel_degree 8 --training.disable_cuda_graphs"
    config = ConfigManager().parse_args(
        [*line.split(), "--override.imports", DISPATCHER + '={"wire": "mxfp8", "max_rows": 64}', CHECKPOINTING]
    )
    apply_overrides(config.override, config)
    dispatchers = [each for _, each, _, _ in config.traverse(LocalTokenDispatcher.Config)]
    assert dispatchers == [TokenDispatcher.Config(num_experts=64, top_k=8, wire="mxfp8", max_rows=64)] * 8
    assert isinstance(config.activation_checkpoint, SelectiveCheckpointing.Config)


def test_the_padding_of_a_low_precision_dispatcher_becomes_align_and_unknown_options_are_refused() -> None:
    from torchtitan.models.common.token_dispatcher import TorchAOTokenDispatcher

    from moecomm.integrations.torchtitan import token_dispatcher

    padded = TorchAOTokenDispatcher.Config(num_experts=8, top_k=2, pad_multiple=32)
    assert token_dispatcher(padded).align == 32
    assert token_dispatcher(padded, align=64).align == 64
    with pytest.raises(ValueError, match="wires"):
        token_dispatcher(padded, wires="mxfp8")


# torchtitan's debug models

VOCABULARY, BATCH, LENGTH, LAYERS, HIDDEN = 2048, 2, 16, 2, 64
MODELS = {"qwen3": "qwen3_moe_debug", "deepseek_v3": "deepseek_v3_debugmodel", "gpt_oss": "gpt_oss_debugmodel"}
Degrees = dict[str, int]
Overrides = list[tuple[str, dict[str, Any]]]
EP, TP = "expert_parallel_degree", "tensor_parallel_degree"


class Case(NamedTuple):
    degrees: Degrees
    model: str = "qwen3"
    backend: str = "partial_dtensor"  # how torchtitan splits
    checkpoint: str = ""
    compiler: str = ""  # the backend of torch.compile
    fsdp: bool = True


class Training:
    """A few layers of a debug model on this rank, configured, built and split as torchtitan's trainer does it."""

    def __init__(self, case: Case, overrides: Overrides) -> None:
        from torchtitan.config import apply_overrides
        from torchtitan.distributed import ParallelDims, activation_checkpoint, utils
        from torchtitan.models.common.attention import ScaledDotProductAttention

        torch._dynamo.reset()
        config = getattr(import_module(f"torchtitan.models.{case.model}.config_registry"), MODELS[case.model])()
        config.training.seq_len, config.training.mixed_precision_param, config.training.disable_cuda_graphs = LENGTH, "float32", True
        config.compile.enable, config.compile.backend = bool(case.compiler), case.compiler
        config.activation_checkpoint = getattr(activation_checkpoint, case.checkpoint).Config() if case.checkpoint else None
        config.parallelism.spmd_backend = case.backend
        for degree, ranks in case.degrees.items():
            setattr(config.parallelism, degree, ranks)
        config.override.imports = overrides
        model = config.model_spec.model
        model.layers = [layer for layer in model.layers if layer.moe is not None][:LAYERS]
        for layer in model.layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()  # the others have no backward on CPUs
            layer.moe.routed_experts.inner_experts.hidden_dim = HIDDEN
        self.dims = dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
        dims.build_mesh()
        utils.set_spmd_backend(case.backend)
        self.context = utils.get_spmd_context(parallel_dims=dims)
        model.update_from_config(config=config)
        apply_overrides(config.override, config)
        with torch.device("meta"):
            self.model = model.build()
        unsharded = {} if case.fsdp else {"skip_dp": True}
        config.model_spec.parallelize_fn(
            self.model, parallel_dims=dims, training=config.training, parallelism=config.parallelism, compile_config=config.compile,
            ac_config=config.activation_checkpoint, dump_folder="", **unsharded,
        )  # fmt: skip
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # all that gloo has
        self.model.to_empty(device="cpu")
        torch.manual_seed(0)
        with torch.no_grad():
            self.model.init_weights(buffer_device=None)
        self.model.train()

    def step(self) -> tuple[Tensor, Outcome]:
        """The logits and the gradients, whole, of this rank's batch."""
        rank = self.dims.get_mesh("batch").get_local_rank() if self.dims.dp_enabled else 0
        seed = torch.Generator().manual_seed(rank)
        tokens, targets = (torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=seed) for _ in range(2))
        with torch.autograd.set_multithreading_enabled(False), self.context():
            logits = whole(self.model(tokens))
            cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()
        named = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in self.model.named_parameters()}
        return logits.detach(), {name: whole(p.grad) for name, p in named.items() if p.grad is not None}


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def compare_steps(case: Case, options: dict[str, Any]) -> None:
    """A step with moecomm's dispatcher, beside one with torchtitan's."""
    steps = []
    for overrides in ([(DISPATCHER, options)], []):
        training = Training(case, overrides)
        with nullcontext() if case.compiler else patch.object(Tensor, "bfloat16", Tensor.float):  # which the experts call
            logits, gradients = training.step()
        steps.append({"logits": logits} | gradients)
    assert_alike(*steps, ROUNDED if case.compiler else EXACT)


ROUNDED = 1e-2  # compiled, torchtitan's experts compute in bfloat16: what differs in its last bit may round to the next number
STATIC = {"max_rows": BATCH * LENGTH, "align": 8}
EXHAUSTIVE = pytest.mark.exhaustive
CASES = [
    (2, Case({EP: 2}), {}),
    (2, Case({EP: 2}), STATIC),
    (2, Case({EP: 2}, compiler="aot_eager"), {}),
    pytest.param(2, Case({EP: 2}, compiler="aot_eager"), STATIC, marks=EXHAUSTIVE),
    pytest.param(2, Case({EP: 2}, compiler="inductor"), {}, marks=EXHAUSTIVE),
    pytest.param(2, Case({EP: 2, TP: 2}), {}, marks=EXHAUSTIVE),
    pytest.param(2, Case({EP: 1, TP: 2}), {}, marks=EXHAUSTIVE),
    pytest.param(2, Case({EP: 2}, checkpoint="FullAC"), {}, marks=EXHAUSTIVE),
    (4, Case({EP: 2}), {}),
    pytest.param(4, Case({EP: 4, TP: 2}), STATIC, marks=EXHAUSTIVE),
    pytest.param(2, Case({EP: 2}, model="deepseek_v3"), {}, marks=EXHAUSTIVE),
    pytest.param(2, Case({EP: 2}, model="gpt_oss"), {}, marks=EXHAUSTIVE),
    pytest.param(2, Case({EP: 2}, model="gpt_oss"), STATIC, marks=EXHAUSTIVE),
]


@pytest.mark.parametrize(("ranks", "case", "options"), CASES, ids=str)
def test_a_model_trains_as_with_torchtitans_dispatcher(ranks: int, case: Case, options: dict[str, Any]) -> None:
    run_ranks(compare_steps, ranks, case, options, timeout=400)


def check_checkpointing() -> None:
    """The gradients, and the all-to-alls of a step: without, with torchtitan's checkpointing and with moecomm's."""
    exchanges, gradients = [], []
    for checkpoint, overrides in (("", []), ("SelectiveAC", []), ("SelectiveAC", [(CHECKPOINTING, {})])):
        training = Training(Case({EP: 2}, checkpoint=checkpoint), [(DISPATCHER, {}), *overrides])
        with Traffic() as traffic:
            gradients.append(training.step()[1])
        exchanges.append(sum("all_to_all" in name for name in traffic.collectives))
    once, again, saved = exchanges
    assert once == saved < again, exchanges
    for outcome in gradients[1:]:
        assert_alike(outcome, gradients[0], EXACT)


DEFAULT = Case({EP: 2}, backend="spmd_types", fsdp=False)
OTHER = Case({EP: 2}, fsdp=False)


def compare_backends(case: Case) -> None:
    """moecomm's dispatcher under the SPMD backend whose own exchange gloo lacks, beside torchtitan's under another, without FSDP."""
    steps, models = [], []
    for each, overrides in ((case, [(DISPATCHER, {}), (CHECKPOINTING, {})]), (OTHER, [])):
        training = Training(each, overrides)
        models.append(training.model)
        for mine, first in zip(training.model.parameters(), models[0].parameters(), strict=True):
            local(mine).data.copy_(local(first))  # each draws its own
        with nullcontext() if case.compiler else patch.object(Tensor, "bfloat16", Tensor.float):
            logits, gradients = training.step()
        of_this_rank = [local(p.grad) for p in training.model.parameters()]
        steps.append({"logits": logits} | dict(zip(gradients, of_this_rank, strict=True)))
    assert_alike(*steps, ROUNDED if case.compiler else EXACT)


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


COMPILED = DEFAULT._replace(checkpoint="SelectiveAC", compiler="aot_eager")  # torchtitan's own fails so in torch 2.13 under another backend


@pytest.mark.parametrize("case", [DEFAULT, pytest.param(COMPILED, marks=EXHAUSTIVE)], ids=str)
def test_a_model_trains_under_torchtitans_default_spmd_backend(case: Case) -> None:
    run_ranks(compare_backends, 2, case, timeout=400)


@EXHAUSTIVE
def test_selective_checkpointing_repeats_no_exchange_of_moecomm() -> None:
    run_ranks(check_checkpointing, 2, timeout=400)
