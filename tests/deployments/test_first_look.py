"""Between the start of a daemon and its first look: what is stored is known, where the engines are is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.engine import FakeEngine
from tests.support import eventually
from tests.world import MODELS, World

GATEWAY = "/apis/inference-gateway/v2/workspaces/default"
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


@asynccontextmanager
async def not_looked_yet(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """The daemon starts again, and Docker takes its time."""
    await world.stop()
    held, asked, real = asyncio.Event(), asyncio.Event(), world.docker.list

    async def slow() -> Any:
        asked.set()
        await held.wait()
        return await real()

    monkeypatch.setattr(world.docker, "list", slow)
    starting = asyncio.create_task(world.start())
    await asyncio.wait_for(asked.wait(), 5)
    try:
        yield
    finally:
        held.set()
        await starting


async def test_known_models_are_asked_to_wait_and_unknown_ones_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World(tmp_path) as world:
        await world.deploy("one")
        await world.wait("one", "READY")

        async def chat(path: str, model: str) -> tuple[int, bool, str]:
            reply = await world.http.post(f"{path}/chat/completions", json={"model": model, **CHAT})
            return reply.status_code, "retry-after" in reply.headers, reply.text

        routes = [
            (f"{GATEWAY}/provider/one/-/v1", "fake"),
            (f"{GATEWAY}/model/fake/-/v1", "x"),
            (f"{GATEWAY}/openai/-/v1", "default/fake"),
            ("/v1", "default/fake"),
        ]
        assert {(await chat(*route))[0] for route in routes} == {200}
        async with not_looked_yet(world, monkeypatch):
            for route in routes:
                status, retry_after, text = await chat(*route)
                assert (status, retry_after) == (503, True), (route, text)
                assert "nimhost has just started" in text
            assert (await chat("/v1", "default/nonsense"))[0] == 404
            assert (await chat(f"{GATEWAY}/provider/nonsense/-/v1", "x"))[0] == 404
            assert (await world.http.get("/v1/models")).json()["data"] == []
        assert {(await chat(*route))[0] for route in routes} == {200}


async def test_a_deployment_that_does_not_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with World(tmp_path) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        await world.http.post(f"{MODELS}/deployments/one/stop")
        await world.wait("one", "PENDING", "nimhost start one")
        async with not_looked_yet(world, monkeypatch):
            reply = await world.http.post(f"{GATEWAY}/provider/one/-/v1/chat/completions", json={"model": "x", **CHAT})
            assert (reply.status_code, "nimhost start one" in reply.text) == (503, True)


async def test_providers_elsewhere_are_reached_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = FakeEngine(served=("gpt-x",))
    await elsewhere.start()
    async with World(tmp_path) as world:
        url = f"http://127.0.0.1:{elsewhere.port}"
        await world.post(f"{MODELS}/providers", {"name": "away", "host_url": url})

        async def chat() -> int:
            path = f"{GATEWAY}/model/gpt-x/-/v1/chat/completions"
            return (await world.http.post(path, json={"model": "x", **CHAT})).status_code

        async def reached() -> bool:
            return await chat() == 200

        await eventually(reached, 10)
        async with not_looked_yet(world, monkeypatch):
            assert await chat() == 200
    await elsewhere.stop()
