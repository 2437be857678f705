"""What a checkpoint is: its config.json and the headers of its safetensors files, as a ModelSpec. Pure.

Field names differ between families of models; the tables here follow the `transformers` configuration classes and the
contract of the reference platform. Quantised weights count as the parameters they stand for, not as they are packed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from msgspec import Struct

from nimhost.entities import Json, LinearLayerSpec, MambaConfig, ModelSpec, MoEConfig, SlidingWindowConfig
from nimhost.errors import BadRequest
from nimhost.models.footprint import read_memory

# --- safetensors ---------------------------------------------------------------------------------------------------

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""


class Tensor(Struct, frozen=True):
    dtype: str
    """As safetensors writes it: `BF16`, `F8_E4M3`, `I32`..."""
    shape: tuple[int, ...]
    end: int
    """Offset of its end, counted from the end of the header."""


def header_length(first_bytes: bytes) -> int:
    """How many bytes of JSON follow the first eight of a safetensors file. Raises ValueError if it is none."""
    length = int.from_bytes(first_bytes[:8], "little")
    if len(first_bytes) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError("it does not begin with the length of a header")
    return length


def parse_safetensors_header(header: bytes) -> dict[str, Tensor]:
    """The tensors by name. Raises ValueError for anything but a safetensors header."""
    try:
        return {
            name: Tensor(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1])
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a safetensors header: {error!r}") from error


def weights_end(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that follow the header in a whole file."""
    return max((tensor.end for tensor in tensors.values()), default=0)


def is_weights_dir(names: Iterable[str]) -> str | None:
    """What keeps a directory with these files (paths relative to it) from being deployed; None if nothing does."""
    there = {name.removeprefix("alternates/hf/") for name in names}
    if "config.json" not in there:
        if "adapter_config.json" in there:
            return "it holds a LoRA adapter, not a model: register it as an adapter of the model it was trained for"
        return "it has no config.json"
    if not any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) for name in there):
        return "it has no weights (*.safetensors or *.bin)"
    return None


# --- config.json ---------------------------------------------------------------------------------------------------

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
FFN = ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")
CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
ACTIVATION = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts")
TEXT_PARTS = ("text_config", "llm_config", "language_config")
PLAIN_MLP = {
    "bert", "bloom", "distilbert", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "nemotron",
    "nemotron_h", "opt", "phi", "roberta", "starcoder2", "xlm-roberta",
}  # fmt: skip
"""Families whose MLP has no gate although their activation may be one that others use with a gate."""
TIED = ("gemma", "gpt2", "bert", "roberta", "xlm-roberta", "distilbert", "opt", "bloom", "starcoder2", "command-r")
"""Families (by prefix) that share input and output embeddings unless config.json says otherwise."""
ENCODERS = ("bert", "mpnet", "electra")
"""Parts of the names of families that read both ways."""
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Families whose linear layers are stored transposed (transformers' `Conv1D`)."""
DEFAULTS: dict[str, Json] = {
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip
"""What published checkpoints of a family leave to the defaults of `transformers`."""


def read_spec(
    config: Json,
    *,
    name: str = "",
    tokenizer_config: Json | None = None,
    chat_template: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> ModelSpec:
    """The ModelSpec of a checkpoint.

    `config`: its config.json. `name`: of the entity or the repository, which tells embedding models. `chat_template`:
    of a file of its own, for models that have none in `tokenizer_config`. `tensors`: of all its safetensors files;
    with them the number of parameters is exact, else it is the closed formula. Raises BadRequest when the config
    lacks what every transformer has.
    """
    shape = _Shape(config)
    tied = shape.tied(tensors)
    exact = count_parameters(tensors, shape.quantised_bits(), tied=tied) if tensors else None
    parameters = exact or shape.parameters(tied)
    return ModelSpec(
        checkpoint_model_name=next(iter(config.get("architectures") or shape.text.get("architectures") or []), ""),
        family=str(config.get("model_type") or shape.family).lower(),
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        ffn_hidden_size=shape.ffn,
        vocab_size=shape.vocab,
        tied_embeddings=tied,
        gated_mlp=shape.gated,
        base_num_parameters=parameters,
        precision=shape.precision(),
        context_size=shape.first(*CONTEXT) or _length(tokenizer_config),
        is_chat=bool(chat_template or (tokenizer_config or {}).get("chat_template")),
        is_embedding_model="embed" in name.lower() or shape.embeds,
        moe_config=shape.moe,
        mamba_config=shape.mamba(),
        sliding_window_config=shape.sliding_window(),
        linear_layers=linear_layers(tensors, transposed=shape.family in CONV1D) if tensors else None,
        memory=read_memory(shape, tensors, parameters, tied),
    )


def _length(tokenizer_config: Json | None) -> int | None:
    """The tokenizer's longest input, unless it is the "unlimited" of `transformers` (1e30)."""
    length = (tokenizer_config or {}).get("model_max_length")
    return length if isinstance(length, int) and length < 1 << 30 else None


class _Shape:
    """A config.json with one word per thing."""

    def __init__(self, config: Json) -> None:
        self.config = config
        self.text: Json = next((config[part] for part in TEXT_PARTS if isinstance(config.get(part), dict)), config)
        self.family = str(self.text.get("model_type") or config.get("model_type") or "").lower()
        self.layers = self.need(*LAYERS)
        self.hidden = self.need(*HIDDEN)
        self.heads = int(self.first(*HEADS) or 0)
        self.kv_heads = int(self.first(*KV_HEADS) or (1 if self.first("multi_query") else self.heads))
        self.ffn = self._ffn()
        self.vocab = int(self.first("vocab_size") or 50257)
        self.head_dim = int(self.first("head_dim") or (self.hidden // self.heads if self.heads else 0))
        self.gated = self.family not in PLAIN_MLP and "relu" not in str(self.first(*ACTIVATION) or "").lower()
        self.moe = self._moe()

    def first(self, *names: str) -> Any:
        """The first of these fields that has a value: in the text part, then outside, then the family's default."""
        places = (self.text, self.config, DEFAULTS.get(self.family, {}))
        return next((part[name] for part in places for name in names if part.get(name) is not None), None)

    def need(self, *names: str) -> int:
        value = self.first(*names)
        if isinstance(value, int) and value > 0:
            return value
        raise BadRequest(f"config.json of the model has no usable {names[0]}", "Only language models can be deployed.")

    def tied(self, tensors: Mapping[str, Tensor] | None) -> bool:
        stated = self.first("tie_word_embeddings")
        if stated is None and tensors:
            return not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in tensors)
        return self.family.startswith(TIED) if stated is None else bool(stated)

    def precision(self) -> str:
        dtype, bits = self.first("torch_dtype", "dtype"), self.quantised_bits()
        return str(dtype).removeprefix("torch.") if dtype else f"int{bits}" if bits else "float32"

    def quantised_bits(self) -> int | None:
        """Bits per weight where the checkpoint is quantised, None where it is not."""
        quantisation = self.first("quantization_config", "compression_config") or {}
        groups = (quantisation.get("config_groups") or {}).values()
        bits = quantisation.get("bits") or next((g["weights"]["num_bits"] for g in groups if g.get("weights")), None)
        method = f"{quantisation.get('quant_method')} {quantisation.get('quant_algo')}".lower()
        if bits is None and (quantisation.get("load_in_4bit") or "fp4" in method):
            return 4
        return 8 if bits is None and ("fp8" in method or quantisation.get("load_in_8bit")) else bits

    @property
    def embeds(self) -> bool:
        """A bare encoder, or an architecture that says so. Decoders that embed are only told by their names."""
        architecture = next(iter(self.config.get("architectures") or []), "")
        bare = architecture.endswith("Model") and any(word in self.family for word in ENCODERS)
        return bare or architecture.endswith(("EmbeddingModel", "ForTextEncoding"))

    def sliding_window(self) -> SlidingWindowConfig | None:
        window = self.first("sliding_window")
        off = self.first("use_sliding_window") is False
        if off or not isinstance(window, int) or window >= (self.first(*CONTEXT) or window + 1):
            return None
        return SlidingWindowConfig(window_size=window)

    def mamba(self) -> MambaConfig | None:
        kinds = self.layer_kinds()
        mambas = sum("mamba" in kind for kind in kinds)
        if not mambas:
            return None
        attentions = sum(kind in ("attention", "full_attention", "hybrid") for kind in kinds)
        return MambaConfig(
            is_hybrid=mambas < len(kinds) or attentions > 0,
            num_mamba_layers=mambas,
            num_attention_layers=attentions,
            num_mlp_layers=sum(kind in ("mlp", "moe") for kind in kinds),
            state_size=self.first("ssm_state_size", "mamba_d_state", "state_size") or 16,
            conv_kernel=self.first("conv_kernel", "mamba_d_conv") or 4,
        )

    def layer_kinds(self) -> list[str]:
        letters = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
        if pattern := self.first("hybrid_override_pattern"):
            return [letters.get(letter, letter) for letter in pattern]
        if kinds := self.first("layers_block_type", "layer_types"):
            return [str(kind) for kind in kinds]
        if "mamba" in self.family:
            return ["mamba"] * self.layers
        period, offset = self.first("attn_layer_period"), self.first("attn_layer_offset")
        if period and self.first("mamba_d_state"):
            return ["attention" if layer % period == offset else "mamba" for layer in range(self.layers)]
        return []

    def _ffn(self) -> int:
        size = self.first(*FFN)
        return int(size[0] if isinstance(size, list) else size or 4 * self.hidden)

    def _moe(self) -> MoEConfig | None:
        experts, per_token = self.first(*EXPERTS), self.first(*EXPERTS_PER_TOKEN)
        if not isinstance(experts, int) or experts <= 1 or not per_token:
            return None
        return MoEConfig(
            num_experts=experts,
            num_experts_per_tok=per_token,
            num_expert_layers=self._expert_layers(),
            expert_ffn_size=self.first("moe_intermediate_size", "expert_ffn_hidden_size"),
            num_shared_experts=self.first("n_shared_experts", "num_shared_experts")
            or int(bool(self.first("shared_expert_intermediate_size"))),
        )

    def _expert_layers(self) -> int:
        if pattern := self.first("hybrid_override_pattern"):
            return int(pattern.count("E"))
        frequency = self.first("moe_layer_freq", "decoder_sparse_step", "expert_layer_period") or 1
        if isinstance(frequency, list):
            return sum(map(bool, frequency))
        dense = (self.first("first_k_dense_replace") or 0) + len(self.first("mlp_only_layers") or [])
        return int((self.layers - dense) // frequency)

    def parameters(self, tied: bool) -> int:
        """The closed formula: per layer attention, MLP or experts, two norms; then embeddings and the last norm."""
        d, matrices = self.hidden, 3 if self.gated else 2
        total = self.layers * (self._attention() + 2 * d) + self.vocab * d * (1 if tied else 2) + d
        if self.moe is None:
            return total + self.layers * matrices * d * self.ffn
        moe, expert = self.moe, matrices * d * (self.moe.expert_ffn_size or self.ffn)
        shared = matrices * d * (self.first("shared_expert_intermediate_size") or 0) or moe.num_shared_experts * expert
        total += moe.num_expert_layers * (d * moe.num_experts + moe.num_experts * expert + shared)
        return total + (self.layers - moe.num_expert_layers) * matrices * d * self.ffn

    def _attention(self) -> int:
        d, heads = self.hidden, self.heads
        rank = self.first("kv_lora_rank")
        if not rank:
            return 2 * d * heads * self.head_dim + 2 * d * self.kv_heads * self.head_dim
        # Multi-head latent attention (DeepSeek): queries and keys/values pass through narrow matrices.
        rope, nope, value = (self.first(n) for n in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        narrow = self.first("q_lora_rank")
        queries = (d + heads * (rope + nope)) * narrow if narrow else d * heads * (rope + nope)
        return int(queries + d * (rank + rope) + rank * heads * (nope + value) + heads * value * d)


# --- tensors ------------------------------------------------------------------------------------------------------

NOT_WEIGHTS = (
    "scales", "_scale", "_scale_inv", "_scale_2", "qzeros", "zero_point", "g_idx", "weight_shape", "inv_freq",
    "absmax", "quant_map", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4", "position_ids",
)  # fmt: skip
"""Ends of names of what quantisation and buffers add to the real parameters."""
PACKED = {"I32": 32, "U8": 8}
"""Types that quantised checkpoints pack several weights into, and their bits."""


def count_parameters(tensors: Mapping[str, Tensor], bits: int | None, *, tied: bool = False) -> int:
    """How many parameters the tensors stand for. `bits` per weight where they are quantised."""
    total = 0
    for name, tensor in tensors.items():
        if name.endswith(NOT_WEIGHTS) or (tied and name == "lm_head.weight"):
            continue
        packed = PACKED.get(tensor.dtype, 0) // bits if bits else 1
        total += prod(tensor.shape) * max(1, packed)
    return total


PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8")
"""Types that are not packed: the tensor has the shape of the layer."""
NOT_LINEAR = ("embed", "wte", "wpe", "norm", "conv1d", "relative_attention_bias")


def linear_layers(tensors: Mapping[str, Tensor], *, transposed: bool = False) -> list[LinearLayerSpec]:
    """The linear layers with their dimensions, in the order of their names.

    Not among them: experts (adapters are not made for them, and there are tens of thousands), and layers whose weights
    are packed, which do not show their shape.
    """
    layers = []
    for name, tensor in sorted(tensors.items(), key=lambda item: _natural(item[0])):
        module = name.removesuffix(".weight")
        plain = tensor.dtype in PLAIN and len(tensor.shape) == 2 and module != name
        if plain and ".experts." not in name and not any(word in name.lower() for word in NOT_LINEAR):
            out_features, in_features = tensor.shape[::-1] if transposed and "lm_head" not in name else tensor.shape
            layers.append(LinearLayerSpec(name=module, in_features=in_features, out_features=out_features))
    return layers


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
