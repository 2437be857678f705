"""An engine on its way out: whether it has requests still, and that nobody is sent there any more."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nimhost.config import Gateway as GatewaySettings
from nimhost.gateway.incoming import LARGE_BYTES
from nimhost.gateway.translate.pairs import NEEDED
from tests.fakes.engine import FakeEngine, Faults
from tests.gateway.conftest import Door, G, Reply, engine_upstream, open_door, unanswering
from tests.support import eventually

ROUTES = {
    "provider": f"{G}/default/provider/p/-/v1/chat/completions",
    "model": f"{G}/default/model/qwen/-/v1/chat/completions",
    "openai": f"{G}/default/openai/-/v1/chat/completions",
    "short": "/v1/chat/completions",
}
ASK = b'{"model":"qwen-served","messages":[{"role":"user","content":"hi"}]}'
STREAM = b'{"model":"qwen-served","stream":true}'


@pytest.fixture
async def newer() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(served=("qwen-served",), tag="b") as engine:
        yield engine


@pytest.fixture
def idle(door: Door, engine: FakeEngine) -> list[str]:
    """Grows each time the gateway tells that an engine has no more requests."""
    told: list[str] = []
    door.gateway.on_idle = lambda: told.append("idle")
    door.route(engine_upstream(engine))
    return told


async def test_an_engine_is_busy_until_its_last_request_has_ended(
    door: Door, engine: FakeEngine, newer: FakeEngine, idle: list[str]
) -> None:
    engine.faults = Faults(chunks=100_000, chunk_delay_s=0.01)
    writers = []
    for _ in range(3):
        reader, writer = await door.open("POST", ROUTES["provider"], STREAM)
        await reader.readuntil(b"data: ")
        writers.append(writer)
    assert door.gateway.is_busy(engine.url)
    door.route(engine_upstream(newer))
    assert door.gateway.is_busy(engine.url)
    assert (await door.chat(ASK)).headers["x-fake-instance"] == "b"
    for writer in writers:
        assert idle == []
        writer.close()
    await eventually(lambda: idle == ["idle"])
    assert not door.gateway.is_busy(engine.url)


async def test_an_engine_without_requests_is_not_busy(
    door: Door, engine: FakeEngine, newer: FakeEngine, idle: list[str]
) -> None:
    assert (await door.chat(ASK)).status == 200
    assert not door.gateway.is_busy(engine.url)
    door.route(engine_upstream(newer))
    assert not door.gateway.is_busy(engine.url)
    assert (await door.chat(ASK)).status == 200
    assert idle == []


async def test_an_engine_that_comes_back_is_one_like_any_other(
    door: Door, engine: FakeEngine, newer: FakeEngine, idle: list[str]
) -> None:
    engine.faults = Faults(chunks=100_000, chunk_delay_s=0.01)
    reader, writer = await door.open("POST", ROUTES["provider"], STREAM)
    await reader.readuntil(b"data: ")
    door.route(engine_upstream(newer))
    door.route(engine_upstream(engine))
    assert door.gateway.is_busy(engine.url)
    writer.close()
    await eventually(lambda: not door.gateway.is_busy(engine.url))
    assert idle == []


@pytest.mark.parametrize("route", ROUTES)
async def test_a_request_whose_body_is_still_coming_goes_to_who_serves_then(
    door: Door, engine: FakeEngine, newer: FakeEngine, idle: list[str], route: str
) -> None:
    """The engine it would have gone to has no requests, so it may be gone already."""
    body = ASK if route == "provider" else ASK.replace(b"qwen-served", b"default/qwen")
    framing = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    reader, writer = await door.open("POST", ROUTES[route], headers=framing)
    await eventually(lambda: len(door.server.server_state.connections) == 1)
    await door.ask("GET", f"{G}/default/openai/-/v1/models")  # meanwhile the head of the other has been read
    door.route(engine_upstream(newer))
    await engine.stop()
    writer.write(body)
    reply = Reply(await reader.read())
    writer.close()
    assert (reply.status, reply.headers.get("x-fake-instance")) == (200, "b")


async def test_an_engine_stays_while_a_large_request_for_it_is_translated(
    door: Door, engine: FakeEngine, newer: FakeEngine, idle: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, known = threading.Event(), threading.Event(), NEEDED["OPENAI_CHAT"]["v1/messages"]

    def ask(*args: Any) -> Any:
        begun.set()
        assert go.wait(10)
        return known.ask(*args)

    monkeypatch.setitem(NEEDED["OPENAI_CHAT"], "v1/messages", known._replace(ask=ask))
    door.route(engine_upstream(engine, policy="generic"))
    message = {"role": "user", "content": "x" * LARGE_BYTES}
    body = json.dumps({"model": "qwen", "max_tokens": 5, "messages": [message]}).encode()
    asking = asyncio.create_task(door.ask("POST", "/v1/messages", body, ["Content-Type: application/json"]))
    await eventually(begun.is_set)
    door.route(engine_upstream(newer, policy="generic"))
    busy = door.gateway.is_busy(engine.url), door.gateway.is_busy(newer.url)
    go.set()
    assert busy == (True, False)
    assert (await asking).headers["x-fake-instance"] == "a"
    await eventually(lambda: idle == ["idle"])
    assert [standing.under_way for standing in door.gateway.standings.values()] == [0]


async def test_who_stands_in_for_another_is_asked_where_it_is_by_then(engine: FakeEngine, newer: FakeEngine) -> None:
    """The table changes while the first one is waited for."""
    with unanswering() as port:
        silent = engine_upstream(engine, "p", base_url=f"http://127.0.0.1:{port}")
        async with open_door(GatewaySettings(connect_timeout_s=0.3)) as door:
            for then, status in ((newer, 200), (None, 504)):
                door.route(silent, engine_upstream(engine, "q"))
                asking = asyncio.create_task(door.ask("POST", ROUTES["short"], b'{"model":"qwen"}'))
                await eventually(lambda: door.gateway.is_busy(silent.base_url))
                door.route(silent, *([engine_upstream(then, "q")] if then else []))
                assert (await asking).status == status
    assert (len(engine.requests), len(newer.requests)) == (0, 1)
