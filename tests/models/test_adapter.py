"""What keeps files from being an adapter of a model: each refusal, and what is not refused."""

from __future__ import annotations

from typing import Any

import pytest

from nimhost.entities import ModelSpec
from nimhost.layers import LinearLayerSpec
from nimhost.models.adapter import Base, Flaw, are_different, find_flaw, rank_of
from nimhost.models.tensors import Tensor

FILES = ["adapter_config.json", "adapter_model.safetensors", "README.md"]
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}
SIZES = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64),
         "gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}  # fmt: skip
"""Inputs and outputs."""


def spec(layers: int = 2, hidden: bool = False) -> ModelSpec:
    """`hidden`: its layers are packed, and do not show their sizes."""
    linear = [
        LinearLayerSpec(name=f"model.layers.{n}.{_part(kind)}.{kind}", in_features=i, out_features=o)
        for n in range(layers)
        for kind, (i, o) in SIZES.items()
    ]
    return ModelSpec(
        checkpoint_model_name="m", family="qwen3", num_layers=layers, hidden_size=64, num_attention_heads=4,
        num_kv_heads=2, ffn_hidden_size=128, vocab_size=448, tied_embeddings=False, gated_mlp=True,
        base_num_parameters=1, precision="bfloat16", linear_layers=[] if hidden else linear,
    )  # fmt: skip


def _part(kind: str) -> str:
    return "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def pair(module: str, takes: int, gives: int, rank: int = 8) -> dict[str, Tensor]:
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": Tensor("BF16", (rank, takes), 0),
        f"{prefix}.lora_B.weight": Tensor("BF16", (gives, rank), 0),
    }


Q, DOWN = pair("model.layers.1.self_attn.q_proj", 64, 64), pair("model.layers.0.mlp.down_proj", 128, 64)
BASE = Base(name="default/qwen3", spec=spec(), repo_id="Qwen/Qwen3-1.7B")
HIDDEN = Base(name="default/qwen3", spec=spec(hidden=True))


def test_an_adapter_of_the_model_has_no_flaw() -> None:
    assert find_flaw(FILES, CONFIG, Q | DOWN, BASE) is None
    assert find_flaw(FILES, CONFIG, Q | DOWN, HIDDEN) is None
    assert find_flaw(FILES, CONFIG, Q | DOWN, Base(name="x")) is None
    assert find_flaw(["adapter_config.json", "adapter_model.bin"], CONFIG, None, BASE) is None


@pytest.mark.parametrize(
    ("files", "says", "missing"),
    [
        (["adapter_model.safetensors"], "no adapter_config.json", True),
        (["adapter_config.json"], "no adapter_model.safetensors", True),
        (["config.json", "model.safetensors"], "a whole model", False),
        (["lora.nemo"], "NeMo archive", False),
        ([], "no adapter_config.json", True),
    ],
)
def test_files_that_are_no_adapter(files: list[str], says: str, missing: bool) -> None:
    flaw = find_flaw(files, CONFIG, None, BASE)
    assert flaw is not None
    assert (says in flaw.message, flaw.missing) == (True, missing)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type PROMPT_TUNING"),
        ({"peft_type": "ADALORA"}, "peft_type ADALORA"),
        ({"r": 0}, "no 'r'"),
        ({"r": "8"}, "r '8'"),
        ({"r": -1}, "r -1"),
        ({"lora_alpha": None}, "no 'lora_alpha'"),
        ({"target_modules": []}, "no 'target_modules'"),
        ({"r": 513}, "rank is 513"),
        ({"rank_pattern": {"q_proj": 1024}}, "rank is 1024"),
        ({"bias": "all"}, "bias: all"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["embed_tokens", "score"]}, "modules_to_save: embed_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4"),
        ({"layer_replication": [[0, 2]]}, "replicates layers"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"lora_bias": True}, "have biases"),
        ({"use_bdlora": {"a": 1}}, "block-diagonal"),
        ({"use_qalora": True}, "QALoRA"),
    ],
)
def test_settings_that_no_engine_takes(changes: dict[str, Any], says: str) -> None:
    flaw = find_flaw(FILES, CONFIG | changes, None, BASE)
    assert flaw is not None
    assert says in flaw.message


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": None},
        {"bias": "none"},
        {"modules_to_save": None},
        {"modules_to_save": ["score"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"base_model_name_or_path": "/home/me/checkpoints/llama"},
        {"base_model_name_or_path": None},
        {"base_model_name_or_path": "unsloth/qwen3-1.7b-unsloth-bnb-4bit"},
        {"base_model_name_or_path": "me/my-merge"},
    ],
)
def test_settings_that_are_fine(changes: dict[str, Any]) -> None:
    assert find_flaw(FILES, CONFIG | changes, Q, BASE) is None


@pytest.mark.parametrize(
    ("tensors", "base", "says"),
    [
        ({"model.embed_tokens.weight": Tensor("BF16", (448, 64), 0)}, BASE, "no LoRA matrices"),
        (pair("model.layers.2.self_attn.q_proj", 64, 64), BASE, "layer 2, and the model has 2 layers"),
        (pair("model.layers.2.self_attn.q_proj", 64, 64), HIDDEN, "layer 2, and the model has 2 layers"),
        (pair("model.layers.0.self_attn.q_proj", 4096, 64), BASE, "takes 4096 values, and the model's 64"),
        (pair("model.layers.0.self_attn.q_proj", 4096, 64), HIDDEN, "takes 4096 values"),
        (pair("model.layers.0.mlp.down_proj", 128, 4096), HIDDEN, "gives 4096 values"),
        (pair("model.layers.0.self_attn.k_proj", 64, 64), BASE, "gives 64 values, and the model's 32"),
        (pair("model.layers.0.self_attn.query_key_value", 64, 64), BASE, "query_key_value, which the model does not"),
        (pair("model.layers.0.self_attn.q_proj", 64, 64, rank=32), BASE, "has rank 32"),
    ],
)
def test_tensors_that_are_for_another_model(tensors: dict[str, Tensor], base: Base, says: str) -> None:
    flaw = find_flaw(FILES, CONFIG, tensors, base)
    assert flaw is not None
    assert says in flaw.message


@pytest.mark.parametrize(
    "tensors",
    [
        pair("model.layers.0.mlp.experts.3.gate_proj", 999, 999),
        pair("model.vision_tower.encoder.layers.30.self_attn.q_proj", 999, 999),
        pair("language_model.model.layers.0.self_attn.q_proj", 64, 64),
        pair("lm_head", 64, 448),
        pair("model.layers.0.self_attn.q_proj", 64, 64, rank=4),
    ],
)
def test_tensors_that_nothing_is_said_about(tensors: dict[str, Tensor]) -> None:
    assert find_flaw(FILES, CONFIG, tensors, BASE) is None


def test_a_name_that_cannot_be_this_model() -> None:
    flaw = find_flaw(FILES, CONFIG | {"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, Q, BASE)
    assert flaw == Flaw(message="it was trained for meta-llama/Llama-3.1-8B, and default/qwen3 is Qwen/Qwen3-1.7B")


@pytest.mark.parametrize(
    ("one", "other", "different"),
    [
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B", False),
        ("Qwen/Qwen3-1.7B", "unsloth/Qwen3-1.7B-unsloth-bnb-4bit", False),
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base", False),
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", True),
        ("meta-llama/Llama-3.1-8B", "NousResearch/Hermes-3-Llama-3.1-8B", False),
        ("meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", False),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", True),
        ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B", True),
        ("mistralai/Mistral-7B-v0.1", "HuggingFaceH4/zephyr-7b-beta", False),
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-FP8", False),
        ("google/gemma-2-9b", "google/gemma-2-27b", True),
        ("me/finetune", "you/other", False),
    ],
)
def test_names_that_cannot_mean_the_same_model(one: str, other: str, different: bool) -> None:
    assert are_different(one, other) is different
    assert are_different(other, one) is different


def test_the_rank_is_the_largest_in_it() -> None:
    assert [rank_of(c) for c in (CONFIG, CONFIG | {"rank_pattern": {"a": 32}}, {}, {"r": "x"})] == [8, 32, 0, 0]
