"""A deployment that is made, or stopped, while the reconciler is looking: what clients are told meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nimhost.deployments.publish import provider_status
from nimhost.entities import DeploymentStatus, ProviderStatus, ServedModel
from tests.deployments.make import instance, wanted
from tests.support import eventually
from tests.world import MODELS, World

GATEWAY = "/apis/inference-gateway/v2/workspaces/default"


async def test_a_model_whose_deployment_is_made_during_a_look_waits_and_is_not_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World(tmp_path) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        held, looking, real = asyncio.Event(), asyncio.Event(), world.docker.list

        async def slow() -> Any:
            found = await real()
            looking.set()
            await held.wait()
            return found

        monkeypatch.setattr(world.docker, "list", slow)
        world.daemon.reconciler.wake()
        await looking.wait()
        tables = []
        route = world.daemon.router.route

        async def routed(verdicts: Any) -> Any:
            found = await route(verdicts)
            tables.append(world.daemon.gateway.table)
            return found

        monkeypatch.setattr(world.daemon.router, "route", routed)
        await world.deploy("two")
        held.set()
        await world.wait("two", "READY")
        assert tables
        assert all("two" in {ref.name for ref in table.providers} for table in tables)


async def test_what_a_reply_says_is_so_for_the_next_request_though_the_round_after_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World(tmp_path) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        (engine,) = world.engines.values()
        never = asyncio.Event()
        monkeypatch.setattr(world.docker, "list", never.wait)

        async def asked(name: str) -> int:
            path = f"{GATEWAY}/provider/{name}/-/v1/chat/completions"
            return (await world.http.post(path, json={"model": "fake", "messages": []})).status_code

        here, nowhere = {"host_url": f"http://127.0.0.1:{engine.port}"}, {"host_url": "http://127.0.0.1:9"}
        await world.post(f"{MODELS}/providers", {"name": "ext", **here})
        assert await asked("ext") == 200
        assert (await world.http.put(f"{MODELS}/providers/ext", json=nowhere)).status_code == 200
        assert await asked("ext") == 502
        keyed = {**here, "api_key_secret_name": "key"}
        await world.post("/apis/secrets/v2/workspaces/default/secrets", {"name": "key", "value": "k"})
        assert (await world.http.put(f"{MODELS}/providers/ext", json=keyed)).status_code == 200
        assert await asked("ext") == 200
        assert (await world.http.delete(f"{MODELS}/providers/ext")).is_success
        assert await asked("ext") == 404
        await world.post(f"{MODELS}/deployments", {"name": "two", "config": "one"})
        assert await asked("two") == 503
        assert await asked("one") == 200
        never.set()


def test_what_an_engine_serves_is_not_forgotten_while_it_is_not_probed_yet() -> None:
    """After a restart an engine that was READY has its requests at once."""
    d, before = wanted(), ProviderStatus(status="READY", served_models=[ServedModel("default/q", "q")])
    status = DeploymentStatus(status="READY")
    unknown = provider_status(d, status, instance(health="unknown"), before)
    assert (unknown.served_models, unknown.status_message) == (before.served_models, "")
    assert provider_status(d, status, instance(health="ok"), before).served_models == []


async def test_a_stop_is_told_once_and_its_logs_say_where_they_went(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        await world.http.post(f"{MODELS}/deployments/one/stop")
        stopped = await world.wait("one", "PENDING", "Stopped. Start it with: nimhost start one")
        said = [entry["status_message"] for entry in stopped["status_history"]]
        assert said[-2:] == ["Stopping.", "Stopped. Start it with: nimhost start one"]
        assert said.count("Stopping.") == 1

        async def gone() -> bool:
            return (await world.http.get(f"{MODELS}/deployments/one/logs")).status_code == 503

        await eventually(gone)
        reply = (await world.http.get(f"{MODELS}/deployments/one/logs")).json()
        assert reply["detail"] == "Deployment 'default/one' is stopped: there is no container, and so no logs."
        assert reply["hint"] == "Start it with: nimhost start one"
