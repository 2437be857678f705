"""Configs as published (fields that matter here), against the parameter counts of their model cards."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nimhost.errors import BadRequest
from nimhost.layers import MambaConfig, MoEConfig, SlidingWindowConfig
from nimhost.models.checkpoint import is_weights_dir, read_spec
from nimhost.models.tensors import Tensor, count_parameters, header_length, parse_safetensors_header, weights_end


def config(arch: str, family: str, layers: int, hidden: int, heads: int, ffn: int, vocab: int, **rest: Any) -> Any:
    return {
        "architectures": [arch], "model_type": family, "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "intermediate_size": ffn, "vocab_size": vocab, **rest,
    }  # fmt: skip


LLAMA_8B = config(
    "LlamaForCausalLM", "llama", 32, 4096, 32, 14336, 128256, num_key_value_heads=8, hidden_act="silu",
    max_position_embeddings=131072, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
LLAMA_1B = config(
    "LlamaForCausalLM", "llama", 16, 2048, 32, 8192, 128256, num_key_value_heads=8, head_dim=64, hidden_act="silu",
    max_position_embeddings=131072, tie_word_embeddings=True, torch_dtype="bfloat16",
)  # fmt: skip
QWEN2_7B = config(
    "Qwen2ForCausalLM", "qwen2", 28, 3584, 28, 18944, 152064, num_key_value_heads=4, hidden_act="silu",
    max_position_embeddings=32768, sliding_window=131072, use_sliding_window=False, tie_word_embeddings=False,
    torch_dtype="bfloat16",
)  # fmt: skip
QWEN3_1_7B = config(
    "Qwen3ForCausalLM", "qwen3", 28, 2048, 16, 6144, 151936, num_key_value_heads=8, head_dim=128, hidden_act="silu",
    max_position_embeddings=40960, sliding_window=None, tie_word_embeddings=True, torch_dtype="bfloat16",
)  # fmt: skip
QWEN3_30B_A3B = config(
    "Qwen3MoeForCausalLM", "qwen3_moe", 48, 2048, 32, 6144, 151936, num_key_value_heads=4, head_dim=128,
    hidden_act="silu", num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1,
    mlp_only_layers=[], max_position_embeddings=40960, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
QWEN2_57B_A14B = config(
    "Qwen2MoeForCausalLM", "qwen2_moe", 28, 3584, 28, 18944, 151936, num_key_value_heads=4, hidden_act="silu",
    num_experts=64, num_experts_per_tok=8, moe_intermediate_size=2560, shared_expert_intermediate_size=20480,
    decoder_sparse_step=1, max_position_embeddings=32768, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
MISTRAL_7B = config(
    "MistralForCausalLM", "mistral", 32, 4096, 32, 14336, 32000, num_key_value_heads=8, hidden_act="silu",
    sliding_window=4096, max_position_embeddings=32768, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
MIXTRAL_8X7B = config(
    "MixtralForCausalLM", "mixtral", 32, 4096, 32, 14336, 32000, num_key_value_heads=8, hidden_act="silu",
    num_local_experts=8, num_experts_per_tok=2, sliding_window=None, max_position_embeddings=32768,
    tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
GEMMA2_9B = config(
    "Gemma2ForCausalLM", "gemma2", 42, 3584, 16, 14336, 256000, num_key_value_heads=8, head_dim=256,
    hidden_act="gelu_pytorch_tanh", sliding_window=4096, max_position_embeddings=8192, torch_dtype="float32",
)  # fmt: skip
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}  # fmt: skip
PHI3_MINI = config(
    "Phi3ForCausalLM", "phi3", 32, 3072, 32, 8192, 32064, num_key_value_heads=32, hidden_act="silu",
    sliding_window=262144, max_position_embeddings=131072, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
PHI2 = config(
    "PhiForCausalLM", "phi", 32, 2560, 32, 10240, 51200, num_key_value_heads=32, hidden_act="gelu_new",
    max_position_embeddings=2048, tie_word_embeddings=False, torch_dtype="float16",
)  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12,
    "n_inner": None, "n_positions": 1024, "n_ctx": 1024, "vocab_size": 50257, "activation_function": "gelu_new",
}  # fmt: skip
BERT = config(
    "BertModel", "bert", 12, 768, 12, 3072, 30522, hidden_act="gelu", max_position_embeddings=512,
    torch_dtype="float32",
)  # fmt: skip
GPT_OSS_20B = config(
    "GptOssForCausalLM", "gpt_oss", 24, 2880, 64, 2880, 201088, num_key_value_heads=8, head_dim=64, hidden_act="silu",
    num_local_experts=32, num_experts_per_tok=4, experts_per_token=4, sliding_window=128, tie_word_embeddings=False,
    max_position_embeddings=131072, quantization_config={"quant_method": "mxfp4"},
)  # fmt: skip
DEEPSEEK_V3 = config(
    "DeepseekV3ForCausalLM", "deepseek_v3", 61, 7168, 128, 18432, 129280, num_key_value_heads=128, hidden_act="silu",
    n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, n_shared_experts=1, moe_layer_freq=1,
    first_k_dense_replace=3, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
    v_head_dim=128, max_position_embeddings=163840, tie_word_embeddings=False, torch_dtype="bfloat16",
    quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
)  # fmt: skip
DEEPSEEK_V2_LITE = config(
    "DeepseekV2ForCausalLM", "deepseek_v2", 27, 2048, 16, 10944, 102400, num_key_value_heads=16, hidden_act="silu",
    n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408, n_shared_experts=2, moe_layer_freq=1,
    first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
    v_head_dim=128, max_position_embeddings=163840, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
NEMOTRON_MINI = config(
    "NemotronForCausalLM", "nemotron", 32, 3072, 24, 9216, 256000, num_key_value_heads=8, hidden_act="relu2",
    head_dim=128, max_position_embeddings=4096, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
NEMOTRON_H_8B = config(
    "NemotronHForCausalLM", "nemotron_h", 52, 4096, 32, 21504, 131072, num_key_value_heads=8,
    mlp_hidden_act="relu2", hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    ssm_state_size=128, conv_kernel=4, max_position_embeddings=8192, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
JAMBA = config(
    "JambaForCausalLM", "jamba", 32, 4096, 32, 14336, 65536, num_key_value_heads=8, hidden_act="silu",
    num_experts=16, num_experts_per_tok=2, attn_layer_period=8, attn_layer_offset=4, expert_layer_period=2,
    mamba_d_state=16, mamba_d_conv=4, sliding_window=None, max_position_embeddings=262144,
    tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
FALCON_MAMBA = {
    "architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba", "num_hidden_layers": 64,
    "hidden_size": 4096, "intermediate_size": 8192, "state_size": 16, "conv_kernel": 4, "vocab_size": 65024,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip

# name: config, parameters in 10^9 (of the text part), tolerance in %, gated, tied, context, precision, kv heads
TABLE: dict[str, tuple[Any, float, float, bool, bool, int | None, str, int]] = {
    "Llama-3.1-8B": (LLAMA_8B, 8.030261248, 0.0, True, False, 131072, "bfloat16", 8),
    "Llama-3.2-1B": (LLAMA_1B, 1.235814400, 0.0, True, True, 131072, "bfloat16", 8),
    "Qwen2.5-7B": (QWEN2_7B, 7.615616512, 0.01, True, False, 32768, "bfloat16", 4),
    "Qwen3-1.7B": (QWEN3_1_7B, 1.720574976, 0.01, True, True, 40960, "bfloat16", 8),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30.532122624, 0.01, True, False, 40960, "bfloat16", 4),
    "Qwen2-57B-A14B": (QWEN2_57B_A14B, 57.409, 0.1, True, False, 32768, "bfloat16", 4),
    "Mistral-7B-v0.1": (MISTRAL_7B, 7.241732096, 0.0, True, False, 32768, "bfloat16", 8),
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46.702792704, 0.0, True, False, 32768, "bfloat16", 8),
    "Gemma-2-9B": (GEMMA2_9B, 9.241705984, 0.01, True, True, 8192, "float32", 8),
    "Gemma-3-4B": (GEMMA3_4B, 3.88, 0.1, True, True, 131072, "bfloat16", 4),
    "Phi-3.5-mini": (PHI3_MINI, 3.821079552, 0.0, True, False, 131072, "bfloat16", 32),
    "Phi-2": (PHI2, 2.779683840, 0.1, False, False, 2048, "float16", 32),
    "GPT-2": (GPT2, 0.124439808, 1.0, False, True, 1024, "float32", 12),
    "BERT-base": (BERT, 0.109482240, 1.5, False, True, 512, "float32", 12),
    "gpt-oss-20b": (GPT_OSS_20B, 20.914757184, 0.1, True, False, 131072, "int4", 8),
    "DeepSeek-V3": (DEEPSEEK_V3, 671.026419200, 0.01, True, False, 163840, "bfloat16", 128),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, 15.706484224, 0.01, True, False, 163840, "bfloat16", 16),
    "Nemotron-Mini-4B": (NEMOTRON_MINI, 4.191, 0.5, False, False, 4096, "bfloat16", 8),
}


@pytest.mark.parametrize("name", TABLE)
def test_public_models_are_what_their_cards_say(name: str) -> None:
    given, billions, percent, gated, tied, context, precision, kv_heads = TABLE[name]
    spec = read_spec(given)
    assert spec.base_num_parameters == pytest.approx(billions * 1e9, rel=percent / 100 + 1e-12)
    assert (spec.gated_mlp, spec.tied_embeddings) == (gated, tied)
    assert (spec.context_size, spec.precision, spec.num_kv_heads) == (context, precision, kv_heads)
    assert spec.checkpoint_model_name == given["architectures"][0]
    assert spec.family == given["model_type"]


@pytest.mark.parametrize(
    ("given", "moe"),
    [
        (LLAMA_8B, None),
        (MIXTRAL_8X7B, MoEConfig(num_experts=8, num_experts_per_tok=2, num_expert_layers=32)),
        (
            QWEN3_30B_A3B,
            MoEConfig(num_experts=128, num_experts_per_tok=8, num_expert_layers=48, expert_ffn_size=768),
        ),
        (
            QWEN2_57B_A14B,
            MoEConfig(
                num_experts=64, num_experts_per_tok=8, num_expert_layers=28, expert_ffn_size=2560, num_shared_experts=1
            ),
        ),
        (
            DEEPSEEK_V3,
            MoEConfig(
                num_experts=256, num_experts_per_tok=8, num_expert_layers=58, expert_ffn_size=2048, num_shared_experts=1
            ),
        ),
        (GPT_OSS_20B, MoEConfig(num_experts=32, num_experts_per_tok=4, num_expert_layers=24)),
        (JAMBA, MoEConfig(num_experts=16, num_experts_per_tok=2, num_expert_layers=16)),
        ({**LLAMA_8B, "num_local_experts": 1, "num_experts_per_tok": 1}, None),
    ],
)
def test_experts(given: Any, moe: MoEConfig | None) -> None:
    assert read_spec(given).moe_config == moe


@pytest.mark.parametrize(
    ("given", "mamba"),
    [
        (LLAMA_8B, None),
        (
            NEMOTRON_H_8B,
            MambaConfig(is_hybrid=True, num_mamba_layers=24, num_attention_layers=4, num_mlp_layers=24, state_size=128),
        ),
        (JAMBA, MambaConfig(is_hybrid=True, num_mamba_layers=28, num_attention_layers=4)),
        (FALCON_MAMBA, MambaConfig(is_hybrid=False, num_mamba_layers=64)),
    ],
)
def test_mamba_layers(given: Any, mamba: MambaConfig | None) -> None:
    assert read_spec(given).mamba_config == mamba


@pytest.mark.parametrize(
    ("given", "window"),
    [(MISTRAL_7B, 4096), (GEMMA3_4B, 1024), (QWEN2_7B, None), (PHI3_MINI, None), (QWEN3_1_7B, None), (LLAMA_8B, None)],
)
def test_sliding_window_counts_only_when_it_bites(given: Any, window: int | None) -> None:
    expected = None if window is None else SlidingWindowConfig(window_size=window)
    assert read_spec(given).sliding_window_config == expected


def test_chat_and_embedding_models_are_told_apart() -> None:
    assert read_spec(LLAMA_8B).is_chat is False
    assert read_spec(LLAMA_8B, tokenizer_config={"chat_template": "{{ x }}"}).is_chat is True
    assert read_spec(LLAMA_8B, chat_template="{{ x }}").is_chat is True
    assert read_spec(BERT, name="nvidia/NV-Embed-v2").is_embedding_model is True
    assert read_spec(BERT, name="bge").is_embedding_model is True
    assert read_spec({**BERT, "architectures": ["BertForMaskedLM"]}, name="bert").is_embedding_model is False
    assert read_spec(GPT2, name="gpt2").is_embedding_model is False


def test_newer_configs_call_the_type_dtype() -> None:
    given = {key: value for key, value in LLAMA_8B.items() if key != "torch_dtype"}
    assert read_spec({**given, "dtype": "float16"}).precision == "float16"
    assert read_spec({**given, "torch_dtype": "torch.float16"}).precision == "float16"
    assert read_spec({**given, "quantization_config": {"bits": 4, "quant_method": "gptq"}}).precision == "int4"
    assert read_spec(given).precision == "float32"


@pytest.mark.parametrize(
    "broken",
    [{}, {"model_type": "clip"}, {**LLAMA_8B, "hidden_size": None}, {**LLAMA_8B, "num_hidden_layers": "32"}],
)
def test_config_that_is_no_language_model_is_refused(broken: Any) -> None:
    with pytest.raises(BadRequest, match="has no usable"):
        read_spec(broken)


# --- tensors -------------------------------------------------------------------------------------------------------


def tensor(dtype: str, *shape: int) -> Tensor:
    return Tensor(dtype, shape, 0)


@pytest.mark.parametrize(
    ("tensors", "bits", "count"),
    [
        ({"w": tensor("BF16", 10, 20), "b": tensor("BF16", 20)}, None, 220),
        ({"w": tensor("F8_E4M3", 10, 20), "w_scale_inv": tensor("F32", 1, 1)}, 8, 200),
        (
            {
                "q_proj.qweight": tensor("I32", 128, 1024),
                "q_proj.scales": tensor("F16", 8, 1024),
                "q_proj.qzeros": tensor("I32", 8, 128),
                "q_proj.g_idx": tensor("I32", 1024),
                "norm.weight": tensor("F16", 1024),
            },
            4,
            1024 * 1024 + 1024,
        ),
        ({"x.weight_packed": tensor("I32", 64, 8), "x.weight_scale": tensor("BF16", 64, 1)}, 4, 64 * 64),
        ({"e.gate_up_proj_blocks": tensor("U8", 2, 8, 1, 16), "e.gate_up_proj_scales": tensor("U8", 2, 8, 1)}, 4, 512),
        ({"rotary_emb.inv_freq": tensor("F32", 64), "w": tensor("BF16", 2)}, None, 2),
    ],
)
def test_parameters_are_counted_as_what_they_stand_for(
    tensors: dict[str, Tensor], bits: int | None, count: int
) -> None:
    assert count_parameters(tensors, bits) == count


def test_tensors_make_the_count_exact_and_tell_tied_embeddings() -> None:
    given = {key: value for key, value in LLAMA_8B.items() if key != "tie_word_embeddings"}
    embed = {"model.embed_tokens.weight": tensor("BF16", 100, 10)}
    assert read_spec(given, tensors=embed).base_num_parameters == 1000
    assert read_spec(given, tensors=embed).tied_embeddings is True
    both = {**embed, "lm_head.weight": tensor("BF16", 100, 10)}
    assert read_spec(given, tensors=both).base_num_parameters == 2000
    assert read_spec(given, tensors=both).tied_embeddings is False
    assert read_spec({**given, "tie_word_embeddings": True}, tensors=both).base_num_parameters == 1000


def test_safetensors_header_is_read() -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    }
    text = json.dumps(header).encode()
    assert header_length(len(text).to_bytes(8, "little")) == len(text)
    tensors = parse_safetensors_header(text)
    assert tensors == {"a": Tensor("BF16", (2, 3), 12), "b": Tensor("F32", (), 16)}
    assert weights_end(tensors) == 16


@pytest.mark.parametrize("data", [b"", b"\x02", b"\0" * 8, b"\xff" * 8, b"PK\x03\x04archive!"])
def test_other_files_are_not_safetensors(data: bytes) -> None:
    with pytest.raises(ValueError):
        header_length(data)


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe"])
def test_broken_headers_are_refused(header: bytes) -> None:
    with pytest.raises(ValueError):
        parse_safetensors_header(header)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["config.json", "model.safetensors"], None),
        (["config.json", "pytorch_model.bin"], None),
        (["alternates/hf/config.json", "alternates/hf/model.safetensors", "x.nemo"], None),
        ([], "no config.json"),
        (["config.json", "tokenizer.json"], "no weights"),
        (["model.safetensors"], "no config.json"),
        (["elsewhere/config.json", "model.safetensors"], "no config.json"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter"),
    ],
)
def test_what_a_directory_must_hold(names: list[str], problem: str | None) -> None:
    found = is_weights_dir(names)
    assert found is None if problem is None else problem in str(found)
