"""Statuses that a client writes count at once, and what the daemon knows better it says again at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fakes.engine import FakeEngine
from tests.support import eventually
from tests.world import MODELS, World

PROVIDERS = f"{MODELS}/providers"
SOON_S = 10.0
"""Less than the minute in which the loop looks at everything anyway."""


async def provider(world: World, name: str = "up") -> Any:
    return (await world.http.get(f"{PROVIDERS}/{name}")).json()


async def ready(world: World, name: str = "up") -> bool:
    return bool((await provider(world, name))["status"] == "READY")


async def test_models_that_a_client_says_a_provider_serves_are_reached_at_once(tmp_path: Path) -> None:
    engine = FakeEngine(served=("one",))
    await engine.start()
    async with World(tmp_path) as world:
        await world.post(PROVIDERS, {"name": "up", "host_url": f"http://127.0.0.1:{engine.port}/v1"})
        await eventually(lambda: ready(world), SOON_S)
        served = [{"model_entity_id": "default/other", "served_model_name": "one"}]
        assert (await world.http.put(f"{PROVIDERS}/up/status", json={"served_models": served})).status_code == 200

        async def answers() -> bool:
            body = {"model": "other", "messages": [{"role": "user", "content": "x"}]}
            return (await world.http.post("/v1/chat/completions", json=body)).status_code == 200

        await eventually(answers, SOON_S)
    await engine.stop()


async def test_a_provider_that_a_client_gives_up_is_asked_again_at_once(tmp_path: Path) -> None:
    engine = FakeEngine(served=("one",))
    await engine.start()
    async with World(tmp_path) as world:
        await world.post(PROVIDERS, {"name": "up", "host_url": f"http://127.0.0.1:{engine.port}/v1"})
        await eventually(lambda: ready(world), SOON_S)
        before = await provider(world)
        changed = await world.http.put(f"{PROVIDERS}/up/status", json={"status": "ERROR"})
        assert (changed.json()["status"], changed.json()["status_message"]) == ("ERROR", "")
        await eventually(lambda: ready(world), SOON_S)
        assert (await provider(world))["served_models"] == before["served_models"]
        await engine.stop()
        await world.http.put(f"{PROVIDERS}/up/status", json={"status": "LOST"})

        async def told() -> bool:
            now = await provider(world)
            return now["status"] == "ERROR" and "Cannot reach" in now["status_message"]

        await eventually(told, SOON_S)


async def test_a_deployment_that_a_client_gives_up_is_what_it_is(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        body = {"status": "ERROR", "status_message": "given up"}
        assert (await world.http.post(f"{MODELS}/deployments/one/status", json=body)).json()["status"] == "ERROR"
        found = await world.wait("one", "READY", timeout_s=SOON_S)
        assert [entry["status"] for entry in found["status_history"]][-2:] == ["ERROR", "READY"]
        await world.http.put(f"{PROVIDERS}/one/status", json={"status": "ERROR"})
        await eventually(lambda: ready(world, "one"), SOON_S)
