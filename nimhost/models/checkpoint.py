"""What a checkpoint is: its config.json and the headers of its safetensors files, as a ModelSpec. Pure.

Field names differ between families of models; the tables here follow the `transformers` configuration classes and the
contract of the reference platform. Quantised weights count as the parameters they stand for, not as they are packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from nimhost.entities import Json, ModelSpec
from nimhost.errors import BadRequest
from nimhost.layers import MambaConfig, MoEConfig, SlidingWindowConfig
from nimhost.models.footprint import read_memory
from nimhost.models.tensors import MAX_PARAMETERS, Tensor, count_parameters, linear_layers


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
MAX_NUMBER = 2**31
MAX_LAYERS = 10_000
_NONSENSE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What reading raises where a config.json has something else than anybody expects there."""


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
    lacks what every transformer has, or has what cannot be understood: anything may stand in it.
    """
    try:
        spec = _read_spec(config, name, tokenizer_config, chat_template, tensors)
        return msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec)  # nothing else checks the types
    except _NONSENSE as error:
        raise BadRequest(
            f"config.json of the model cannot be understood: {str(error)[:200]}", "Compare it with the published one."
        ) from error


def _read_spec(
    config: Json,
    name: str,
    tokenizer_config: Json | None,
    chat_template: str | None,
    tensors: Mapping[str, Tensor] | None,
) -> ModelSpec:
    shape = _Shape(config)
    tied = shape.tied(tensors)
    exact = count_parameters(tensors, shape.quantised_bits(), tied=tied) if tensors else None
    parameters = exact or shape.parameters(tied)
    if not 0 < parameters <= MAX_PARAMETERS:
        raise ValueError(f"it would have {parameters} parameters")
    return ModelSpec(
        checkpoint_model_name=shape.architecture,
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
        context_size=shape.number(*CONTEXT) or _length(tokenizer_config),
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
    said = isinstance(length, int | float) and not isinstance(length, bool) and 1 <= length < 1 << 30
    return int(length) if said else None  # type: ignore[arg-type]


def _whole(value: Any) -> int | None:
    """The whole number that is meant; None for a list of different ones (one per layer), and for less than nothing.

    Raises ValueError for what is no number.
    """
    if isinstance(value, list):
        return _whole(value[0]) if value and all(other == value[0] for other in value) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value > MAX_NUMBER:
        raise ValueError(f"{str(value)[:80]!r} is not a whole number that could stand there")
    return value if value >= 0 else None


class _Shape:
    """A config.json with one word per thing."""

    def __init__(self, config: Json) -> None:
        self.config = config
        self.text: Json = next((config[part] for part in TEXT_PARTS if isinstance(config.get(part), dict)), config)
        self.family = str(self.text.get("model_type") or config.get("model_type") or "").lower()
        self.layers = self.need(*LAYERS)
        self.hidden = self.need(*HIDDEN)
        if self.layers > MAX_LAYERS:
            raise ValueError(f"no model has {self.layers} layers")
        self.heads = self.number(*HEADS) or 0
        self.kv_heads = self.number(*KV_HEADS) or (1 if self.first("multi_query") else self.heads)
        self.ffn = self._ffn()
        self.vocab = self.number("vocab_size") or 50257
        self.head_dim = self.number("head_dim") or (self.hidden // self.heads if self.heads else 0)
        self.gated = self.family not in PLAIN_MLP and "relu" not in str(self.first(*ACTIVATION) or "").lower()
        self.moe = self._moe()

    def first(self, *names: str) -> Any:
        """The first of these fields that has a value: in the text part, then outside, then the family's default."""
        return self._named(*names)[1]

    def number(self, *names: str) -> int | None:
        """The same as a whole number; None where there is none. Raises BadRequest, naming the field."""
        name, value = self._named(*names)
        try:
            return None if value is None else _whole(value)
        except ValueError as error:
            raise BadRequest(f"config.json of the model has no usable {name}: {error}") from error

    def _named(self, *names: str) -> tuple[str, Any]:
        places = (self.text, self.config, DEFAULTS.get(self.family, {}))
        found = ((name, part[name]) for part in places for name in names if part.get(name) is not None)
        return next(found, (names[0], None))

    def need(self, *names: str) -> int:
        if value := self.number(*names):
            return value
        raise BadRequest(f"config.json of the model has no usable {names[0]}", "Only language models can be deployed.")

    @property
    def architecture(self) -> str:
        """The first that is named, "" for none."""
        named = self.config.get("architectures") or self.text.get("architectures") or [""]
        return named if isinstance(named, str) else str(named[0])

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
        said = quantisation.get("bits") or next((g["weights"]["num_bits"] for g in groups if g.get("weights")), None)
        bits = None if said is None else _whole(said)
        method = f"{quantisation.get('quant_method')} {quantisation.get('quant_algo')}".lower()
        if bits is None and (quantisation.get("load_in_4bit") or "fp4" in method):
            return 4
        return 8 if bits is None and ("fp8" in method or quantisation.get("load_in_8bit")) else bits

    @property
    def embeds(self) -> bool:
        """A bare encoder, or an architecture that says so. Decoders that embed are only told by their names."""
        bare = self.architecture.endswith("Model") and any(word in self.family for word in ENCODERS)
        return bare or self.architecture.endswith(("EmbeddingModel", "ForTextEncoding"))

    def sliding_window(self) -> SlidingWindowConfig | None:
        window = None if self.first("use_sliding_window") is False else self.number("sliding_window")
        if window is None or window >= (self.number(*CONTEXT) or window + 1):
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
            state_size=self.number("ssm_state_size", "mamba_d_state", "state_size") or 16,
            conv_kernel=self.number("conv_kernel", "mamba_d_conv") or 4,
        )

    def layer_kinds(self) -> list[str]:
        letters = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
        if pattern := self.first("hybrid_override_pattern"):
            return [letters.get(letter, letter) for letter in pattern]
        if kinds := self.first("layers_block_type", "layer_types"):
            return [str(kind) for kind in kinds]
        if "mamba" in self.family:
            return ["mamba"] * self.layers
        period, offset = self.number("attn_layer_period"), self.number("attn_layer_offset")
        if period and self.first("mamba_d_state"):
            return ["attention" if layer % period == offset else "mamba" for layer in range(self.layers)]
        return []

    def _ffn(self) -> int:
        size = self.first(*FFN)
        if isinstance(size, list) and size:  # one per layer: the first stands for all of them
            return _whole(size[0]) or 4 * self.hidden
        return self.number(*FFN) or 4 * self.hidden

    def _moe(self) -> MoEConfig | None:
        experts, per_token = self.number(*EXPERTS) or 0, self.number(*EXPERTS_PER_TOKEN)
        if experts <= 1 or not per_token:
            return None
        return MoEConfig(
            num_experts=experts,
            num_experts_per_tok=per_token,
            num_expert_layers=self._expert_layers(),
            expert_ffn_size=self.number("moe_intermediate_size", "expert_ffn_hidden_size"),
            num_shared_experts=self.number("n_shared_experts", "num_shared_experts")
            or int(bool(self.first("shared_expert_intermediate_size"))),
        )

    def _expert_layers(self) -> int:
        if pattern := self.first("hybrid_override_pattern"):
            return int(pattern.count("E"))
        period = ("moe_layer_freq", "decoder_sparse_step", "expert_layer_period")
        if isinstance(which := self.first(*period), list):
            return sum(map(bool, which))
        dense = (self.number("first_k_dense_replace") or 0) + len(self.first("mlp_only_layers") or [])
        return max(0, self.layers - dense) // (self.number(*period) or 1)

    def parameters(self, tied: bool) -> int:
        """The closed formula: per layer attention, MLP or experts, two norms; then embeddings and the last norm."""
        d, matrices = self.hidden, 3 if self.gated else 2
        total = self.layers * (self._attention() + 2 * d) + self.vocab * d * (1 if tied else 2) + d
        if self.moe is None:
            return total + self.layers * matrices * d * self.ffn
        moe, expert = self.moe, matrices * d * (self.moe.expert_ffn_size or self.ffn)
        shared = matrices * d * (self.number("shared_expert_intermediate_size") or 0) or moe.num_shared_experts * expert
        total += moe.num_expert_layers * (d * moe.num_experts + moe.num_experts * expert + shared)
        return total + (self.layers - moe.num_expert_layers) * matrices * d * self.ffn

    def _attention(self) -> int:
        d, heads = self.hidden, self.heads
        rank = self.number("kv_lora_rank")
        if not rank:
            return 2 * d * heads * self.head_dim + 2 * d * self.kv_heads * self.head_dim
        # Multi-head latent attention (DeepSeek): queries and keys/values pass through narrow matrices.
        rope, nope, value = (self.number(n) or 0 for n in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        narrow = self.number("q_lora_rank")
        queries = (d + heads * (rope + nope)) * narrow if narrow else d * heads * (rope + nope)
        return queries + d * (rank + rope) + rank * heads * (nope + value) + heads * value * d
