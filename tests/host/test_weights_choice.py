from __future__ import annotations

import pytest

from nimhost.host.weights.choice import HubFile, choose_files

CASES: dict[str, tuple[str, str]] = {
    "safetensors beside everything else (as gpt2 has it)": (
        "config.json generation_config.json merges.txt vocab.json tokenizer.json model.safetensors",
        ".gitattributes pytorch_model.bin tf_model.h5 flax_model.msgpack rust_model.ot 64.tflite onnx/decoder.onnx "
        "onnx/config.json coreml/Model.mlpackage/weights.bin",
    ),
    "shards with their index (as Llama has it)": (
        "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json "
        "tokenizer.model tokenizer_config.json LICENSE USE_POLICY.md README.md",
        "original/consolidated.00.pth original/params.json original/tokenizer.model",
    ),
    "consolidated beside shards (as Mistral has it)": (
        "config.json params.json tekken.json model-00001-of-00001.safetensors",
        "consolidated.safetensors consolidated.safetensors.index.json pytorch_model.bin.index.json",
    ),
    "consolidated alone": ("params.json tekken.json consolidated.safetensors", ""),
    "pickles alone": (
        "config.json pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin pytorch_model.bin.index.json",
        "tf_model.h5",
    ),
    "code and template of its own": (
        "config.json modeling_nemotron.py configuration.py chat_template.jinja tool_parser.py model.safetensors",
        "bias.png banner.jpg",
    ),
    "another form in a folder (as gpt-oss has it)": (
        "config.json model-00000-of-00002.safetensors",
        "original/model.safetensors metal/model.bin",
    ),
    "sentence embeddings: each folder chooses for itself": (
        "config.json modules.json 1_Pooling/config.json 2_Dense/pytorch_model.bin 3_Dense/model.safetensors "
        "model.safetensors",
        "pytorch_model.bin 3_Dense/pytorch_model.bin openvino/openvino_model.bin",
    ),
    "adapter": ("adapter_config.json adapter_model.safetensors README.md", "adapter_model.bin training_args.bin"),
    "old adapter with what training left": (
        "adapter_config.json adapter_model.bin",
        "checkpoint-500/adapter_model.bin checkpoint-500/optimizer.pt optimizer.pt scheduler.pt rng_state_0.pth "
        "trainer_state.json runs/a/events",
    ),
    "one quantisation": ("config.json model-Q4.gguf", ""),
    "several quantisations to choose from": ("config.json", "model-Q4.gguf model-Q8.gguf"),
    "quantisations beside the real thing": ("config.json model.safetensors", "model-Q4.gguf"),
    "weights where the platform keeps them": ("alternates/hf/config.json alternates/hf/model.safetensors", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_come_once_and_everything_small_comes(case: str) -> None:
    kept, left = (names.split() for names in CASES[case])
    tree = [HubFile(path, 1, "0" * 40) for path in sorted(kept + left)]
    assert {file.path for file in choose_files(tree)} == set(kept)
