"""A config.json is read as its model is: the parameters are as many as its card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moecomm.planner import Model, parameters, read_config
from tests.planner.configs import DEEPSEEK, GPT_OSS, MIXTRAL, QWEN3, TOTALS


@pytest.mark.parametrize(("config", "total", "active"), TOTALS, ids=lambda each: each["model_type"] if isinstance(each, dict) else "")
def test_a_config_has_as_many_parameters_as_its_card_says(config: dict[str, Any], total: float, active: float) -> None:
    model = read_config(config)
    assert parameters(model).total(model) == pytest.approx(total, rel=0.01)
    counted, embedding = parameters(model).active(model), model.vocabulary * model.dim
    assert min(abs(counted - left_out * embedding - active) for left_out in (0, 1)) < 0.02 * active  # gpt-oss's leaves out the embedding


def test_a_config_is_read_from_its_file_and_says_every_size(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DEEPSEEK))
    model = read_config(file, sequence=8192, batch=64)
    assert model == read_config(DEEPSEEK, 8192, 64)
    assert (model.layers, model.dense_layers, model.dim, model.hidden, model.experts, model.k) == (61, 3, 7168, 2048, 256, 8)
    assert (model.head, model.value_head, model.query_rank, model.kv_rank, model.rope_head) == (192, 128, 1536, 512, 64)
    assert (model.shared, model.dense_hidden, model.sequence, model.batch) == (2048, 18432, 8192, 64)


def test_dense_layers_between_those_with_experts_are_counted() -> None:
    assert read_config(QWEN3 | {"decoder_sparse_step": 2}).dense_layers == 24
    assert read_config(QWEN3 | {"mlp_only_layers": [0, 1, 47]}).dense_layers == 3
    assert read_config(DEEPSEEK | {"moe_layer_freq": 2}).dense_layers == 3 + 29


def test_sizes_that_a_config_may_leave_out_are_those_of_its_model() -> None:
    config = {key: value for key, value in MIXTRAL.items() if key not in ("num_key_value_heads", "tie_word_embeddings")}
    assert read_config(config) == read_config(MIXTRAL)._replace(kv_heads=32)
    assert read_config(DEEPSEEK | {"q_lora_rank": None}).query_rank == 0


def test_an_unknown_model_and_a_missing_size_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="was 'llama'; it must be one of mixtral, qwen3_moe, deepseek_v3, gpt_oss"):
        read_config({"model_type": "llama"})
    with pytest.raises(ValueError, match="a gpt_oss without 'num_local_experts'"):
        read_config({key: value for key, value in GPT_OSS.items() if key != "num_local_experts"})


def test_every_matrix_of_a_small_model_is_counted() -> None:
    model = Model(
        layers=3, dim=8, hidden=4, experts=6, k=2, heads=2, kv_heads=1, head=4, vocabulary=10, shared=5, dense_layers=1, dense_hidden=7
    )
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 8  # queries, keys and values, output, norm
    sparse = 8 * 6 + 8 + 6 * 3 * 8 * 4 + 3 * 8 * 5  # gate, norm, experts, shared
    dense = 3 * 8 * 7 + 8
    assert parameters(model).total(model) == 3 * attention + 2 * sparse + dense + 2 * 10 * 8 + 8
    assert parameters(model).total(model) - parameters(model).active(model) == 2 * 4 * 3 * 8 * 4
    tied = model._replace(tied=True)
    assert parameters(tied).total(tied) == parameters(model).total(model) - 10 * 8
