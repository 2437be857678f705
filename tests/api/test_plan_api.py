"""What would become of a deployment, over the wire: before it is made, of one that is there, and when it is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import public
from tests.models import test_checkpoint as known
from tests.models.weights_dir import make_weights_dir
from tests.world import MODELS, World

FILES = "/apis/files/v2/workspaces/default"
PLAN = "/apis/nimhost/v1/plan"
GIB = 1024**3
Json = dict[str, Any]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Two GPUs of 24 GiB."""
    async with World(tmp_path / "world") as world:
        yield world


def wish(directory: Path | None, **executor: Any) -> Json:
    """What `nimhost plan` sends."""
    config = {
        "engine": "vllm",
        "model_spec": {"model_namespace": "default", "model_name": "mm"},
        "executor_config": {"gpu": 1, "image_name": "fake-engine", "image_tag": "1", **executor},
    }
    storage = {"storage": {"type": "local", "path": str(directory)}} if directory else None
    return {"config": config, "fileset": storage}


async def planned(world: World, body: Json) -> Json:
    reply = await world.http.post(PLAN, json=body)
    assert reply.status_code == 200, reply.text
    found: Json = reply.json()
    return found


async def test_a_model_that_nobody_deployed_is_planned_with_every_number(world: World, tmp_path: Path) -> None:
    weights = make_weights_dir(tmp_path / "qwen3-14b", public.QWEN3_14B)
    found = await planned(world, wish(weights, gpu=2))
    assert (found["verdict"], found["reason"], found["engine"]) == ("starts", None, "vllm")
    memory = found["memory"]
    assert memory["exact"]
    assert memory["weights_bytes"] * 2 / GIB == pytest.approx(27.5, rel=0.01)
    assert (memory["tensor_parallel"], memory["largest_max_model_len"], memory["gpus_needed"]) == (2, 40960, 2)
    parts = ("weights", "activation", "graph", "engine", "adapter", "kv_cache")
    assert sum(memory[f"{part}_bytes"] for part in parts) == memory["need_bytes"] <= memory["budget_bytes"]
    assert found["gpus"]["chosen"] == [gpu["uuid"] for gpu in found["gpus"]["there"]]
    assert {place["what"]: place["here"] for place in found["disk"]} == {"weights": True, "image": True}
    assert (await world.http.get(f"{MODELS}/deployments")).json()["data"] == []
    assert (await world.http.get(f"{FILES}/filesets")).json()["data"] == []
    assert "pull" not in world.docker.calls


async def test_what_cannot_fit_is_refused_with_the_sum_and_the_change(world: World, tmp_path: Path) -> None:
    weights = make_weights_dir(tmp_path / "qwen3-14b", public.QWEN3_14B)
    found = await planned(world, wish(weights))
    assert found["verdict"] == "refused"
    assert "weights 27.5" in found["reason"]
    assert "It fits with --gpu 2." in found["hint"]
    again = await planned(world, wish(weights, gpu=2))
    assert again["verdict"] == "starts"


async def test_a_share_is_planned_beside_what_runs(world: World, tmp_path: Path) -> None:
    await world.deploy("one", gpu_memory_gib=4)
    await world.wait("one", "READY")
    await world.deploy("two")
    await world.wait("two", "READY")
    weights = make_weights_dir(tmp_path / "qwen3-1.7b", known.QWEN3_1_7B)
    found = await planned(world, wish(weights, gpu_memory_gib=12))
    assert (found["verdict"], found["gpus"]["utilization"]) == ("starts", 0.5)
    waiting = await planned(world, wish(weights, gpu_memory_gib=22))
    assert waiting["verdict"] == "waits"
    assert "default/one has 4.0 GiB" in waiting["reason"]
    assert "is held by default/two" in waiting["reason"]


async def test_without_a_model_there_is_no_sum_and_no_refusal(world: World, tmp_path: Path) -> None:
    body = wish(None, image_name="nvcr.io/nim/meta/llama-3.2-1b-instruct", image_tag="1.8.6")
    body["config"] |= {"engine": "nim", "model_spec": {"model_name": "meta/llama-3.2-1b-instruct"}}
    found = await planned(world, body)
    assert (found["verdict"], found["memory"], found["unknown"]) == ("unknown", None, None)


async def test_a_model_that_cannot_be_read_says_why_nothing_is_known(world: World) -> None:
    body = wish(None)
    body["fileset"] = {"storage": {"type": "huggingface", "repo_id": "some/model"}}
    found = await planned(world, body)
    assert found["memory"] is None
    assert "offline" in found["unknown"]


async def test_the_plan_of_a_deployment_that_is_there(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    reply = await world.http.get(f"{MODELS}/deployments/one/plan")
    assert (reply.status_code, reply.json()["engine"]) == (200, "generic")
    assert (await world.http.get(f"{MODELS}/deployments/nobody/plan")).status_code == 404


async def test_a_wrong_plan_names_the_field(world: World) -> None:
    reply = await world.http.post(PLAN, json={"config": {"engine": "vllm", "model_spec": {}, "executor_config": {}}})
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"][-1] == "gpu"


async def test_a_dry_run_of_a_deployment_shows_its_plan_and_makes_nothing(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    tried = await world.http.post(f"{MODELS}/deployments?dry_run=true", json={"name": "two", "config": "one"})
    assert tried.status_code == 200, tried.text
    plan = tried.json()["plan"]
    assert (plan["verdict"], len(plan["gpus"]["chosen"])) == ("unknown", 1)  # of an engine whose model nobody has read
    assert (await world.http.get(f"{MODELS}/deployments/two")).status_code == 404


@pytest.mark.fault(23)
async def test_a_deployment_that_cannot_fit_is_refused_unless_forced(world: World, tmp_path: Path) -> None:
    weights = make_weights_dir(tmp_path / "qwen3-14b", public.QWEN3_14B)
    storage = {"type": "local", "path": str(weights)}
    assert (await world.http.post(f"{FILES}/filesets", json={"name": "mm", "storage": storage})).status_code == 200
    await world.post(f"{MODELS}/models", {"name": "mm", "fileset": "default/mm"})
    await world.post(f"{MODELS}/deployment-configs", {"name": "mm", **wish(None)["config"]})
    refused = await world.http.post(f"{MODELS}/deployments", json={"name": "mm", "config": "mm"})
    assert refused.status_code == 400
    assert "does not fit: weights 27.5" in refused.json()["detail"]
    assert "It fits with --gpu 2." in refused.json()["hint"]
    assert (await world.http.get(f"{MODELS}/deployments/mm")).status_code == 404
    forced = await world.post(f"{MODELS}/deployments", {"name": "mm", "config": "mm", "force": True})
    assert forced["force"] is True
    await world.wait("mm", "PENDING", "initializing")
