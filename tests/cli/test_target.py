"""What MODEL is, and what it becomes."""

from __future__ import annotations

import os
from typing import Any

import pytest

from nimhost.cli.entities import Options, differences, entities_for
from nimhost.cli.target import Directory, HubModel, Image, Target, name_for, parse_target
from nimhost.errors import BadRequest

LLAMA = "nvcr.io/nim/meta/llama-3.2-1b-instruct"


@pytest.mark.parametrize(
    ("text", "is_dir", "target"),
    [
        ("Qwen/Qwen3-1.7B", False, HubModel("Qwen/Qwen3-1.7B")),
        ("Qwen/Qwen3-1.7B@main", False, HubModel("Qwen/Qwen3-1.7B", "main")),
        ("Qwen/Qwen3-1.7B@refs/pr/1", False, HubModel("Qwen/Qwen3-1.7B", "refs/pr/1")),
        ("gpt2", False, HubModel("gpt2")),
        ("Qwen/Qwen3-1.7B", True, Directory(os.path.abspath("Qwen/Qwen3-1.7B"))),
        ("weights", True, Directory(os.path.abspath("weights"))),
        ("./weights/", True, Directory(os.path.abspath("weights"))),
        ("/srv/weights", True, Directory("/srv/weights")),
        ("~/weights", True, Directory(os.path.expanduser("~/weights"))),
        (f"{LLAMA}:1.8.6", False, Image(LLAMA, "1.8.6", "meta/llama-3.2-1b-instruct")),
        (LLAMA, False, Image(LLAMA, None, "meta/llama-3.2-1b-instruct")),
        ("localhost:5000/a/b:1", False, Image("localhost:5000/a/b", "1", "a/b")),
        ("127.0.0.1:5000/b", False, Image("127.0.0.1:5000/b", None, "b")),
        ("light:1", False, Image("light", "1", "light")),
        ("team/light:1", False, Image("team/light", "1", "team/light")),
        (f"{LLAMA}@sha256:ab", False, Image(f"{LLAMA}@sha256:ab", None, "meta/llama-3.2-1b-instruct")),
    ],
)
def test_what_model_is(text: str, is_dir: bool, target: Target) -> None:
    assert parse_target(text, is_dir) == target


@pytest.mark.parametrize(
    "text", ["./gone", "/gone", "a/b/c", "", "@main", "a/b@", "a b", "-x", "https://hub.example/a/b"]
)
def test_what_is_nothing_to_deploy_says_what_would_be(text: str) -> None:
    if text.startswith("https"):
        assert isinstance(parse_target(text, False), Image)  # looks like a registry; the engine refuses it by name
        return
    with pytest.raises(BadRequest) as caught:
        parse_target(text, False)
    assert "Qwen/Qwen3-1.7B" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["./gone", "../gone", "/gone", "~/gone"])
def test_a_directory_that_is_not_there_is_named(text: str) -> None:
    with pytest.raises(BadRequest, match="There is no directory"):
        parse_target(text, False)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (HubModel("Qwen/Qwen3-1.7B", "main"), "qwen-qwen3-1-7b"),
        (Directory("/srv/My Model"), "my-model"),
        (Image(LLAMA, "1.8.6", "meta/llama-3.2-1b-instruct"), "meta-llama-3-2-1b-instruct"),
    ],
)
def test_what_it_is_called(target: Target, name: str) -> None:
    assert name_for(target) == name


def test_a_directory_without_a_usable_name_asks_for_one() -> None:
    with pytest.raises(BadRequest) as caught:
        name_for(Directory("/srv/模型"))
    assert "--name" in (caught.value.hint or "")


def bodies(target: Target, **options: Any) -> dict[str, dict[str, Any]]:
    wanted = entities_for(target, Options(name="n1", workspace="w1", **options))
    return {want.resource: want.body() for want in wanted}


def test_a_hub_model_is_four_entities() -> None:
    assert bodies(HubModel("Qwen/Qwen3-1.7B", "abc"), gpus=2, args=("--x",), env={"A": "1"}, token_secret="hf") == {
        "filesets": {
            "storage": {
                "type": "huggingface", "repo_id": "Qwen/Qwen3-1.7B", "repo_type": "model", "revision": "abc",
                "token_secret": "hf",
            },
            "purpose": "model",
            "description": "Made by: nimhost deploy Qwen/Qwen3-1.7B@abc",
        },
        "models": {"fileset": "w1/n1", "description": "Made by: nimhost deploy Qwen/Qwen3-1.7B@abc"},
        "deployment_configs": {
            "engine": "vllm",
            "model_spec": {"model_namespace": "w1", "model_name": "n1"},
            "executor_config": {"gpu": 2, "additional_args": ["--x"], "additional_envs": {"A": "1"}},
            "description": "Made by: nimhost deploy Qwen/Qwen3-1.7B@abc",
        },
        "deployments": {"config": "n1"},
    }  # fmt: skip


def test_a_directory_is_used_by_reference() -> None:
    made = bodies(Directory("/srv/w"), image="light:1", gpus=0)
    assert made["filesets"]["storage"] == {"type": "local", "path": "/srv/w"}
    config = made["deployment_configs"]["executor_config"]
    assert config == {"gpu": 0, "image_name": "light", "image_tag": "1", "additional_args": [], "additional_envs": {}}


def test_an_image_brings_its_model() -> None:
    made = bodies(Image(LLAMA, "1.8.6", "meta/llama-3.2-1b-instruct"))
    assert list(made) == ["deployment_configs", "deployments"]
    config = made["deployment_configs"]
    assert (config["engine"], config["model_spec"]) == ("nim", {"model_name": "meta/llama-3.2-1b-instruct"})
    assert config["executor_config"]["image_name"] == LLAMA
    assert config["executor_config"]["image_tag"] == "1.8.6"


@pytest.mark.parametrize(
    ("target", "options", "hint"),
    [
        (Image("a.b/c", "1", "c"), {"engine": "vllm"}, "--image"),
        (Image("a.b/c", "1", "c"), {"image": "x:1"}, "Leave one"),
        (Image("a.b/c", "1", "c"), {"engine": "generic"}, "--health-path"),
        (HubModel("a/b"), {"engine": "generic", "health_path": "/ok"}, "--image"),
        (Directory("/srv/w"), {"token_secret": "hf"}, "Leave it out."),
        (Image("a.b/c", "1", "c"), {"token_secret": "hf"}, "system/ngc-api-key"),
    ],
)
def test_options_that_do_not_go_together_say_what_would(target: Target, options: dict[str, object], hint: str) -> None:
    with pytest.raises(BadRequest) as caught:
        bodies(target, **options)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("wanted", "found", "lines"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, []),
        ({"a": 1}, {"a": 2}, ["a: 2 there, 1 wanted"]),
        ({"a": None, "b": [], "c": {}}, {"a": "", "b": None}, []),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2, "d": 1}}}, ["a.b.c: 2 there, 1 wanted"]),
        ({"a": {"b": 1}}, {"a": None}, ["a.b: nothing there, 1 wanted"]),
        ({"gpu": 0}, {"gpu": 1}, ["gpu: 1 there, 0 wanted"]),
        ({"storage": {"revision": "main"}}, {"storage": {"revision": "c0ffee", "original_revision": "main"}}, []),
        ({"storage": {"revision": "v2"}}, {"storage": {"revision": "c0ffee", "original_revision": "main"}},
         ["storage.revision: main there, v2 wanted"]),
        ({"config": "n1"}, {"config": "default/n1"}, []),
        ({"executor_config": {"additional_envs": {"A": "1"}}}, {"executor_config": {"additional_envs": {"B": "2"}}},
         ["executor_config.additional_envs: {'B': '2'} there, {'A': '1'} wanted"]),
        ({"executor_config": {"additional_envs": {}}}, {"executor_config": {"additional_envs": None}}, []),
    ],
)  # fmt: skip
def test_what_differs(wanted: dict[str, object], found: dict[str, object], lines: list[str]) -> None:
    assert differences(wanted, found) == lines
