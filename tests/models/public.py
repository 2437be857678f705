"""Configs of public models, as published (the fields that matter), beside those of `test_checkpoint`."""

from __future__ import annotations

from tests.models.test_checkpoint import config

QWEN3_8B = config(
    "Qwen3ForCausalLM", "qwen3", 36, 4096, 32, 12288, 151936, num_key_value_heads=8, head_dim=128, hidden_act="silu",
    max_position_embeddings=40960, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
QWEN3_14B = config(
    "Qwen3ForCausalLM", "qwen3", 40, 5120, 40, 17408, 151936, num_key_value_heads=8, head_dim=128, hidden_act="silu",
    max_position_embeddings=40960, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
QWEN25_72B = config(
    "Qwen2ForCausalLM", "qwen2", 80, 8192, 64, 29568, 152064, num_key_value_heads=8, hidden_act="silu",
    max_position_embeddings=32768, use_sliding_window=False, sliding_window=131072, tie_word_embeddings=False,
    torch_dtype="bfloat16",
)  # fmt: skip
QWEN25_7B_AWQ = config(
    "Qwen2ForCausalLM", "qwen2", 28, 3584, 28, 18944, 152064, num_key_value_heads=4, hidden_act="silu",
    max_position_embeddings=32768, use_sliding_window=False, tie_word_embeddings=False, torch_dtype="float16",
    quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128},
)  # fmt: skip
LLAMA_70B = config(
    "LlamaForCausalLM", "llama", 80, 8192, 64, 28672, 128256, num_key_value_heads=8, hidden_act="silu",
    max_position_embeddings=131072, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
LLAMA_405B = config(
    "LlamaForCausalLM", "llama", 126, 16384, 128, 53248, 128256, num_key_value_heads=8, hidden_act="silu",
    max_position_embeddings=131072, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
QWEN3_EMBEDDING_8B = config(
    "Qwen3ForCausalLM", "qwen3", 36, 4096, 32, 12288, 151665, num_key_value_heads=8, head_dim=128, hidden_act="silu",
    max_position_embeddings=40960, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
BGE_LARGE = config(
    "BertModel", "bert", 24, 1024, 16, 4096, 30522, hidden_act="gelu", max_position_embeddings=512,
    torch_dtype="float32",
)  # fmt: skip
QWEN3_NEXT_80B = config(
    "Qwen3NextForCausalLM", "qwen3_next", 48, 2048, 16, 5120, 151936, num_key_value_heads=2, head_dim=256,
    hidden_act="silu", num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
    shared_expert_intermediate_size=512, decoder_sparse_step=1, linear_num_key_heads=16, linear_num_value_heads=32,
    linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4,
    layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 12, max_position_embeddings=262144,
    tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
LLAMA4_SCOUT = config(
    "Llama4ForCausalLM", "llama4_text", 48, 5120, 40, 8192, 202048, num_key_value_heads=8, head_dim=128,
    hidden_act="silu", num_local_experts=16, num_experts_per_tok=1, attention_chunk_size=8192,
    max_position_embeddings=10485760, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
