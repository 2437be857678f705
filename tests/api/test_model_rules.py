"""What models and configs may ask of engines: refused with the field, and nothing is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nimhost.config import Server, Settings
from tests.api.conftest import FILESETS, MODELS, World, open_world
from tests.api.test_access import ENTRIES, TEXT, bearer

CONFIGS, ENTITIES = f"{MODELS}/deployment-configs", f"{MODELS}/models"
TP, PP = "NIM_TENSOR_PARALLEL_SIZE", "NIM_PIPELINE_PARALLEL_SIZE"
SPEC = {
    "checkpoint_model_name": "X", "family": "qwen3", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2,
    "num_kv_heads": 1, "ffn_hidden_size": 8, "vocab_size": 8, "tied_embeddings": True, "gated_mlp": True,
    "base_num_parameters": 1, "precision": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"model_spec": {"chat_template": "{% for %}"}}, "model_spec.chat_template is not a chat template: line 1"),
        ({"executor_config": {"gpu": 2, "additional_envs": {TP: "2", PP: "2"}}}, "executor_config.additional_envs"),
        ({"executor_config": {"gpu": 4, "additional_envs": {TP: "x"}}}, f"{TP} is 'x'"),
        ({"engine": "vllm", "executor_config": {"gpu": 1, "additional_args": ["-tp", "2"]}}, "additional_args"),
    ],
)
async def test_a_config_that_no_engine_can_start_is_refused(world: World, body: dict[str, Any], says: str) -> None:
    good = {"name": "cfg", "engine": "nim", "model_spec": {}, "executor_config": {"gpu": 0}}
    refused = await world("POST", CONFIGS, good | body)
    assert (refused.status_code, says in refused.json()["detail"]) == (400, True), refused.text
    assert await world.store.all("deployment-configs") == []
    await world.make(CONFIGS, **good)
    changed = {key: value for key, value in (good | body).items() if key != "name"}
    assert (await world("POST", f"{CONFIGS}/cfg", changed)).status_code == 400
    assert (await world("GET", f"{CONFIGS}/cfg")).json()["entity_version"] == 1


async def test_the_parallelism_of_the_documentation_is_accepted(world: World) -> None:
    executor = {"gpu": 4, "additional_envs": {TP: "2", PP: "2"}}
    await world.make_config(model_spec={"model_name": "default/qwen-2-5-14b"}, executor_config=executor)


@pytest.mark.parametrize(
    ("spec", "status", "says"),
    [
        ({"chat_template": "{{ x | nope }}"}, 400, "spec.chat_template is not a chat template"),
        ({"tool_call_config": {"tool_call_plugin": "default/pp"}}, 403, "tool_call_plugin is disabled"),
    ],
)
async def test_a_model_is_held_to_account_for_what_it_changes(
    world: World, spec: dict[str, Any], status: int, says: str
) -> None:
    refused = await world("POST", ENTITIES, {"name": "mm", "spec": SPEC | spec})
    assert (refused.status_code, says in refused.json()["detail"]) == (status, True), refused.text
    await world.make(ENTITIES, name="mm", spec=SPEC)
    assert (await world("PATCH", f"{ENTITIES}/mm", {"spec": SPEC | spec})).status_code == status
    assert (await world("PATCH", f"{ENTITIES}/mm", {"description": "new"})).json()["spec"]["chat_template"] is None


async def test_what_an_administrator_allowed_stays_when_others_edit(tmp_path: Path) -> None:
    async with open_world(tmp_path, Settings(server=Server(api_tokens=ENTRIES))) as world:
        admin = bearer(TEXT["admin"])
        await world.make(FILESETS, name="ff", storage={"type": "huggingface", "repo_id": "evil/model"})
        body = {"name": "mm", "fileset": "default/ff", "trust_remote_code": True}
        body |= {"spec": SPEC | {"tool_call_config": {"tool_call_plugin": "default/pp"}}}
        assert (await world("POST", ENTITIES, body)).status_code == 403
        assert (await world("POST", ENTITIES, body, headers=admin)).status_code == 201
        edited = await world("PATCH", f"{ENTITIES}/mm", {"description": "new"})
        assert (edited.status_code, edited.json()["trust_remote_code"]) == (200, True)
        off = await world("PATCH", f"{ENTITIES}/mm", {"trust_remote_code": False})
        assert off.status_code == 200
        assert (await world("PATCH", f"{ENTITIES}/mm", {"trust_remote_code": True})).status_code == 403
