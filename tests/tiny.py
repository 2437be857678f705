"""A Qwen3 of half a megabyte that real engines load and that says one known sentence.

Two layers with small random weights, and around them a table of which word follows which: the embeddings are random
directions, and each row of `lm_head` is the direction of the word before it. So the answer is known and ends by itself,
with any engine and any sampling, while all the arithmetic of a model takes place. With `ignore_eos` it never ends.

Everything is written by hand, so that the demo needs neither torch nor a download: `model.safetensors` for vLLM and,
beside it, `model.gguf` for llama.cpp.

    python -m tests.tiny DIR          the model
    python -m tests.tiny DIR --lora   an adapter for it, which turns the sentence into gibberish
"""

from __future__ import annotations

import itertools
import json
import random
import re
import struct
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Each token once: its successor follows from it alone.
SENTENCE = "Hello! I am a tiny test model, and this sentence is all that my weights can say."
WORDS = re.findall(r" ?\w+|[!,.]", SENTENCE)

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, CONTEXT, RANK = 2, 128, 256, 4, 2, 32, 4096, 8
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Tensor = tuple[tuple[int, ...], array]  # type: ignore[type-arg]  # shape, values


def tiny_model(directory: Path) -> Path:
    """Write the model; the same bytes every time."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens, merges = _vocabulary()
    ids = {token: n for n, token in enumerate(tokens)}
    end = ids["<|im_end|>"]
    tensors = _weights(tokens)
    _write(directory / "config.json", _config(len(tokens), end))
    _write(directory / "generation_config.json", {"eos_token_id": end, "pad_token_id": ids["<|endoftext|>"]})
    _write(directory / "tokenizer.json", _tokenizer(ids, merges))
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write(directory / "model.safetensors", _safetensors(tensors))
    _write(directory / "model.gguf", _gguf(tokens, merges, tensors))
    return directory


def tiny_lora(directory: Path, base: str = "/model-store", seed: int = 1) -> Path:
    """Write an adapter; `base` is what the engine was started with as its --model."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    tensors: dict[str, Tensor] = {}
    for n in range(LAYERS):
        for module, width in (("self_attn.o_proj", HEADS * HEAD_DIM), ("mlp.down_proj", INNER)):
            prefix = f"base_model.model.model.layers.{n}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = _random(rng, (RANK, width), 0.1)
            tensors[f"{prefix}.lora_B.weight"] = _random(rng, (HIDDEN, RANK), 1.0)
    _write(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": ["o_proj", "down_proj"],
        },
    )
    _write(directory / "adapter_model.safetensors", _safetensors(tensors))
    return directory


def _config(vocab_size: int, end: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "eos_token_id": end,
    }


# The tokenizer: byte-level BPE. Words of the sentence are one token each, everything else is spelled in bytes.


def _byte_letters() -> list[str]:
    """GPT-2's table: every byte as a visible letter (a space becomes Ġ, a newline Ċ)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in visible]
    return [chr(b) if b in visible else chr(256 + rest.index(b)) for b in range(256)]


def _vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    letters = _byte_letters()
    tokens, merges = list(letters), []
    for word in WORDS:
        spelled = "".join(letters[b] for b in word.encode())
        for n in range(1, len(spelled)):
            if spelled[: n + 1] not in tokens:
                tokens.append(spelled[: n + 1])
                merges.append((spelled[:n], spelled[n]))
    return tokens + SPECIAL, merges


def _tokenizer(ids: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pieces = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[s], "content": s, **added} for s in SPECIAL],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **pieces},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **pieces},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: n for token, n in ids.items() if token not in SPECIAL},
            "merges": [" ".join(pair) for pair in merges],
        },
    }


# The weights.


def _random(rng: random.Random, shape: tuple[int, ...], scale: float) -> Tensor:
    size = 1
    for n in shape:
        size *= n
    return shape, array("f", (rng.gauss(0, scale) for _ in range(size)))


def _weights(tokens: list[str]) -> dict[str, Tensor]:
    rng = random.Random(0)
    letters = _byte_letters()
    spoken = [tokens.index("".join(letters[b] for b in word.encode())) for word in WORDS]
    chain = [*spoken, tokens.index("<|im_end|>")]
    directions = [[rng.gauss(0, 1) for _ in range(HIDDEN)] for _ in tokens]
    begin = [
        rng.gauss(0, 1) for _ in range(HIDDEN)
    ]  # shared by all tokens that are not of the sentence: it begins there
    embeddings = array("f")
    for token, direction in enumerate(directions):
        embeddings.extend(direction if token in spoken else (a + b for a, b in zip(direction, begin, strict=True)))
    before = {after: directions[token] for token, after in itertools.pairwise(chain)} | {chain[0]: begin}
    head = array("f")
    for token in range(len(tokens)):
        row = before.get(token) or [rng.gauss(0, 1) for _ in range(HIDDEN)]
        head.extend(0.2 * x for x in row)

    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": ((len(tokens), HIDDEN), embeddings)}
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        for norm, width in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)):
            tensors[f"{layer}.{norm}.weight"] = _ones(width)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{norm}.weight"] = _ones(HEAD_DIM)
        for module, shape, scale in (
            ("self_attn.q_proj", (queries, HIDDEN), 0.09),
            ("self_attn.k_proj", (keys, HIDDEN), 0.09),
            ("self_attn.v_proj", (keys, HIDDEN), 0.09),
            ("self_attn.o_proj", (HIDDEN, queries), 0.005),  # what is added to the stream stays small beside the table
            ("mlp.gate_proj", (INNER, HIDDEN), 0.09),
            ("mlp.up_proj", (INNER, HIDDEN), 0.09),
            ("mlp.down_proj", (HIDDEN, INNER), 0.005),
        ):
            tensors[f"{layer}.{module}.weight"] = _random(rng, shape, scale)
    tensors["model.norm.weight"] = _ones(HIDDEN)
    tensors["lm_head.weight"] = ((len(tokens), HIDDEN), head)
    return tensors


def _ones(width: int) -> Tensor:
    return (width,), array("f", [1.0] * width)


# The file formats.


def _write(path: Path, content: bytes | dict[str, Any]) -> None:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())
    path.chmod(0o644)  # engines run as another user


def _safetensors(tensors: dict[str, Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = bytearray()
    for name, (shape, values) in tensors.items():
        raw = values.tobytes()
        half = bytearray(len(raw) // 2)  # bfloat16 is the upper half of a float32
        half[0::2], half[1::2] = raw[2::4], raw[3::4]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(body), len(body) + len(half)]}
        body += half
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(body)


def _gguf(tokens: list[str], merges: list[tuple[str, str]], tensors: dict[str, Tensor]) -> bytes:
    """https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, all tensors as float32."""
    metadata = {
        "general.architecture": "qwen3",
        "general.name": "tiny",
        "qwen3.block_count": LAYERS,
        "qwen3.context_length": CONTEXT,
        "qwen3.embedding_length": HIDDEN,
        "qwen3.feed_forward_length": INNER,
        "qwen3.attention.head_count": HEADS,
        "qwen3.attention.head_count_kv": KV_HEADS,
        "qwen3.attention.key_length": HEAD_DIM,
        "qwen3.attention.value_length": HEAD_DIM,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, raw = _gguf_value(value)
        head += _gguf_string(key) + struct.pack("<I", kind) + raw
    body = bytearray()
    for name, (shape, values) in tensors.items():
        head += _gguf_string(_gguf_name(name)) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", 0, len(body))
        body += values.tobytes()
        body += b"\0" * (-len(body) % 32)
    return head + b"\0" * (-len(head) % 32) + bytes(body)


def _gguf_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _gguf_value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _gguf_string(value)
    if isinstance(value[0], int):
        return 9, struct.pack(f"<IQ{len(value)}i", 5, len(value), *value)
    return 9, struct.pack("<IQ", 8, len(value)) + b"".join(map(_gguf_string, value))


def _gguf_name(name: str) -> str:
    return "".join(_GGUF_PARTS.get(part, part) + "." for part in _parts(name)).rstrip(".")


def _parts(name: str) -> Iterator[str]:
    return (part for part in name.split(".") if part not in ("model", "self_attn", "mlp"))


_GGUF_PARTS = {
    "embed_tokens": "token_embd",
    "layers": "blk",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


if __name__ == "__main__":
    (tiny_lora if "--lora" in sys.argv else tiny_model)(Path(sys.argv[1]))
