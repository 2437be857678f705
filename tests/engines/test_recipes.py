"""What each deployment of the documentation becomes: image, arguments, environment, mounts."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.engines.order import ChatOrder, Script, image_of, repository_name
from nimhost.engines.parallel import tensor_parallel_size
from nimhost.engines.recipes import cook, needs_weights
from nimhost.engines.spec import ContainerSpec, Mount, Probe
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
        (4, {"num_attention_heads": 16, "num_kv_heads": 2}, 4),  # each key-value head twice
        (6, {"num_attention_heads": 12, "num_kv_heads": 4, "hidden_size": 768}, 2),
        (4, {"num_attention_heads": 32, "num_kv_heads": 32, "hidden_size": 4096, "ffn_hidden_size": 11006}, 2),
        (3, {"num_attention_heads": 16, "num_kv_heads": 8}, 1),
        (8, {"num_attention_heads": 40, "num_kv_heads": 8, "hidden_size": 5120}, 8),
        (6, {"num_attention_heads": 12, "num_kv_heads": 3, "hidden_size": 768}, 6),
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


def flag(made: ContainerSpec, name: str) -> str | None:
    return next((made.args[at + 1] for at, argument in enumerate(made.args) if argument == name), None)


@pytest.mark.parametrize(
    ("ranks", "own", "rank", "together"),
    [
        ((), [], "16", "4"),
        ((8,), [], "16", "4"),
        ((8, 24), [], "32", "4"),
        ((300,) * 6, [], "320", "6"),
        ((16,) * 40, [], "16", "16"),
        ((4096,), [], "512", "4"),
        ((64,), ["--max-lora-rank=16", "--max-loras", "1"], None, "1"),
    ],
)
def test_vllm_with_adapters_is_made_for_those_registered(
    ranks: tuple[int, ...], own: list[str], rank: str | None, together: str
) -> None:
    wish = {"lora_enabled": True}
    asked = order("vllm", with_model=model(lora_ranks=ranks), wish=wish, additional_args=own)
    made = cook(asked, WITH_WEIGHTS)
    assert "--enable-lora" in made.args
    assert (flag(made, "--max-lora-rank"), flag(made, "--max-loras")) == (rank, together)
    assert made.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert made.mounts[1] == Mount("/data/loras/default--qwen3-1-7b", "/loras")


def test_vllm_gets_its_chat_template_and_plugin_as_files() -> None:
    chat = ChatOrder(chat_template="{{ a }}\n", tools=ToolCallConfig(tool_call_parser="mine", auto_tool_choice=True))
    host = replace(WITH_WEIGHTS, tool_parser=Script("parser.py", "x = 1"))
    made = cook(order("vllm", with_model=model(chat=chat)), host)
    assert flag(made, "--chat-template") == "/nimhost/chat-template.jinja"
    assert flag(made, "--tool-call-parser") == "mine"
    assert flag(made, "--tool-parser-plugin") == "/nimhost/parser.py"
    assert "--enable-auto-tool-choice" in made.args
    assert made.files == {"/nimhost/chat-template.jinja": "{{ a }}\n", "/nimhost/parser.py": "x = 1"}


def test_the_config_overrides_the_models_chat_settings() -> None:
    chat = ChatOrder(chat_template="model", tools=ToolCallConfig(tool_call_parser="hermes", auto_tool_choice=True))
    wish = {"chat_template": "config", "tool_call_config": ToolCallConfig(auto_tool_choice=False)}
    made = cook(order("vllm", with_model=model(chat=chat), wish=wish), WITH_WEIGHTS)
    assert made.files["/nimhost/chat-template.jinja"] == "config"
    assert "--enable-auto-tool-choice" not in made.args
    assert flag(made, "--tool-call-parser") == "hermes"


@pytest.mark.parametrize(
    ("known", "wish", "pooling"),
    [
        ({}, {}, False),
        ({"is_embedding_model": True}, {}, True),
        ({"is_embedding_model": True, "is_chat": True}, {}, False),  # by its name only: vLLM knows better
        ({}, {"model_type": "embed"}, True),
        ({}, {"model_type": "llm"}, False),
    ],
)
def test_vllm_is_told_of_embedding_models(known: dict[str, Any], wish: dict[str, Any], pooling: bool) -> None:
    made = cook(order("vllm", with_model=model(spec=spec(**known)), wish=wish), WITH_WEIGHTS)
    assert flag(made, "--runner") == ("pooling" if pooling else None)


@pytest.mark.parametrize(
    ("engine", "found"),
    [("vllm", lambda s: "--trust-remote-code" in s.args), ("nim", lambda s: "NIM_FORCE_TRUST_REMOTE_CODE" in s.env)],
)
@pytest.mark.parametrize("trusted", [True, False])
def test_trusted_code(engine: str, found: Any, trusted: bool) -> None:
    assert found(cook(order(engine, with_model=model(trust_remote_code=trusted)), WITH_WEIGHTS)) is trusted


@pytest.mark.parametrize(("ranks", "rank"), [((), None), ((32,), None), ((8, 64), "64")])
def test_nim_looks_for_adapters_itself(ranks: tuple[int, ...], rank: str | None) -> None:
    made = cook(order("nim", with_model=model(lora_ranks=ranks), wish={"lora_enabled": True}), WITH_WEIGHTS)
    assert (made.env["NIM_PEFT_SOURCE"], made.env["NIM_PEFT_REFRESH_INTERVAL"]) == ("/loras", "30")
    assert made.env.get("NIM_MAX_LORA_RANK") == rank
    assert Mount("/data/loras/nim/default--qwen3-1-7b", "/loras") in made.mounts


def test_nim_is_given_a_plugin_as_a_file() -> None:
    host = replace(WITH_WEIGHTS, tool_parser=Script("my_parser.py", "x = 1"))
    made = cook(order("nim", with_model=model()), host)
    assert made.env["NIM_TOOL_PARSER_PLUGIN"] == "/nimhost/my_parser.py"
    assert made.files == {"/nimhost/my_parser.py": "x = 1"}


def test_nim_from_ngc_brings_its_model() -> None:
    wish = {"model_name": "meta/llama-3.2-1b-instruct"}
    image = "nvcr.io/nim/meta/llama-3.2-1b-instruct"
    asked = order("nim", wish=wish, image_name=image, image_tag="1.8.6")
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


def test_a_key_of_the_person_s_own_is_the_one_a_nim_gets() -> None:
    envs = {"NGC_API_KEY": "nvapi-own"}
    made = cook(order("nim", additional_envs=envs, image_name="nvcr.io/nim/meta/llama", image_tag="1"), HOST)
    assert (made.env["NGC_API_KEY"], made.secret_env) == ("nvapi-own", {})


@pytest.mark.fault(24)
def test_a_nim_lists_what_it_was_told_where_it_serves_our_weights() -> None:
    ours = cook(order("nim", with_model=model()), WITH_WEIGHTS)
    assert ours.probe.served_names == ("default/qwen3-1-7b",)
    named = order("nim", with_model=model(), additional_envs={"NIM_SERVED_MODEL_NAME": "a, b"})
    assert cook(named, WITH_WEIGHTS).probe.served_names == ("a", "b")
    own = cook(order("nim", wish={"model_name": "nvidia/nv-embedqa"}, image_name="nvcr.io/nim/x", image_tag="1"), HOST)
    assert (own.probe.served_names, own.probe.serves_any) == ((), True)


@pytest.mark.parametrize(
    ("ids", "image_user", "expected"),
    [
        ({}, "app", None),
        ({"run_as_user": 5}, "app", "5"),
        ({"run_as_user": 5, "run_as_group": 6}, "app", "5:6"),
        ({"run_as_group": 6}, "app:staff", "app:6"),
        ({"run_as_group": 6}, "", "0:6"),
    ],
)
def test_who_an_engine_runs_as(ids: dict[str, Any], image_user: str, expected: str | None) -> None:
    for engine in ("vllm", "nim", "generic"):
        made = cook(order(engine, with_model=model(), image_name="x", health_check_path="/h", **ids), WITH_WEIGHTS)
        assert made.user_in(image_user) == expected


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
    base = ChatOrder(
        chat_template="from model",
        tools=ToolCallConfig(tool_call_parser="llama3_json", auto_tool_choice=True),
    )
    wish: dict[str, Any] = {"tool_call_config": ToolCallConfig(auto_tool_choice=False)}
    env = cook(order("nim", with_model=model(chat=base), wish=wish), WITH_WEIGHTS).env
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
