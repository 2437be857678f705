"""What a LoRA adapter is, and whether it can be put on a model: its adapter_config.json, its tensors, the model. Pure.

What is refused here is what vLLM refuses when it loads an adapter (`vllm/lora/peft_helper.py`, `lora_model.py`), known
earlier and in words that name the cause; NIM takes the same format
(https://docs.nvidia.com/nim/large-language-models/latest/peft.html). That an adapter is for another model is only said
where it is certain: shapes and layers that the model does not have, or names that cannot mean the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from msgspec import Struct

from nimhost.entities import Json, ModelSpec
from nimhost.models.tensors import Tensor

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
WEIGHTS = (SAFETENSORS, "adapter_model.bin", "adapter_model.pt")
"""The first of them that is there is the one that is loaded."""
MAX_RANK = 512
"""The largest that vLLM can be started for."""
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Ways to begin that leave the base model as it is."""
HEADS = ("classifier", "score")
FEATURES = {
    "use_dora": "it was trained with DoRA",
    "lora_bias": "its matrices have biases (lora_bias)",
    "alora_invocation_tokens": "it is an activated LoRA (aLoRA)",
    "layer_replication": "it replicates layers",
    "use_bdlora": "it is a block-diagonal LoRA",
    "use_qalora": "it was trained with QALoRA",
}
"""Settings that change what an adapter is, and that no engine takes."""
EMBEDDINGS = ("embed_tokens", "lm_head")
READS_HIDDEN = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")
WRITES_HIDDEN = ("o_proj", "down_proj")
FAMILIES = (
    "bloom", "command-r", "deepseek", "falcon", "gemma", "glm", "gpt-oss", "gpt2", "granite", "internlm", "llama",
    "mistral", "mixtral", "nemotron", "olmo", "opt", "phi", "qwen", "smollm", "starcoder", "vicuna",
)  # fmt: skip
_FAMILY = re.compile(rf"(?<![a-z])({'|'.join(FAMILIES)})(?![a-z])")
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.(?:default\.)?weight")
_LAYER = re.compile(r"layers\.(\d+)\.")
_OTHER_PARTS = re.compile(r"visi|visual|audio|speech|\.experts")
"""Of modules whose layers are counted apart, or that do not show their shapes."""


class Base(Struct, frozen=True, kw_only=True):
    """The model that an adapter is for."""

    name: str
    spec: ModelSpec | None = None
    repo_id: str | None = None
    """Where on a hub it is from."""


class Flaw(Struct, frozen=True, kw_only=True):
    """Why an adapter cannot be loaded. `missing`: something is not there (yet); else it is wrong."""

    message: str
    missing: bool = False


def find_flaw(
    names: Collection[str], config: Json | None, tensors: Mapping[str, Tensor] | None, base: Base
) -> Flaw | None:
    """The first thing that keeps these files from being an adapter of that model; None when nothing is known to.

    `config`: of adapter_config.json. `tensors`: of adapter_model.safetensors; None where the weights are another file.
    """
    return (
        _lacking(names)
        or _misconfigured(config or {})
        or _of_another_name(config or {}, base)
        or (_misshapen(tensors, config or {}, base) if tensors is not None else None)
    )


def rank_of(config: Json) -> int:
    """The largest rank in it; 0 where it says none."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max([rank for rank in ranks if isinstance(rank, int)], default=0)


def weights_file(names: Collection[str]) -> str | None:
    return next((name for name in WEIGHTS if name in names), None)


# --- files and settings --------------------------------------------------------------------------------------------


def _lacking(names: Collection[str]) -> Flaw | None:
    if CONFIG not in names:
        if "config.json" in names:
            return Flaw(message="it holds a whole model, not an adapter: deploy it as a model of its own")
        if any(name.endswith(".nemo") for name in names):
            return Flaw(message="it holds a NeMo archive; export it in the Hugging Face format first")
        return Flaw(message=f"it has no {CONFIG}", missing=True)
    if weights_file(names) is None:
        return Flaw(message=f"it has no {SAFETENSORS} (nor adapter_model.bin)", missing=True)
    return None


def _misconfigured(config: Json) -> Flaw | None:
    kind = config.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        return Flaw(message=f"{CONFIG} says peft_type {kind}; engines load LORA only")
    return _incomplete(config) or _unsupported(config)


def _incomplete(config: Json) -> Flaw | None:
    for field in ("r", "lora_alpha", "target_modules"):
        if not config.get(field):
            return Flaw(message=f"{CONFIG} has no '{field}'", missing=True)
    if not isinstance(config["r"], int) or rank_of(config) < 1:
        return Flaw(message=f"{CONFIG} says r {config['r']!r}; the rank is a positive whole number")
    if rank_of(config) > MAX_RANK:
        return Flaw(message=f"its rank is {rank_of(config)}; engines take {MAX_RANK} at most")
    return None


def _unsupported(config: Json) -> Flaw | None:
    said = [words for field, words in FEATURES.items() if config.get(field)]
    if config.get("bias", "none") != "none":
        said.append(f"it changes biases (bias: {config['bias']})")
    saved = [name for name in _listed(config.get("modules_to_save")) if name not in HEADS]
    if saved:
        said.append(f"it replaces whole modules (modules_to_save: {', '.join(map(str, saved))})")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in INITS:
        said.append(f"its training changed the base model (init_lora_weights: {init}); convert it to a plain LoRA")
    return Flaw(message=f"engines cannot load it: {'; '.join(said)}") if said else None


def _listed(value: Any) -> list[Any]:
    """What stands where a list should: itself, or the one thing."""
    return value if isinstance(value, list) else [value] if value else []


# --- the model -----------------------------------------------------------------------------------------------------


def _of_another_name(config: Json, base: Base) -> Flaw | None:
    trained_on = config.get("base_model_name_or_path")
    if not isinstance(trained_on, str) or base.repo_id is None or not _HUB_ID.fullmatch(trained_on):
        return None  # a directory on somebody's machine, or nothing: it may well be this one
    if not are_different(trained_on, base.repo_id):
        return None
    return Flaw(message=f"it was trained for {trained_on}, and {base.name} is {base.repo_id}")


def are_different(one: str, other: str) -> bool:
    """Whether two repositories cannot hold the same model under two names: their families or their sizes differ.

    Copies, conversions, chat and base versions of a model have other names and the same shapes: they are not.
    """
    for pattern in (_FAMILY, _SIZE):
        first, second = (set(pattern.findall(name.lower())) for name in (one, other))
        if first and second and not first & second:
            return True
    return False


def _misshapen(tensors: Mapping[str, Tensor], config: Json, base: Base) -> Flaw | None:
    found = list(_matrices(tensors))
    if not found:
        return Flaw(message=f"{SAFETENSORS} holds no LoRA matrices (lora_A, lora_B)")
    rank = rank_of(config)
    for module, side, tensor in found:
        if len(tensor.shape) == 2 and tensor.shape[0 if side == "A" else 1] > rank:
            size = tensor.shape[0 if side == "A" else 1]
            return Flaw(message=f"{module} has rank {size} in {SAFETENSORS}, but {CONFIG} says {rank}", missing=True)
    if base.spec is None:
        return None
    modules = _Modules(base.spec)
    problem = next((p for module, side, tensor in found if (p := modules.problem(module, side, tensor))), None)
    return Flaw(message=f"it is not for {base.name}: {problem}") if problem else None


def _matrices(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    for name, tensor in tensors.items():
        if match := _TENSOR.fullmatch(name):
            yield match["module"], match["side"], tensor


class _Modules:
    """What a model has to put adapters on."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        layers = spec.linear_layers or []
        self._layers = {_place(layer.name): layer for layer in layers if not _OTHER_PARTS.search(layer.name)}
        whole = len(layers) >= 4 * spec.num_layers  # packed layers do not show; then nothing is said about names
        self._kinds = {layer.name.rpartition(".")[2] for layer in layers} if whole else set()

    def problem(self, module: str, side: str, tensor: Tensor) -> str | None:
        kind = module.rpartition(".")[2]
        if _OTHER_PARTS.search(module) or kind in EMBEDDINGS or len(tensor.shape) != 2:
            return None
        number = _LAYER.search(module)
        if number and int(number[1]) >= self._spec.num_layers:
            return f"it changes layer {number[1]}, and the model has {self._spec.num_layers} layers"
        if self._kinds and kind not in self._kinds:
            return f"it changes {kind}, which the model does not have ({', '.join(sorted(self._kinds))})"
        wanted = self._size(module, kind, side)
        size = tensor.shape[1 if side == "A" else 0]
        if wanted is None or size == wanted:
            return None
        return f"{module} {'takes' if side == 'A' else 'gives'} {size} values, and the model's {wanted}"

    def _size(self, module: str, kind: str, side: str) -> int | None:
        """Inputs of a layer (for its A) or its outputs (for its B); None where that is not known."""
        if layer := self._layers.get(_place(module)):
            return layer.in_features if side == "A" else layer.out_features
        plain = READS_HIDDEN if side == "A" else WRITES_HIDDEN
        return self._spec.hidden_size if kind in plain and _LAYER.search(module) and not self._layers else None


def _place(module: str) -> str:
    """From the layer on: what is before it differs between the versions of a library."""
    at = _LAYER.search(module)
    return module[at.start() :] if at else module
