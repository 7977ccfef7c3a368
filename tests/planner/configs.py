"""The sizes in the config.json of four published models, on Hugging Face, and how many parameters their cards say they have."""

from __future__ import annotations

from typing import Any

MIXTRAL: dict[str, Any] = {  # mistralai/Mixtral-8x7B-v0.1
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}  # fmt: skip
QWEN3: dict[str, Any] = {  # Qwen/Qwen3-30B-A3B
    "model_type": "qwen3_moe", "hidden_size": 2048, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "vocab_size": 151936, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {  # deepseek-ai/DeepSeek-V3
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280, "tie_word_embeddings": False, "num_nextn_predict_layers": 1,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {  # openai/gpt-oss-20b
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
    "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
TOTALS = [(MIXTRAL, 46.7e9, 12.9e9), (QWEN3, 30.5e9, 3.3e9), (DEEPSEEK, 671e9, 37e9), (GPT_OSS, 20.9e9, 3.6e9)]
