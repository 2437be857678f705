"""What each deployment of the documentation becomes: image, arguments, environment, mounts."""

from __future__ import annotations

from typing import Any

import pytest

from nimhost.engines.order import image_of, repository_name
from nimhost.engines.recipes import cook, needs_weights
from nimhost.engines.spec import Mount, Probe
from nimhost.engines.vllm import tensor_parallel_size
from nimhost.entities import ToolCallConfig
from nimhost.errors import BadRequest
from tests.engines.make import HOST, WITH_WEIGHTS, model, order, spec

WEIGHTS = Mount("/cache/models--org--m", "/model-store")
SERVED = "default/qwen3-1-7b"


def test_vllm_serves_the_model_entity_from_read_only_weights() -> None:
    made = cook(order("vllm", with_model=model()), WITH_WEIGHTS)
    assert made.image == "vllm/vllm-openai:v1"
    assert made.args == ("/model-store/snapshots/abc", "--served-model-name", SERVED)
    assert made.mounts == (WEIGHTS,)
    assert made.mounts[0].read_only
    assert made.env["HF_HUB_OFFLINE"] == "1"
    assert made.probe == Probe("/health", (SERVED,))
    assert (made.gpus, made.shm_bytes, made.policy, made.secret_env) == (1, 16 * 2**30, "vllm", {})


def test_vllm_on_no_gpu_keeps_the_shm_default() -> None:
    assert cook(order("vllm", gpu=0, with_model=model()), WITH_WEIGHTS).shm_bytes is None


@pytest.mark.parametrize(
    ("gpus", "sizes", "expected"),
    [
        (0, {}, 1),
        (1, {}, 1),
        (2, {}, 2),
        (4, {"num_attention_heads": 16, "num_kv_heads": 2}, 2),
        (3, {"num_attention_heads": 16, "num_kv_heads": 8}, 1),
        (8, {"num_attention_heads": 40, "num_kv_heads": 8, "hidden_size": 5120}, 8),
        (6, {"num_attention_heads": 12, "num_kv_heads": 3, "hidden_size": 768}, 3),
    ],
)
def test_tensor_parallel_size(gpus: int, sizes: dict[str, int], expected: int) -> None:
    assert tensor_parallel_size(gpus, spec(**sizes)) == expected


def test_without_a_spec_every_gpu_is_used() -> None:
    assert tensor_parallel_size(4, None) == 4


def test_vllm_user_arguments_come_last_and_replace_ours() -> None:
    arguments = ["--max-model-len", "1024", "-tp=1", "--served-model-name", "mine"]
    made = cook(order("vllm", gpu=2, with_model=model(), additional_args=arguments), WITH_WEIGHTS)
    assert made.args == ("/model-store/snapshots/abc", *arguments)
    assert made.probe.served_names == ()  # what it serves is the user's choice: any list will do


def test_vllm_user_environment_wins() -> None:
    made = cook(order("vllm", with_model=model(), additional_envs={"HF_HUB_OFFLINE": "0", "A": "b"}), WITH_WEIGHTS)
    assert (made.env["HF_HUB_OFFLINE"], made.env["A"]) == ("0", "b")


def test_vllm_with_adapters_enables_loading_at_run_time() -> None:
    made = cook(order("vllm", with_model=model(), wish={"lora_enabled": True}), WITH_WEIGHTS)
    assert "--enable-lora" in made.args
    assert made.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_nim_from_ngc_brings_its_model() -> None:
    wish = {"model_name": "meta/llama-3.2-1b-instruct"}
    image = {"image_name": "nvcr.io/nim/meta/llama-3.2-1b-instruct", "image_tag": "1.8.6"}
    asked = order("nim", wish=wish, **image)
    made = cook(asked, HOST)
    assert not needs_weights(asked, HOST)
    assert made.image == "nvcr.io/nim/meta/llama-3.2-1b-instruct:1.8.6"
    assert made.env == {
        "NIM_GUIDED_DECODING_BACKEND": "outlines",
        "NIM_SERVED_MODEL_NAME": "meta/llama-3.2-1b-instruct",
    }
    assert made.secret_env == {"NGC_API_KEY": "system/ngc-api-key"}
    assert made.probe.health_path == "/v1/health/ready"
    (cache,) = made.mounts
    assert (cache.target, cache.read_only) == ("/opt/nim/.cache", False)
    assert cache.source.startswith("/data/nim-cache/nvcr.io-nim-meta-llama-3.2-1b-instruct-1.8.6-")


def test_a_nim_without_a_model_name_sets_none() -> None:
    made = cook(order("nim", image_name="nvcr.io/nim/nvidia/nemoguard-jailbreak-detect", image_tag="1.10.1"), HOST)
    assert made.env == {"NIM_GUIDED_DECODING_BACKEND": "outlines"}


def test_the_multi_llm_nim_serves_our_weights() -> None:
    asked = order("nim", with_model=model())
    made = cook(asked, WITH_WEIGHTS)
    assert needs_weights(asked, HOST)
    assert made.image == "nvcr.io/nim/nvidia/llm-nim:1.13.1"
    assert made.env["NIM_MODEL_NAME"] == made.env["NIM_MODEL_PATH"] == "/model-store/snapshots/abc"
    assert "NIM_FT_MODEL" not in made.env
    assert WEIGHTS in made.mounts


def test_a_model_specific_nim_with_our_weights_is_told_so() -> None:
    made = cook(order("nim", with_model=model(), image_name="nvcr.io/nim/meta/llama", image_tag="1"), WITH_WEIGHTS)
    assert made.env["NIM_FT_MODEL"] == made.env["NIM_CUSTOM_MODEL"] == "/model-store/snapshots/abc"


def test_nim_tool_calling_is_overridden_field_by_field() -> None:
    base = spec(
        chat_template="from model",
        tool_call_config=ToolCallConfig(tool_call_parser="llama3_json", auto_tool_choice=True),
    )
    wish: dict[str, Any] = {"tool_call_config": ToolCallConfig(auto_tool_choice=False)}
    env = cook(order("nim", with_model=model(spec=base), wish=wish), WITH_WEIGHTS).env
    assert env["NIM_CHAT_TEMPLATE"] == "from model"
    assert (env["NIM_TOOL_CALL_PARSER"], env["NIM_ENABLE_AUTO_TOOL_CHOICE"]) == ("llama3_json", "0")


def test_a_generic_image_starts_as_it_is() -> None:
    asked = order("generic", gpu=0, image_name="me/server", health_check_path="/ok", additional_args=["--x"])
    made = cook(asked, HOST)
    assert (made.image, made.args, made.env, made.mounts) == ("me/server", ("--x",), {}, ())
    assert made.probe == Probe("/ok")


@pytest.mark.parametrize(
    ("user", "group", "expected"), [(None, None, None), (1000, None, "1000"), (1000, 2000, "1000:2000")]
)
def test_run_as(user: int | None, group: int | None, expected: str | None) -> None:
    assert cook(order("vllm", with_model=model(), run_as_user=user, run_as_group=group), WITH_WEIGHTS).user == expected


def test_a_tag_without_an_image_name_is_refused() -> None:
    with pytest.raises(BadRequest, match="image_name"):
        image_of(order("vllm", image_tag="1"), "default:1")


@pytest.mark.parametrize(
    ("image", "name"),
    [("nvcr.io/nim/nvidia/llm-nim:1", "llm-nim"), ("host:5000/a/b@sha256:00", "b"), ("plain", "plain")],
)
def test_repository_name(image: str, name: str) -> None:
    assert repository_name(image) == name
