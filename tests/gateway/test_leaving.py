"""An engine on its way out: whether it has requests still, and that nobody is sent there any more."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes.engine import FakeEngine, Faults
from tests.gateway.conftest import Door, G, Reply, engine_upstream
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
