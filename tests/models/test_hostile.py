"""Checkpoints that have what nobody expects: they are understood, or refused with a reason."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nimhost.entities import ModelSpec
from nimhost.errors import BadRequest
from nimhost.host.weights.source import Directory
from nimhost.host.weights.spec import describe_weights
from nimhost.layers import MoEConfig
from nimhost.models.checkpoint import read_spec
from nimhost.models.tensors import Tensor, parse_safetensors_header
from tests.models import test_checkpoint as known

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100,
}  # fmt: skip
MOE = {**PLAIN, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

ODD: dict[str, dict[str, Any]] = {
    "quantisation is a list": {"quantization_config": [1]},
    "quantisation group is text": {"quantization_config": {"config_groups": {"g": "x"}}},
    "quantisation groups are a list": {"quantization_config": {"config_groups": [1]}},
    "bits are text": {"quantization_config": {"bits": "four"}},
    "architecture is a number": {"architectures": 5},
    "layer types are a number": {"layer_types": 5},
    "pattern is a number": {"hybrid_override_pattern": 5},
    "heads differ in kind": {"num_attention_heads": {"a": 4}},
    "vocabulary is text": {"vocab_size": "x"},
    "width of experts is text": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": "wide"},
    "experts per token are text": {"num_experts": 8, "num_experts_per_tok": "two"},
    "every how many layers is text": {"num_experts": 8, "num_experts_per_tok": 2, "moe_layer_freq": "x"},
    "width is a yes": {"hidden_size": True},
    "width is half": {"hidden_size": 64.5},
    "context is text": {"max_position_embeddings": "many"},
    "context is endless": {"max_position_embeddings": float("inf")},
    "context is no number": {"max_position_embeddings": float("nan")},
    "width is beyond everything": {"hidden_size": 10**30},
    "layers without end": {"num_hidden_layers": 10**9, "attn_layer_period": 8, "mamba_d_state": 16},
    "more parameters than a number holds": {"hidden_size": 2**31, "vocab_size": 2**31, "intermediate_size": 2**31},
    "half a character": {"architectures": ["\ud800"]},
    "half a character as type": {"torch_dtype": "\ud800"},
}
FINE: dict[str, tuple[dict[str, Any], str, object]] = {
    "a whole number with a point": ({"max_position_embeddings": 4096.0}, "context_size", 4096),
    "a context below nothing": ({"max_position_embeddings": -1}, "context_size", None),
    "text part that is a list": ({"text_config": [1]}, "num_layers", 2),
    "one architecture, not in a list": ({"architectures": "Llama"}, "checkpoint_model_name", "Llama"),
    "no architectures": ({"architectures": []}, "checkpoint_model_name", ""),
    "heads per layer, all the same": ({"num_attention_heads": [4, 4]}, "num_attention_heads", 4),
    "heads for keys per layer, different": ({"num_key_value_heads": [1, 2]}, "num_kv_heads", 4),
    "widths per layer, different": ({"intermediate_size": [128, 256]}, "ffn_hidden_size", 128),
    "no widths at all": ({"intermediate_size": []}, "ffn_hidden_size", 256),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads", 0),
    "a family that is a number": ({"model_type": 7}, "family", "7"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_what_makes_no_sense_is_refused_with_a_reason(case: str) -> None:
    with pytest.raises(BadRequest, match=r"config\.json of the model (has no usable|cannot be understood)"):
        read_spec({**PLAIN, **ODD[case]})


@pytest.mark.parametrize("case", FINE)
def test_what_can_be_understood_is(case: str) -> None:
    changes, field, value = FINE[case]
    assert getattr(read_spec({**PLAIN, **changes}), field) == value


def test_experts_that_are_listed_layer_by_layer_are_one_number_where_they_are() -> None:
    """As Hunyuan-MoE has them."""
    alike = read_spec({**MOE, "moe_topk": [2, 2], "moe_intermediate_size": [32, 32], "num_experts_per_tok": None})
    expected = MoEConfig(num_experts=8, num_experts_per_tok=2, num_expert_layers=2, expert_ffn_size=32)
    assert alike.moe_config == expected
    differing = read_spec({**MOE, "moe_intermediate_size": [32, 64]})
    assert differing.moe_config == msgspec.structs.replace(expected, expert_ffn_size=None)


def test_a_limit_of_the_tokenizer_that_is_none_is_none() -> None:
    for said, length in (("4096", None), (True, None), (1e30, None), (4096.0, 4096), (float("inf"), None), (0, None)):
        assert read_spec(PLAIN, tokenizer_config={"model_max_length": said}).context_size == length


JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**70, 0.5, 3.0, -2.0, 1e30, float("inf"), float("nan"), "", "x",
    "32", "auto", "\ud800", [], [1], [1, 2], ["x"], [None], {}, {"a": 1}, [[]], {"weights": {"num_bits": "4"}},
]  # fmt: skip
CONFIGS = [
    value for name, value in vars(known).items() if name.isupper() and isinstance(value, dict) and name != "TABLE"
]
TENSORS = {"model.layers.0.q_proj.weight": Tensor("BF16", (64, 64), 0), "model.layers.²": Tensor("?", (0,), 0)}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_stands_there_a_spec_can_be_stored_and_read_again_or_there_is_a_reason(seed: int) -> None:
    dice = random.Random(seed)
    read = 0
    for _ in range(150):
        config = json.loads(json.dumps(dice.choice(CONFIGS)))
        part = config["text_config"] if "text_config" in config and dice.random() < 0.5 else config
        for field in dice.sample(sorted({*part, *dice.choice(CONFIGS)}), k=dice.randint(1, 3)):
            part[field] = dice.choice(JUNK)
        try:
            spec = read_spec(config, tensors=dice.choice([None, TENSORS]), tokenizer_config=dice.choice([None, config]))
        except BadRequest:
            continue
        read += 1
        assert msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec) == spec
    assert read > 10


def weights(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


TENSOR = b'{"w.weight": {"dtype": %s, "shape": %s, "data_offsets": %s}}'
HEADERS = {
    "shape of text": TENSOR % (b'"BF16"', b'["x"]', b"[0, 1]"),
    "shape with a point": TENSOR % (b'"BF16"', b"[4.0, 2]", b"[0, 1]"),
    "shape below nothing": TENSOR % (b'"BF16"', b"[-4, 2]", b"[0, 1]"),
    "shape beyond everything": TENSOR % (b'"BF16"', b"[9000000000000000, 2]", b"[0, 1]"),
    "huge numbers": TENSOR % (b'"BF16"', b"[1e30, 2]", b"[0, 1]"),
    "no type": TENSOR % (b"null", b"[2, 2]", b"[0, 1]"),
    "end is text": TENSOR % (b'"BF16"', b"[2, 2]", b'[0, "z"]'),
    "not UTF-8": b'{"\xff": {}}',
    "nested without end": b"[" * 90000,
    "a list": b"[1]",
    "tensor is a list": b'{"w": [1]}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_none_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match="not a safetensors header"):
        parse_safetensors_header(HEADERS[case])


FILES = {
    "config that nests without end": {"config.json": b"[" * 100000},
    "config in UTF-16": {"config.json": b"\xff\xfe{\x00"},
    "config that is a list": {"config.json": b"[1]"},
    "config that makes no sense": {"config.json": json.dumps({**PLAIN, "layer_types": 5}).encode()},
    "tokenizer that is a list": {"tokenizer_config.json": b"[1]"},
    "index that nests without end": {"model.safetensors.index.json": b"[" * 100000},
    "weights that are none": {"model.safetensors": b"\xff" * 64},
    **{case: {"model.safetensors": weights(header)} for case, header in HEADERS.items()},
}


@pytest.mark.parametrize("case", FILES)
async def test_files_that_make_no_sense_are_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    whole = weights(TENSOR % (b'"BF16"', b"[100, 64]", b"[0, 12800]"))
    for name, content in (
        {"config.json": json.dumps(PLAIN).encode(), "model.safetensors": whole} | FILES[case]
    ).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRequest):
        await describe_weights(Directory(tmp_path))
