"""What deployments and providers have beside CRUD: logs, stop, start, progress, models, statuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from msgspec.structs import replace

from nimhost.api.app import control_plane, entry
from nimhost.config import Settings
from nimhost.entities import ProviderStatus, ServedModel, Status
from nimhost.errors import NotReady
from nimhost.runs import Run
from tests.api.conftest import MODELS, World, gateway
from tests.support import eventually

DEPLOYMENT = f"{MODELS}/deployments/dd"


@pytest.fixture
async def deployed(world: World) -> World:
    await world.make_config()
    await world.make(f"{MODELS}/deployments", name="dd", config="cfg")
    return world


@asynccontextmanager
async def listening(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """A real server: streams that do not end, and clients that leave."""
    app = entry(control_plane(world.parts), gateway, Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:
        yield client
    server.should_exit = True
    await serving


async def test_stop_and_start_set_the_wish_once(deployed: World) -> None:
    deployed.store.changed.clear()
    stopped = await deployed("POST", f"{DEPLOYMENT}/stop")
    assert (stopped.status_code, stopped.json()["desired"]) == (200, "stopped")
    assert deployed.store.changed.is_set()
    deployed.store.changed.clear()
    assert (await deployed("POST", f"{DEPLOYMENT}/stop")).json()["desired"] == "stopped"
    assert not deployed.store.changed.is_set()
    started = (await deployed("POST", f"{DEPLOYMENT}/start")).json()
    assert (started["desired"], started["entity_version"]) == ("running", 1)


async def test_logs_come_as_they_are(deployed: World) -> None:
    deployed.host.lines = [b"one\n", "zwö\n".encode(), b"\xff\n"]
    reply = await deployed("GET", f"{DEPLOYMENT}/logs?tail=5")
    assert reply.content == "one\nzwö\n".encode() + b"\xff\n"
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    await deployed("GET", f"{DEPLOYMENT}/logs")
    assert deployed.host.asked == [("default/dd", 5, False), ("default/dd", None, False)]
    assert (await deployed("GET", f"{DEPLOYMENT}/logs?tail=-1")).status_code == 422


async def test_no_logs_is_an_empty_reply(deployed: World) -> None:
    assert (await deployed("GET", f"{DEPLOYMENT}/logs")).content == b""


async def test_a_deployment_without_a_container_says_so_instead_of_logs(deployed: World) -> None:
    deployed.host.log_error = NotReady("It has no container yet.", "Wait.", retry_after_s=2)
    reply = await deployed("GET", f"{DEPLOYMENT}/logs?follow=true")
    assert (reply.status_code, reply.json()) == (503, {"detail": "It has no container yet.", "hint": "Wait."})
    assert (reply.headers["retry-after"], reply.headers["x-nimhost-error"]) == ("2", "NotReady")
    assert "x-should-retry" not in reply.headers


async def test_followed_logs_end_when_the_client_leaves(deployed: World) -> None:
    deployed.host.lines = [b"one\n"]
    async with listening(deployed) as client:
        async with client.stream("GET", f"{DEPLOYMENT}/logs?follow=true") as reply:
            assert await anext(reply.aiter_raw()) == b"one\n"
        await eventually(lambda: deployed.host.log_closed)


async def test_followed_logs_begin_before_the_first_line_and_end_quietly(
    deployed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nimhost.api.inference.FIRST_BYTE_WAIT_S", 0.02)
    async with listening(deployed) as client:
        async with client.stream("GET", f"{DEPLOYMENT}/logs?follow=true") as reply:
            assert reply.status_code == 200
        await eventually(lambda: deployed.host.log_closed)


async def test_progress_is_a_snapshot(deployed: World) -> None:
    deployed.host.tell({"image": {"done_bytes": 1}})
    body = (await deployed("GET", f"{DEPLOYMENT}/progress")).json()
    assert body == {
        "status": "CREATED", "status_message": "Deployment created", "desired": "running",
        "update": None, "progress": {"image": {"done_bytes": 1}},
    }  # fmt: skip
    assert (await deployed("GET", DEPLOYMENT)).json()["progress"] == {"image": {"done_bytes": 1}}


async def events(reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in reply.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_followed_progress_tells_every_change_and_ends_when_the_deployment_is_gone(deployed: World) -> None:
    async with (
        listening(deployed) as client,
        client.stream("GET", f"{DEPLOYMENT}/progress?follow=true") as reply,
    ):
        assert reply.headers["content-type"].startswith("text/event-stream")
        told = events(reply)
        assert (await anext(told))["status"] == "CREATED"
        deployed.host.tell({"weights": {"done_bytes": 7}})
        assert (await anext(told))["progress"] == {"weights": {"done_bytes": 7}}
        entity = await deployed.store.get("deployments", "default", "dd")
        await deployed.store.set_status(entity, entity.status.moved("READY", "up", "t"))
        assert (await anext(told))["status"] == "READY"
        await deployed.make_config("unrelated")
        await deployed("DELETE", DEPLOYMENT)
        assert (await anext(told))["status"] == "DELETING"
        async with deployed.store.transaction() as tx:
            await tx.delete(await tx.get("deployments", "default", "dd"))
        assert [event["status"] async for event in told] == ["DELETED"]


async def test_quiet_progress_has_a_heartbeat(deployed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nimhost.api.inference.HEARTBEAT_S", 0.02)
    async with (
        listening(deployed) as client,
        client.stream("GET", f"{DEPLOYMENT}/progress", headers={"accept": "text/event-stream"}) as reply,
    ):
        lines = reply.aiter_lines()
        assert [await anext(lines) for _ in range(4)][2] == ": nothing new"


async def test_models_are_what_the_provider_serves(deployed: World) -> None:
    assert (await deployed("GET", f"{DEPLOYMENT}/models")).json() == {
        "workspace": "default",
        "name": "dd",
        "models": [],
    }
    provider = await deployed.store.get("providers", "default", "dd")
    served = ServedModel(model_entity_id="default/m", served_model_name="m")
    await deployed.store.set_status(provider, ProviderStatus(served_models=[served], host_url="http://127.0.0.1:5"))
    models = (await deployed("GET", f"{DEPLOYMENT}/models")).json()["models"]
    assert models == [{"model_entity_id": "default/m", "served_model_name": "m"}]
    shown = (await deployed("GET", f"{MODELS}/providers/dd")).json()
    assert (shown["host_url"], shown["served_models"]) == ("http://127.0.0.1:5", models)


async def test_a_provider_status_is_changed_in_parts(world: World) -> None:
    await world.make(f"{MODELS}/providers", name="pp", host_url="http://x")
    served = [{"model_entity_id": "default/m", "served_model_name": "m"}]
    path = f"{MODELS}/providers/pp/status"
    body = (await world("PUT", path, {"served_models": served, "model_deployment_id": "default/x"})).json()
    assert (body["served_models"], body["status"], body["model_deployment_id"]) == (served, "CREATED", "default/x")
    assert body["status_message"] == "Model provider created"
    body = (await world("PUT", path, {"status": "READY"})).json()
    assert (body["status"], body["status_message"], body["served_models"]) == ("READY", "", served)
    assert (await world("PUT", path, {"status": "BROKEN"})).status_code == 422
    assert (await world("PUT", path, {"served_models": [{"x": 1}]})).status_code == 422
    short = [{"model_entity_id": "m", "served_model_name": "m"}]
    assert (await world("PUT", path, {"served_models": short})).json()["served_models"] == served
    for wrong in ("", "/m", "default/"):
        body = {"served_models": [{"model_entity_id": wrong, "served_model_name": "m"}]}
        assert (await world("PUT", path, body)).status_code == 422
    assert (await world("PUT", path, {"status_message": "x" * 1001})).status_code == 422
    assert (await world("PUT", f"{MODELS}/providers/nope/status", {})).status_code == 404


@pytest.mark.parametrize("rest", ["logs", "progress", "models"])
async def test_nothing_is_known_about_a_deployment_that_is_not_there(world: World, rest: str) -> None:
    reply = await world("GET", f"{MODELS}/deployments/nope/{rest}")
    assert (reply.status_code, reply.json()["detail"]) == (404, "Deployment 'default/nope' not found")


async def test_a_deployment_status_is_set_with_its_history(deployed: World) -> None:
    path = f"{DEPLOYMENT}/status"
    body = (await deployed("POST", path, {"status": "PENDING", "status_message": "loads"})).json()
    assert (body["status"], body["status_message"], body["model_provider_id"]) == ("PENDING", "loads", "default/dd")
    again = (await deployed("POST", f"{path}?version=1", {"status": "PENDING", "status_message": "loads"})).json()
    assert [h["status"] for h in again["status_history"]] == ["CREATED", "PENDING"]
    body = (await deployed("POST", path, {"status": "READY", "model_provider_id": "default/other"})).json()
    assert (body["status"], body["status_message"], body["model_provider_id"]) == ("READY", "", "default/other")
    assert body["status_history"][-1]["status"] == "READY"


@pytest.mark.parametrize(
    ("query", "body", "status"),
    [
        ("", {}, 422),
        ("", {"status": "FINE"}, 422),
        ("", {"status": "READY", "status_message": "x" * 1001}, 422),
        ("", {"status": "READY", "reason": "x"}, 422),
        ("?version=2", {"status": "READY"}, 404),
        ("?version=x", {"status": "READY"}, 422),
        ("?version=0", {"status": "READY"}, 422),
    ],
)
async def test_a_wrong_deployment_status_is_refused(
    deployed: World, query: str, body: dict[str, str], status: int
) -> None:
    assert (await deployed("POST", f"{DEPLOYMENT}/status{query}", body)).status_code == status
    assert (await deployed("GET", DEPLOYMENT)).json()["status"] == "CREATED"


async def test_a_deployment_that_is_being_deleted_can_only_become_deleted(deployed: World) -> None:
    await deployed("DELETE", DEPLOYMENT)
    refused = await deployed("POST", f"{DEPLOYMENT}/status", {"status": "READY"})
    assert (refused.status_code, refused.json()["detail"]) == (409, "Deployment 'default/dd' is being deleted.")
    assert (await deployed("POST", f"{DEPLOYMENT}/status", {"status": "DELETED"})).status_code == 200


async def test_every_version_is_listed_by_itself_and_all_of_them_in_lists_when_asked(deployed: World) -> None:
    await deployed("POST", DEPLOYMENT, {"config": "cfg", "config_version": 1, "project": "pp"})
    await deployed.make(f"{MODELS}/deployments", name="d2", config="cfg")
    versions = (await deployed("GET", f"{DEPLOYMENT}/versions")).json()
    assert [(v["entity_version"], v["project"]) for v in versions] == [(2, "pp"), (1, None)]
    assert (await deployed("GET", f"{DEPLOYMENT}/versions/1")).json() == versions[1]
    latest = (await deployed("GET", f"{MODELS}/deployments?sort=name")).json()
    assert [(d["name"], d["entity_version"]) for d in latest["data"]] == [("d2", 1), ("dd", 2)]
    every = (await deployed("GET", f"{MODELS}/deployments?sort=-updated_at&all_versions=true&page_size=2")).json()
    assert [(d["name"], d["entity_version"]) for d in every["data"]] == [("d2", 1), ("dd", 2)]
    assert every["pagination"]["total_results"] == 3
    one = (await deployed("GET", f"{MODELS}/deployments?all_versions=true&filter[project]=pp")).json()["data"]
    assert [(d["name"], d["entity_version"]) for d in one] == [("dd", 2)]
    for wrong, status in (("9", 404), ("x", 400), ("0", 404), ("9" * 30, 404)):
        assert (await deployed("GET", f"{DEPLOYMENT}/versions/{wrong}")).status_code == status


async def test_an_old_version_goes_unless_it_runs(deployed: World) -> None:
    config = f"{MODELS}/deployment-configs/cfg"
    body = {"engine": "nim", "model_spec": {}, "executor_config": {"gpu": 0}}
    for _ in range(2):
        await deployed("POST", config, body)
    await deployed("POST", DEPLOYMENT, {"config": "cfg", "config_version": 2})
    used = await deployed("DELETE", f"{config}/versions/2")
    assert (used.status_code, "default/dd" in used.json()["detail"]) == (409, True)
    assert (await deployed("DELETE", f"{config}/versions/3")).status_code == 409
    assert (await deployed("DELETE", f"{config}/versions/1")).status_code == 204
    assert [v["entity_version"] for v in (await deployed("GET", f"{config}/versions")).json()] == [3, 2]
    assert (await deployed("DELETE", f"{DEPLOYMENT}/versions/1")).status_code == 202


@pytest.mark.parametrize("status", ["READY", "ERROR"])
async def test_a_status_of_before_a_change_is_not_taken_for_its_outcome(deployed: World, status: Status) -> None:
    entity = await deployed.store.get("deployments", "default", "dd")
    seen = replace(entity.status.moved(status, "as it was", "t"), run=Run(version=1, config_version=1))
    await deployed.store.set_status(entity, seen)
    assert (await deployed("GET", f"{DEPLOYMENT}/progress")).json()["update"] is None
    config = (await deployed("GET", f"{MODELS}/deployment-configs/cfg")).json()
    body = {"engine": config["engine"], "model_spec": {}, "executor_config": {"gpu": 1, "additional_args": ["--new"]}}
    assert (await deployed("POST", f"{MODELS}/deployment-configs/cfg", json=body)).json()["entity_version"] == 2
    for path in (DEPLOYMENT, f"{DEPLOYMENT}/progress"):
        shown = (await deployed("GET", path)).json()
        assert (shown["status"], shown["update"]) == (status, "rolling")
    entity = await deployed.store.get("deployments", "default", "dd")
    await deployed.store.set_status(entity, replace(entity.status, run=Run(version=1, config_version=2)))
    assert (await deployed("GET", f"{DEPLOYMENT}/progress")).json()["update"] is None
