"""The memory of public models against published figures, and what fits where."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.entities import ModelSpec
from nimhost.models.checkpoint import read_spec
from nimhost.models.memory import GIB, Ask, Fit, fit, kv_bytes
from nimhost.models.tensors import Tensor
from tests.models import public
from tests.models import test_checkpoint as known

# name: config, weights in GiB, tolerance in %, bytes of KV cache per token, source of the figures
PUBLIC: dict[str, tuple[Any, float, float, int, str]] = {
    "Llama-3.1-8B": (known.LLAMA_8B, 14.9889, 0.5, 131072, "vLLM log in pull request 17122"),
    "Llama-3.2-1B": (known.LLAMA_1B, 2.30, 1, 32768, "model card: 1.24B parameters"),
    "Llama-3.1-70B": (public.LLAMA_70B, 131.42, 0.5, 327680, "model card: 70.6B parameters"),
    "Llama-3.1-405B": (public.LLAMA_405B, 755.9, 0.5, 516096, "arXiv:2505.09343 table 1"),
    "Qwen2.5-7B": (known.QWEN2_7B, 14.2487, 1, 57344, "vLLM log"),
    "Qwen2.5-7B-AWQ": (public.QWEN25_7B_AWQ, 5.2, 3, 57344, "vLLM log"),
    "Qwen2.5-72B": (public.QWEN25_72B, 135.4, 0.5, 327680, "arXiv:2505.09343 table 1"),
    "Qwen3-1.7B": (known.QWEN3_1_7B, 3.2, 1, 114688, "model card: 1.7B parameters"),
    "Qwen3-8B": (public.QWEN3_8B, 15.27, 0.5, 147456, "vLLM log: 5.62 GiB for 40960 tokens"),
    "Qwen3-14B": (public.QWEN3_14B, 27.5, 0.5, 163840, "model card: 14.8B parameters"),
    "Qwen3-30B-A3B": (known.QWEN3_30B_A3B, 56.9, 0.5, 98304, "model card: 30.5B parameters"),
    "Mistral-7B-v0.1": (known.MISTRAL_7B, 13.4966, 0.5, 131072, "vLLM log"),
    "Mixtral-8x7B": (known.MIXTRAL_8X7B, 86.99, 0.5, 131072, "model card: 46.7B parameters"),
    "Gemma-2-9B": (known.GEMMA2_9B, 17.2, 0.5, 344064, "model card: 9.24B parameters"),
    "Phi-3.5-mini": (known.PHI3_MINI, 7.12, 0.5, 393216, "model card: 3.8B parameters"),
    "gpt-oss-20b": (known.GPT_OSS_20B, 12.8, 8, 49152, "arXiv:2508.10925 table 1"),
    "DeepSeek-V3": (known.DEEPSEEK_V3, 625.0, 3, 70272, "arXiv:2505.09343 table 1"),
    "Nemotron-H-8B": (known.NEMOTRON_H_8B, 15.1, 5, 16384, "arXiv:2504.03624: 4 of 52 layers attend"),
    "Qwen3-Next-80B": (public.QWEN3_NEXT_80B, 149.0, 5, 24576, "model card: 12 of 48 layers attend"),
    "bge-large": (public.BGE_LARGE, 0.62, 2, 0, "model card: 335M parameters"),
}


def spec_of(config: Any, name: str = "") -> ModelSpec:
    """State space models are counted by their tensors."""
    parameters = {"nemotron_h": 8_100_000_000, "falcon_mamba": 7_272_665_088}.get(config["model_type"])
    return read_spec(config, name=name, tensors={"all": Tensor("BF16", (parameters,), 0)} if parameters else None)


def on(config: Any, gib: float, **ask: Any) -> Fit:
    found = fit(spec_of(config), Ask(**ask), int(gib * GIB))
    assert found is not None
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_weights_and_kv_cache_of_public_models_are_what_was_published(name: str) -> None:
    config, weights_gib, percent, per_token, _ = PUBLIC[name]
    found = on(config, 80)
    assert found.weights_bytes / GIB == pytest.approx(weights_gib, rel=percent / 100)
    assert found.kv_bytes_per_token == per_token


def test_kv_cache_of_a_full_context_is_what_vllm_said() -> None:
    spec = spec_of(public.QWEN3_8B)
    assert kv_bytes(spec, Ask(), 40960, 2048) / GIB == pytest.approx(5.62, abs=0.01)


def test_activations_are_what_vllm_logged() -> None:
    found = on(known.LLAMA_8B, 79.22, sequences=256)
    assert found.activation_bytes / GIB == pytest.approx(1.26, rel=0.05)


def test_weights_are_counted_from_tensors_where_there_are_any() -> None:
    """An FP8 checkpoint says bfloat16 in its config; 32-bit weights are held in 16 bits."""
    tensors = {
        "a.weight": Tensor("F8_E4M3", (1024, 1024), 0),
        "a.scale": Tensor("F32", (1024,), 0),
        "lm_head.weight": Tensor("BF16", (1024, 1024), 0),
    }
    memory = read_spec({**public.QWEN3_8B, "tie_word_embeddings": True}, tensors=tensors).memory
    assert memory is not None
    assert memory.exact
    assert memory.weights_bytes == 1024 * 1024 + 1024 * 2
    assert memory.disk_bytes == 1024 * 1024 * 3 + 1024 * 4


def test_a_window_limits_what_is_kept() -> None:
    spec = spec_of(known.MISTRAL_7B)
    short, window, long = (kv_bytes(spec, Ask(), n, 2048) for n in (2048, 6143, 32768))
    assert short < window == long
    half = spec_of(known.GEMMA2_9B)  # every second layer
    assert kv_bytes(half, Ask(), 64000, 2048) > 30 * kv_bytes(half, Ask(), 2048, 2048) * 0.5


@pytest.mark.parametrize("said", [{}, {"layer_types": (["chunked_attention"] * 3 + ["full_attention"]) * 12}])
def test_layers_that_attend_in_chunks_keep_one_chunk(said: dict[str, Any]) -> None:
    """Every fourth layer sees everything: `no_rope_layer_interval` of the Llama4TextConfig of transformers."""
    spec = spec_of({**public.LLAMA4_SCOUT, **said})
    layer = 2 * 8 * 128 * 2
    assert kv_bytes(spec, Ask(), 4096, 2048) == 48 * 4096 * layer
    chunk = 8192 + 2048
    assert kv_bytes(spec, Ask(), 2**20, 2048) == 12 * 2**20 * layer + 36 * chunk * layer


def test_tensor_parallelism_divides_heads_down_to_one_and_never_latent_attention() -> None:
    two = on(known.LLAMA_8B, 24, tensor_parallel=2)
    assert two.kv_bytes_per_token == 131072 // 2
    assert two.weights_bytes / GIB == pytest.approx(7.48, abs=0.01)  # vLLM pull request 10511
    assert on(known.LLAMA_8B, 24, tensor_parallel=16).kv_bytes_per_token == 131072 // 8
    assert on(known.DEEPSEEK_V3, 141, tensor_parallel=8).kv_bytes_per_token == 70272


def test_pipeline_parallelism_divides_layers() -> None:
    assert on(known.LLAMA_8B, 24, pipeline_parallel=2).kv_bytes_per_token == 131072 // 2


def test_adapters_take_what_their_rank_says() -> None:
    assert on(known.LLAMA_8B, 24, lora_rank=16).adapter_bytes == pytest.approx(83.9e6, rel=0.01)
    assert on(known.LLAMA_8B, 24, lora_rank=64, loras=4).adapter_bytes == pytest.approx(16 * 83.9e6, rel=0.01)


def test_an_encoder_keeps_nothing() -> None:
    found = on(public.BGE_LARGE, 24)
    assert (found.kv_bytes, found.fits, found.largest_model_len) == (0, True, 512)


def test_state_space_layers_keep_the_same_however_long_the_text() -> None:
    spec = spec_of(known.FALCON_MAMBA)
    assert spec.memory is not None
    assert spec.memory.kv == []
    assert kv_bytes(spec, Ask(), 16, 2048) == kv_bytes(spec, Ask(), 100_000, 2048) > 10_000_000


@pytest.mark.parametrize(
    ("config", "gib", "ask", "fits", "largest"),
    [
        (known.QWEN3_1_7B, 24, {}, True, (40960, 40960)),
        (public.QWEN3_14B, 24, {}, False, (0, 0)),
        (public.QWEN3_14B, 24, {"tensor_parallel": 2}, True, (40960, 40960)),
        (public.LLAMA_70B, 80, {}, False, (0, 0)),
        (public.LLAMA_70B, 80, {"tensor_parallel": 2}, False, (10_000, 40_000)),
        (public.LLAMA_70B, 80, {"tensor_parallel": 4}, True, (131072, 131072)),
        (known.LLAMA_8B, 24, {}, False, (30_000, 50_000)),
        (known.LLAMA_8B, 24, {"max_model_len": 16384}, True, (30_000, 50_000)),
        (known.LLAMA_8B, 24, {"kv_value_bytes": 1}, False, (60_000, 100_000)),
        (known.LLAMA_8B, 80, {}, True, (131072, 131072)),
        (known.QWEN3_30B_A3B, 80, {}, True, (40960, 40960)),
        (known.QWEN3_30B_A3B, 48, {}, False, (0, 0)),
        (known.GPT_OSS_20B, 24, {}, True, (131072, 131072)),
        (public.QWEN3_EMBEDDING_8B, 24, {}, False, (20_000, 40_960)),
        (public.QWEN3_EMBEDDING_8B, 80, {"share_bytes": 30 * GIB}, True, (40960, 40960)),
        (public.QWEN3_EMBEDDING_8B, 80, {"share_bytes": 16 * GIB}, False, (0, 0)),
    ],
)
def test_what_fits_where(config: Any, gib: float, ask: Any, fits: bool, largest: tuple[int, int]) -> None:
    found = on(config, gib, **ask)
    assert found.fits == fits, found
    assert largest[0] <= found.largest_model_len <= largest[1], found.largest_model_len


def test_the_largest_length_fits_and_one_block_more_does_not() -> None:
    found = on(known.LLAMA_8B, 24)
    assert on(known.LLAMA_8B, 24, max_model_len=found.largest_model_len).fits
    assert not on(known.LLAMA_8B, 24, max_model_len=found.largest_model_len + 16).fits


def test_without_a_size_there_is_no_answer() -> None:
    assert read_spec(known.NEMOTRON_H_8B).memory is None
    assert fit(replace(spec_of(known.LLAMA_8B), memory=None), Ask(), 24 * GIB) is None
