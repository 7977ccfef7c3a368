"""Models of Hugging Face Transformers with moecomm's experts: the loss and gradients of their own eager code, alone and expert-parallel."""

from __future__ import annotations

import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import moecomm.functional as mf
from tests.spawn import RankFailed, run_ranks

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
DEEPSEEK = {
    "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 0, "n_shared_experts": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {"GptOss": {}, "Qwen3Moe": {}, "Mixtral": {}, "Olmoe": {}, "DeepseekV3": DEEPSEEK}
FEW = ("GptOss", "Qwen3Moe")  # transposed weights, biases and a gate of its own; and the layout of most others


def some(names: Any) -> list[Any]:
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    import moecomm.integrations.transformers  # noqa: F401

    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype)
    for parameter in model.parameters():  # as they are initialized the experts hardly matter
        nn.init.normal_(parameter, std=0.2)
    return model


def batch() -> Tensor:
    return torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, implementation: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits and all gradients."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(input_ids=batch(), labels=batch())
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        largest = want[name].abs().max().item()
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=tolerance * largest, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", some(MODELS))
def test_a_model_trains_as_with_its_own_experts(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    (logits, grads), (want, wanted) = step(model, "moecomm"), step(model, "eager")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]  # an eager model rounds its sums in bfloat16 at each expert
    torch.testing.assert_close(logits, want, rtol=0, atol=tolerance * want.abs().max().item())
    assert_alike(grads, wanted, tolerance)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MODELS)
def test_frozen_experts_and_checkpointing_change_no_other_gradient(name: str) -> None:
    model = model_of(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in parameter_name)
    _, want = step(model, "eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_alike(step(model, "moecomm")[1], want, 1e-5)


@pytest.mark.exhaustive
def test_lora_on_the_experts_trains_as_with_their_own_code() -> None:
    peft = pytest.importorskip("peft")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = peft.get_peft_model(model_of("Qwen3Moe"), peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.2)
    (_, grads), (_, wanted) = (step(model, implementation) for implementation in ("moecomm", "eager"))
    assert any("lora" in name for name in wanted)
    assert_alike(grads, wanted, 1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MODELS)
def test_a_model_generates_the_same_text_with_a_cache(name: str) -> None:
    model, texts = model_of(name).eval(), []
    for implementation in ("moecomm", "eager"):
        model.set_experts_implementation(implementation)
        texts.append(model.generate(batch(), max_new_tokens=12, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MODELS)
def test_compiled_a_model_is_one_graph_and_the_same(name: str) -> None:
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)  # 5.17 cannot trace its fallback's backward, for float32
    model = model_of(name, torch.bfloat16 if old else torch.float32)
    want = step(model, "eager")[0]
    model.set_experts_implementation("moecomm")
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=batch()).logits
    torch.testing.assert_close(got, want, rtol=0, atol=(6e-2 if old else 1e-5) * want.abs().max().item())


def expert_classes() -> dict[str, type[nn.Module]]:
    """Each class of experts in the installed version that takes an experts function."""
    found = {}
    for file in sorted((Path(transformers.__file__).parent / "models").rglob("modeling_*.py")):
        if "use_experts_implementation" not in file.read_text():
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name, of in vars(module).items():
            if inspect.isclass(of) and of.__module__ == module.__name__ and "_apply_gate" in vars(of):
                found[f"{file.parent.name}.{name}"] = of
    return found


class Config:
    """A configuration that has each size that an expert may ask for."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        kinds = {"__": None, "eps": 1e-6, "limit": 7.0, "alpha": 1.7, "act": "silu", "per": 2, "top": 2, "intermediate": 16, "expert": 8}
        value = next((value for kind, value in kinds.items() if kind in name), 32)
        if value is None:
            raise AttributeError(name)
        return value


@pytest.mark.exhaustive
def test_all_experts_of_the_installed_version_are_their_eager_selves() -> None:
    from moecomm.integrations.transformers import experts_forward

    classes = expert_classes()
    assert len(classes) > 30
    for name, of in classes.items():
        experts = of(Config()).double()
        seed = torch.Generator().manual_seed(0)
        for parameter in experts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=seed, dtype=torch.float64)
        wide = (experts.gate_up_proj if experts.has_gate else experts.up_proj).shape
        width = wide[1] if experts.is_transposed else wide[2]
        x = torch.randn(11, width, generator=seed, dtype=torch.float64).requires_grad_()
        weights = torch.rand(11, 2, generator=seed, dtype=torch.float64).requires_grad_()
        ids = torch.rand(11, wide[0], generator=seed).argsort(1)[:, :2]
        answers = []
        for y in (experts_forward(experts, x, ids, weights), experts(x, ids, weights)):
            answers.append([y, *torch.autograd.grad(y.square().sum(), (x, weights, *experts.parameters()))])
        for got, want in zip(*answers, strict=True):
            far = (got - want).abs().max().item() / want.abs().max().item()
            assert far < 1e-5, f"{name}: {far}"  # some compute a step in float32, whatever their dtype


@pytest.mark.parametrize("name", ["gpt_oss.GptOssExperts", "muse_spark.MuseSparkExperts"])  # with biases; with a norm behind the experts
@pytest.mark.parametrize("forward", [False, True])
def test_what_padding_holds_reaches_no_parameter(name: str, forward: bool) -> None:
    from moecomm.integrations.transformers import _layer

    module, of = name.split(".")
    experts = getattr(pytest.importorskip(f"transformers.models.{module}.modeling_{module}"), of)(Config())
    seed = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=seed)
    x, weights = torch.randn(11, 32, generator=seed), torch.rand(11, 2, generator=seed)
    num_experts = experts.down_proj.shape[0]
    ids = torch.rand(11, num_experts, generator=seed).argsort(1)[:, :2]
    want = experts(x, ids, weights)
    wanted = torch.autograd.grad(want.square().sum(), list(experts.parameters()))
    try:
        torch.use_deterministic_algorithms(forward)  # what grouped_mm does not write is then NaN, as all of torch.empty
        y = _layer(experts, x, mf.plan(ids, weights, num_experts, "", max_rows=30, align=4, like=x), {})
        torch.use_deterministic_algorithms(True)
        grads = torch.autograd.grad(y.square().sum(), list(experts.parameters()))
    finally:
        torch.use_deterministic_algorithms(False)
    for got, expected in zip((y, *grads), (want, *wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


expert_parallel = pytest.mark.skipif(
    importlib.util.find_spec("transformers.distributed.expert_parallel") is None, reason="other implementations are taken from 5.23 on"
)
Split = tuple[int, dict[str, int]]  # ranks, and sizes of DistributedConfig
SPLITS: list[Split] = [
    (2, {"fsdp_size": 2, "ep_size": 2}),
    (2, {"tp_size": 2, "ep_size": 2}),
    (4, {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}),
    (4, {"fsdp_size": 4, "ep_size": 2}),
]


def here(folder: str, sizes: dict[str, int], options: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's logits, and the whole gradients."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.expert_parallel import EPImplementationInterface

    from moecomm.integrations.transformers import expert_parallel

    EPImplementationInterface.register("with options", expert_parallel(**options))
    config = DistributedConfig(ep_implementation="with options" if options else "moecomm", **sizes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    tp = sizes.get("tp_size", 1)
    mine = batch().chunk(dist.get_world_size() // tp)[dist.get_rank() // tp]  # the ranks of a TP group share a batch
    out = model(input_ids=mine, labels=mine)
    out.loss.backward()

    def whole(t: Tensor) -> Tensor:
        return t.full_tensor() if isinstance(t, DTensor) else t

    return whole(out.logits).detach(), {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@expert_parallel
@pytest.mark.parametrize("options", [{}, pytest.param({"max_rows": 40, "align": 8}, marks=pytest.mark.exhaustive)], ids=str)
@pytest.mark.parametrize("split", [SPLITS[1], *(pytest.param(split, marks=pytest.mark.exhaustive) for split in SPLITS[::2])], ids=str)
@pytest.mark.parametrize("name", ["Qwen3Moe", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("GptOss", "DeepseekV3"))])
def test_expert_parallel_a_model_trains_as_on_one_rank(name: str, split: Split, options: dict[str, Any], tmp_path: Path) -> None:
    ranks, sizes = split
    model = model_of(name)
    model.save_pretrained(tmp_path)
    want, wanted = step(model, "eager")
    results = run_ranks(here, ranks, str(tmp_path), sizes, options, timeout=300)
    logits = torch.cat([logits for logits, _ in results[:: sizes.get("tp_size", 1)]])
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-5 * want.abs().max().item())
    assert_alike(results[0][1], wanted, 1e-5)


def compiled_here(folder: str, implementation: str) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of a layer's router, where the MoE of each layer is compiled as one graph under TP + EP."""
    from transformers.distributed import DistributedConfig

    import moecomm.integrations.transformers  # noqa: F401

    config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=implementation)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    for layer in model.model.layers:
        layer.mlp.compile(backend="aot_eager", fullgraph=True)
    logits = model(input_ids=batch()).logits
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    return logits.detach(), torch.autograd.grad(logits.square().sum(), model.model.layers[0].mlp.gate.weight)[0]


@expert_parallel
@pytest.mark.exhaustive
def test_expert_parallel_under_tp_a_layer_is_one_graph_which_that_of_transformers_is_not(tmp_path: Path) -> None:
    model = model_of("Qwen3Moe")
    model.save_pretrained(tmp_path)
    model.set_experts_implementation("eager")
    want = model(input_ids=batch()).logits
    (wanted,) = torch.autograd.grad(want.square().sum(), model.model.layers[0].mlp.gate.weight)
    for logits, grad in run_ranks(compiled_here, 2, str(tmp_path), "moecomm", timeout=300):
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-5 * want.abs().max().item())
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    with pytest.raises(RankFailed, match="Could not guard on data-dependent expression"):
        run_ranks(compiled_here, 2, str(tmp_path), "all_to_all", timeout=300)
