"""What a checkpoint takes in GPU memory and on disk, from its config.json and its tensors. Pure.

How much attention layers keep of a token: https://docs.vllm.ai/en/stable/design/hybrid_kv_cache_manager/ (kinds of
layers, sliding windows), https://arxiv.org/abs/2405.04434 section 2.1.2 (multi-head latent attention keeps one
compressed vector and one rotary key), https://arxiv.org/abs/2405.21060 (state of Mamba-2 layers).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Protocol

from nimhost.layers import SlidingWindowConfig
from nimhost.sizes import KvLayers, MemorySpec

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of the types of safetensors; 8 for the others."""
HELD_BITS = {"F64": 16, "F32": 16}
"""Engines keep 32-bit weights in 16 bits: vLLM's `--dtype auto`."""
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "nomic_bert", "modernbert", "new", "electra")
"""Families that see the whole text at once and keep nothing for later tokens."""
WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "llama4_text": 4}
"""Families where every n-th layer sees everything and the others a window, unless config.json says otherwise."""
FULL = ("attention", "full_attention", "hybrid", "global")
GROUP_BITS = 0.25
"""What scales of groups add per weight to formats of 4 bits (16-bit scale per 64 to 128 weights, and zero points)."""


class SizedTensor(Protocol):
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Shape(Protocol):
    """A config.json with one word per thing, as `checkpoint` reads it."""

    family: str
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    vocab: int

    def first(self, *names: str) -> Any: ...
    def number(self, *names: str) -> int | None: ...
    def precision(self) -> str: ...
    def quantised_bits(self) -> int | None: ...
    def sliding_window(self) -> SlidingWindowConfig | None: ...
    def layer_kinds(self) -> list[str]: ...


def read_memory(
    shape: Shape, tensors: Mapping[str, SizedTensor] | None, parameters: int, tied: bool
) -> MemorySpec | None:
    """`parameters`: how many there are, for an estimate where `tensors` is None. None where no estimate is good:
    state space layers differ too much."""
    kinds = shape.layer_kinds()
    if not tensors and any("mamba" in kind for kind in kinds):
        return None
    weights_bytes, disk_bytes = _counted(tensors, tied) if tensors else _estimated(shape, parameters, tied)
    return MemorySpec(
        weights_bytes=weights_bytes,
        disk_bytes=disk_bytes,
        kv=_kv(shape, kinds),
        state_values=_state(shape, kinds),
        positions=_positions(shape),
        exact=bool(tensors),
    )


def _positions(shape: Shape) -> int:
    """As vLLM derives the longest context (`_get_and_verify_max_len`): scaled rotary embeddings stretch it, and
    `model_max_length` of a config.json overrides it. Llama 3's scaling is part of what its config says."""
    scaling = shape.first("rope_scaling", "rope_parameters") or {}
    plain = isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) in (None, "default", "llama3")
    if not plain or shape.first("model_max_length") is not None:
        return 0
    return shape.number("max_position_embeddings") or 0


def _counted(tensors: Mapping[str, SizedTensor], tied: bool) -> tuple[int, int]:
    held = disk = 0
    for name, tensor in tensors.items():
        values, bits = prod(tensor.shape), BITS.get(tensor.dtype, 8)
        disk += values * bits // 8
        if not (tied and name == "lm_head.weight"):  # it is the input embedding once more
            held += values * HELD_BITS.get(tensor.dtype, bits) // 8
    return held, disk


def _estimated(shape: Shape, parameters: int, tied: bool) -> tuple[int, int]:
    """Embeddings stay in 16 bits when the rest is quantised."""
    bits = shape.quantised_bits()
    if bits is None:
        return parameters * 2, parameters * (4 if shape.precision() == "float32" else 2)
    embeddings = min(parameters, shape.vocab * shape.hidden * (1 if tied else 2))
    packed = (parameters - embeddings) * (bits + (GROUP_BITS if bits < 8 else 0)) / 8
    total = int(packed) + embeddings * 2
    return total, total


# --- what is kept of the past --------------------------------------------------------------------------------------


def _kv(shape: Shape, kinds: list[str]) -> list[KvLayers]:
    if shape.family.removesuffix("_model") in ENCODERS:
        return []
    attention, windowed = _attention_layers(shape, kinds)
    attention = max(0, attention - (shape.number("num_kv_shared_layers") or 0))
    rank = shape.number("kv_lora_rank")
    if rank:  # multi-head latent attention: one vector for all heads
        return [KvLayers(layers=attention, values=rank + (shape.number("qk_rope_head_dim") or 0), heads=1)]
    key = shape.head_dim
    values = shape.kv_heads * (key + (shape.number("v_head_dim") or key))
    groups = [(attention - windowed, None), (windowed, _window(shape))]
    return [KvLayers(layers=n, values=values, heads=shape.kv_heads, window=size) for n, size in groups if n > 0]


def _window(shape: Shape) -> int | None:
    """Tokens that a layer with a window sees, or one that attends in chunks (Llama 4)."""
    sliding = shape.sliding_window()
    return sliding.window_size if sliding else shape.number("attention_chunk_size")


def _attention_layers(shape: Shape, kinds: list[str]) -> tuple[int, int]:
    """(layers with attention, those of them that see no more than a window)."""
    windowed = sum("sliding" in kind or "chunked" in kind for kind in kinds)
    if kinds:
        attention = windowed + sum(kind in FULL for kind in kinds)
        return attention, windowed if windowed else _patterned(shape, attention)
    return shape.layers, _patterned(shape, shape.layers)


def _patterned(shape: Shape, attention: int) -> int:
    if _window(shape) is None:
        return 0
    if first := shape.number("max_window_layers"):  # Qwen: the layers from here on
        return max(0, attention - first)
    pattern = shape.first("sliding_window_pattern", "_sliding_window_pattern") or WINDOW_PATTERNS.get(shape.family)
    return attention - attention // int(pattern) if isinstance(pattern, int) else attention


def _state(shape: Shape, kinds: list[str]) -> int:
    """Of all state space and linear attention layers."""
    mamba = sum("mamba" in kind or kind == "hybrid" for kind in kinds)
    linear = sum(kind == "linear_attention" for kind in kinds)
    kernel = shape.number("conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim") or 4
    return mamba * _mamba_state(shape, kernel) + linear * _linear_state(shape, kernel)


def _mamba_state(shape: Shape, kernel: int) -> int:
    heads, width = shape.number("mamba_num_heads", "mamba_n_heads"), _head_width(shape)
    expanded = (shape.number("expand", "mamba_expand") or 2) * shape.hidden
    inner = expanded if heads is None or width is None else heads * width
    state = shape.number("ssm_state_size", "mamba_d_state", "state_size") or 16
    groups = shape.number("n_groups", "mamba_n_groups") or 0
    return inner * state + (inner + 2 * groups * state) * (kernel - 1)


def _head_width(shape: Shape) -> int | None:
    """Some families say "auto"."""
    auto = shape.first("mamba_head_dim", "mamba_d_head") == "auto"
    return None if auto else shape.number("mamba_head_dim", "mamba_d_head")


def _linear_state(shape: Shape, kernel: int) -> int:
    """Gated delta rule (Qwen3-Next): a matrix per value head, and the last inputs of the convolution."""
    fields = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    key_heads, value_heads, key, value = (shape.number(name) or 0 for name in fields)
    return value_heads * key * value + (2 * key_heads * key + value_heads * value) * (kernel - 1)
