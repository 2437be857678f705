"""Large bodies, of all requests together: their room is limited and given back; small ones need none of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from nimhost.errors import NotReady
from nimhost.gateway import buffers, proxy
from nimhost.gateway.buffers import BUFFERS, Buffers
from nimhost.gateway.incoming import LARGE_BYTES
from nimhost.gateway.memory import trim
from nimhost.gateway.translate import pairs
from nimhost.gateway.translated import Interpreter
from tests.fakes.engine import FakeEngine
from tests.gateway.conftest import Door, G, Reply, engine_upstream
from tests.support import eventually

MB = 1 << 20
JSON = "Content-Type: application/json"
ROUTES = [
    f"{G}/default/openai/-/v1/chat/completions",
    f"{G}/default/model/qwen/-/v1/chat/completions",
    f"{G}/default/provider/p/-/v1/chat/completions",
    "/v1/chat/completions",
]


@pytest.fixture(autouse=True)
def routed(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine, required_body={"model": "qwen-served"}))


@asynccontextmanager
async def half_sent(door: Door, path: str, size: int) -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    """A chat of which `size` bytes are there, and its end is not. Yields how to read its reply, and to send the end."""
    body = b'{"model": "qwen", "messages": [], "pad": "' + b"x" * size
    reader, writer = await door.open("POST", path, body, [JSON, f"Content-Length: {len(body) + 2}"])
    try:
        yield reader, lambda: writer.write(b'"}')
    finally:
        writer.close()


@pytest.mark.fault(40)
@pytest.mark.parametrize("path", ROUTES)
async def test_large_bodies_beyond_the_room_for_them_are_503_and_small_ones_are_served(
    door: Door, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(BUFFERS, "limit_bytes", 4 * MB)
    async with half_sent(door, path, 3 * MB) as (reader, send_end):
        await eventually(lambda: BUFFERS.held_bytes > 2 * MB, 20)
        refused = await door.ask("POST", path, b'{"model": "qwen", "pad": "%b"}' % (b"x" * 3 * MB), [JSON])
        assert (refused.status, refused.headers["retry-after"]) == (503, "2")
        assert "no room for another large request" in refused.json()["error"]["message"]
        small = await door.ask("POST", path, b'{"model": "qwen", "messages": []}', [JSON])
        assert small.status == 200
        send_end()
        assert Reply(await reader.read()).status == 200
    await eventually(lambda: BUFFERS.held_bytes == 0, 20)
    whole = b'{"model": "qwen", "messages": [], "pad": "%b"}' % (b"x" * 3 * MB)
    assert (await door.ask("POST", path, whole, [JSON])).status == 200


@pytest.mark.fault(40)
async def test_clients_that_leave_in_the_middle_give_their_room_back(door: Door, engine: FakeEngine) -> None:
    async with half_sent(door, ROUTES[0], 3 * MB), half_sent(door, ROUTES[1], 3 * MB):
        await eventually(lambda: BUFFERS.held_bytes > 5 * MB, 20)
    await eventually(lambda: BUFFERS.held_bytes == 0, 20)
    assert not engine.requests


async def test_an_upload_that_is_passed_on_needs_no_room(
    door: Door, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BUFFERS, "limit_bytes", 1)
    door.route(engine_upstream(engine, policy="generic"))
    path = f"{G}/default/provider/p/-/v1/audio/transcriptions"
    reply = await door.ask("POST", path, bytes(3 * MB), ["Content-Type: audio/wav"])
    assert reply.status == 200
    assert len(engine.requests[-1].body) == 3 * MB


# --- the measure itself


def test_what_is_taken_must_be_given_before_more_can_be_had() -> None:
    room = Buffers(limit_bytes=10)
    first, second = room.hold(), room.hold()
    first.add(6)
    first.add(4)
    with pytest.raises(NotReady):
        second.add(1)
    assert (room.held_bytes, second.size_bytes) == (10, 0)


async def test_memory_goes_back_to_the_system_once_most_of_it_was_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = threading.Event()
    monkeypatch.setattr(buffers, "QUIET_S", 0.01)
    monkeypatch.setattr(buffers, "trim", trimmed.set)
    room = Buffers()
    small, large, rest = room.hold(), room.hold(), room.hold()
    small.add(buffers.TRIM_ABOVE_BYTES)
    small.let_go()
    await asyncio.sleep(0.05)
    assert not trimmed.is_set(), "so little is kept for the next one"
    rest.add(MB)
    large.add(2 * buffers.TRIM_ABOVE_BYTES)
    large.let_go()
    await eventually(trimmed.is_set)
    assert room.held_bytes == MB


def test_trimming_is_possible_here() -> None:
    trim()


# --- and the loop


async def test_a_large_request_is_translated_beside_the_loop(
    door: Door, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []

    def interpret(*args: Any) -> Interpreter:
        threads.append(threading.current_thread() is threading.main_thread())
        return Interpreter(*args)

    monkeypatch.setattr(proxy, "Interpreter", interpret)
    door.route(engine_upstream(engine, policy="generic"))
    for size in (10, LARGE_BYTES):
        asked = {"model": "qwen", "max_tokens": 5, "messages": [{"role": "user", "content": "x" * size}]}
        reply = await door.ask("POST", "/v1/messages", json.dumps(asked).encode(), [JSON])
        assert (reply.status, reply.json()["type"]) == (200, "message")
    assert threads == [True, False]


@pytest.mark.parametrize("text", ['[1, {"a": [2]}, "x", null]', "[]", '{"a": [1]}', '"[x]"', "1.5", "null", " [ 1 ] "])
def test_a_value_is_read_and_written_item_by_item_as_it_would_be_at_once(text: str) -> None:
    value = json.loads(text)
    assert pairs._read(Raw(text.encode())) == value
    assert msgspec.json.decode(pairs._write(value)) == value
