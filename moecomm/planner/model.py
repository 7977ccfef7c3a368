"""What the planner knows of a model: its sizes, as a Hugging Face config.json says them, and how many parameters they make."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moecomm.errors import wrong_value


class Model(NamedTuple):
    """A Mixture-of-Experts transformer, its batch and its numbers. All layers have attention; all but the dense ones have experts.

    >>> Model(layers=2, dim=64, hidden=32, experts=8, k=2, heads=4, kv_heads=4, head=16, vocabulary=256).of_stage(2)
    1
    """

    layers: int  # all, the dense ones too
    dim: int  # D
    hidden: int  # of one expert: its three matrices are [hidden, D], [hidden, D] and [D, hidden]
    experts: int  # E of a layer
    k: int  # K
    heads: int
    kv_heads: int
    head: int  # numbers of a head's query and key
    vocabulary: int
    shared: int = 0  # hidden dim of the shared experts together; 0: there are none
    dense_layers: int = 0  # with an MLP in place of experts; they are the first
    dense_hidden: int = 0  # of that MLP
    value_head: int = 0  # numbers of a head's value; 0: as of its key
    query_rank: int = 0  # multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the width of the queries' latent; 0: none
    kv_rank: int = 0  # of the keys' and values' latent; 0: no latent attention
    rope_head: int = 0  # of a key's ``head``, the numbers that all heads share, with rotation
    biased: bool = False  # whether attention, router and experts have biases
    tied: bool = False  # whether the embedding is the output matrix too
    sequence: int = 4096  # tokens of a sequence
    batch: int = 1024  # sequences of a step, over all ranks
    itemsize: int = 2  # bytes of a number in the computation
    stored: int = 4  # bytes of a parameter, a gradient and each of the optimizer's two moments, where they are kept

    def of_stage(self, stages: int) -> int:
        """The layers of the longest of ``stages`` pipeline stages."""
        return -(-self.layers // stages)

    def to_dict(self) -> dict[str, Any]:
        return self._asdict()


class Parameters(NamedTuple):
    """How many parameters each part has."""

    attention: int  # of a layer, with its norm
    router: int  # of a layer with experts, with its norm
    expert: int  # one of a layer's E
    shared: int  # a layer's shared experts together
    dense: int  # the MLP of a dense layer, with its norm
    ends: int  # the embedding, the last norm and the output matrix

    def total(self, model: Model) -> int:
        sparse = model.layers - model.dense_layers
        each = self.router + model.experts * self.expert + self.shared
        return model.layers * self.attention + sparse * each + model.dense_layers * self.dense + self.ends

    def active(self, model: Model) -> int:
        """Those that a token is multiplied with."""
        return self.total(model) - (model.layers - model.dense_layers) * (model.experts - model.k) * self.expert


def value_head(model: Model) -> int:
    return model.value_head or model.head


def attention_matrices(model: Model) -> int:
    """The parameters of a layer's attention matrices."""
    d, h, value = model.dim, model.heads, value_head(model)
    out = h * value * d
    if model.kv_rank:
        queries = d * model.query_rank + model.query_rank * h * model.head if model.query_rank else d * h * model.head
        keys = d * (model.kv_rank + model.rope_head) + model.kv_rank * h * (model.head - model.rope_head + value)
        return queries + keys + out
    return d * h * model.head + d * model.kv_heads * (model.head + value) + out


def parameters(model: Model) -> Parameters:
    """Count the parameters.

    >>> mixtral = Model(32, 4096, 14336, 8, 2, heads=32, kv_heads=8, head=128, vocabulary=32000)
    >>> counts = parameters(mixtral)
    >>> f"{counts.total(mixtral):,} parameters, {counts.active(mixtral):,} active"
    '46,702,792,704 parameters, 12,879,925,248 active'
    """
    d = model.dim
    biases = model.biased * ((model.heads + 2 * model.kv_heads) * model.head + d)
    return Parameters(
        attention=attention_matrices(model) + biases + d,
        router=d * model.experts + model.biased * model.experts + d,
        expert=3 * d * model.hidden + model.biased * (2 * model.hidden + d),
        shared=3 * d * model.shared,
        dense=3 * d * model.dense_hidden + d,
        ends=model.vocabulary * d * (1 if model.tied else 2) + d,
    )


def _grouped_query(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Mixtral, Qwen3-MoE and gpt-oss have alike."""
    heads = config["num_attention_heads"]
    return {
        "layers": config["num_hidden_layers"],
        "dim": config["hidden_size"],
        "k": config["num_experts_per_tok"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head": config.get("head_dim") or config["hidden_size"] // heads,
        "vocabulary": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", False),
    }


def _mixtral(config: Mapping[str, Any]) -> Model:
    return Model(hidden=config["intermediate_size"], experts=config["num_local_experts"], **_grouped_query(config))


def _qwen3(config: Mapping[str, Any]) -> Model:
    layers, step, only = config["num_hidden_layers"], config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    dense = sum(layer in only or (layer + 1) % step != 0 for layer in range(layers))
    hidden, experts = config["moe_intermediate_size"], config["num_experts"]
    return Model(hidden=hidden, experts=experts, dense_layers=dense, dense_hidden=config["intermediate_size"], **_grouped_query(config))


def _gpt_oss(config: Mapping[str, Any]) -> Model:
    return Model(hidden=config["intermediate_size"], experts=config["num_local_experts"], biased=True, **_grouped_query(config))


def _deepseek(config: Mapping[str, Any]) -> Model:
    """Without the layers of multi-token prediction, which the 671 B do not count either."""
    layers, first, every = config["num_hidden_layers"], config["first_k_dense_replace"], config.get("moe_layer_freq", 1)
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    return Model(
        layers=layers,
        dim=config["hidden_size"],
        hidden=config["moe_intermediate_size"],
        experts=config["n_routed_experts"],
        k=config["num_experts_per_tok"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_attention_heads"],
        head=nope + rope,
        vocabulary=config["vocab_size"],
        shared=(config.get("n_shared_experts") or 0) * config["moe_intermediate_size"],
        dense_layers=sum(layer < first or layer % every != 0 for layer in range(layers)),
        dense_hidden=config["intermediate_size"],
        value_head=config["v_head_dim"],
        query_rank=config.get("q_lora_rank") or 0,
        kv_rank=config["kv_lora_rank"],
        rope_head=rope,
        tied=config.get("tie_word_embeddings", False),
    )


READERS: dict[str, Callable[[Mapping[str, Any]], Model]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
}


def read_config(config: str | Path | Mapping[str, Any], sequence: int = 4096, batch: int = 1024) -> Model:
    """The `Model` of a Hugging Face config.json: Mixtral, Qwen3-MoE, DeepSeek-V3 or gpt-oss.

    Args:
        config: the file's path, or what it holds, as a dict.
        sequence: tokens of a sequence; a config says only the most that there can be.
        batch: sequences of a step, over all ranks.

    Raises:
        ValueError: its "model_type" is another, or a key is missing.

    >>> sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    ...          "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}
    >>> read_config({"model_type": "mixtral"} | sizes).hidden
    14336
    """
    values = config if isinstance(config, Mapping) else json.loads(Path(config).read_text())
    kind = values.get("model_type")
    if kind not in READERS:
        wrong_value('config["model_type"]', repr(kind), f"one of {', '.join(READERS)}")
    try:
        model = READERS[kind](values)
    except KeyError as error:
        wrong_value("config", f"a {kind} without {error}", f"with all sizes of a {kind}")
    return model._replace(sequence=sequence, batch=batch)
