"""Configs that say by argument or variable what has a field, a gate or an owner: refused, and nothing is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nimhost.config import Server, Settings
from tests.api.conftest import FILESETS, MODELS, World, open_world
from tests.api.test_access import ENTRIES, TEXT, bearer

CONFIGS, ENTITIES = f"{MODELS}/deployment-configs", f"{MODELS}/models"


def config(engine: str = "vllm", /, **executor: Any) -> dict[str, Any]:
    spec = {"model_name": "default/mm"}
    return {"name": "cfg", "engine": engine, "model_spec": spec, "executor_config": {"gpu": 1, **executor}}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (config(additional_args=["--port", "9000"]), "executor_config.additional_args: --port cannot be set"),
        (config(additional_envs={"VLLM_API_KEY": "k"}), "executor_config.additional_envs.VLLM_API_KEY cannot be set"),
        (config("nim", additional_envs={"NIM_SERVER_PORT": "9"}), "executor_config.additional_envs.NIM_SERVER_PORT"),
        (
            config(gpu_memory_gib=12, additional_args=["--gpu-memory-utilization", "0.9"]),
            "executor_config.gpu_memory_gib says how much of a GPU the engine takes, and",
        ),
        (config(additional_args=["--gpu-memory-utilization", "90"]), "--gpu-memory-utilization is '90'"),
    ],
)
async def test_an_engine_that_could_never_be_ready_is_refused(world: World, body: dict[str, Any], says: str) -> None:
    refused = await world("POST", CONFIGS, body)
    assert (refused.status_code, says in refused.json()["detail"]) == (400, True), refused.text
    assert await world.store.all("deployment-configs") == []


@pytest.mark.parametrize(
    ("executor", "says"),
    [
        ({"additional_args": ["--trust-remote-code"]}, "executor_config.additional_args: --trust-remote-code: Insuff"),
        (
            {"additional_envs": {"NIM_FORCE_TRUST_REMOTE_CODE": "1"}},
            "executor_config.additional_envs.NIM_FORCE_TRUST_REMOTE_CODE: Insufficient permissions",
        ),
        (
            {"additional_args": ["--tool-parser-plugin", "/model-store/x.py"]},
            "executor_config.additional_args: --tool-parser-plugin: tool_call_plugin is disabled",
        ),
        ({"additional_envs": {"NIM_TOOL_PARSER_PLUGIN": "/x.py"}}, "tool_call_plugin is disabled"),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "nim"])
async def test_code_inside_engines_takes_the_same_leave_whichever_way_it_is_asked_for(
    tmp_path: Path, engine: str, executor: dict[str, Any], says: str
) -> None:
    async with open_world(tmp_path, Settings(server=Server(api_tokens=ENTRIES))) as world:
        await world.make(FILESETS, name="ff", storage={"type": "huggingface", "repo_id": "evil/model"})
        await world.make(ENTITIES, name="mm", fileset="default/ff")
        refused = await world("POST", CONFIGS, config(engine, **executor))
        assert (refused.status_code, says in refused.json()["detail"]) == (403, True), refused.text
        assert await world.store.all("deployment-configs") == []
        allowed = await world("POST", CONFIGS, config(engine, **executor), headers=bearer(TEXT["admin"]))
        assert allowed.status_code == 201


async def test_code_of_those_who_are_trusted_may_be_named_by_argument(world: World) -> None:
    await world.make(FILESETS, name="ff", storage={"type": "huggingface", "repo_id": "nvidia/model"})
    await world.make(ENTITIES, name="mm", fileset="default/ff")
    assert (await world("POST", CONFIGS, config(additional_args=["--trust-remote-code"]))).status_code == 201


@pytest.mark.parametrize("field", ["run_as_user", "run_as_group"])
async def test_a_user_that_cannot_be_is_refused(world: World, field: str) -> None:
    refused = await world("POST", CONFIGS, config(**{field: -5}))
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "executor_config", field]
    assert (await world("POST", CONFIGS, config(**{field: 1000}))).status_code == 201


async def test_a_provider_stays_with_its_deployment(world: World) -> None:
    await world.make_config(name="dd")
    await world.make(f"{MODELS}/deployments", name="dd", config="dd")
    status = f"{MODELS}/providers/dd/status"
    for other in ("default/x", ""):
        assert (await world("PUT", status, {"model_deployment_id": other})).status_code == 409
    same = await world("PUT", status, {"model_deployment_id": "default/dd", "status": "READY"})
    assert (same.status_code, same.json()["model_deployment_id"]) == (200, "default/dd")
