"""A token that is revoked while something it asked for is under way: what the client gets, and what is known of it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import pytest

from nimhost.api.access import TokenTable
from nimhost.api.app import entry
from nimhost.config import Server, Settings
from nimhost.tokens import remember, spell
from tests.fakes.engine import FakeEngine, Faults
from tests.gateway.conftest import Door, G, Reply, engine_upstream, open_door
from tests.support import eventually

CHAT = f"{G}/default/provider/p/-/v1/chat/completions"
STREAM = b'{"model":"qwen-served","stream":true}'
TEXT = spell(b"laptop".ljust(32))
BEARER = [f"Authorization: Bearer {TEXT}"]
WHY = "This API token has been revoked."


@pytest.fixture
def tokens() -> TokenTable:
    return TokenTable(stored=[remember("laptop", ["inference"], TEXT, "2026-01-01T00:00:00Z")])


@pytest.fixture
async def guarded(tokens: TokenTable, engine: FakeEngine) -> AsyncIterator[Door]:
    async def nothing(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nobody asks the control plane here")

    settings = Settings(server=Server(host="0.0.0.0", allowed_hosts=["gateway"]))
    async with open_door(before=lambda gateway: entry(nothing, gateway, settings, tokens)) as door:
        door.route(engine_upstream(engine))
        yield door


async def test_before_its_reply_has_begun_it_is_401_for_the_client_and_in_the_log(
    guarded: Door, engine: FakeEngine, tokens: TokenTable
) -> None:
    engine.faults = Faults(hang=True)
    reader, writer = await guarded.open("POST", CHAT, STREAM, BEARER)
    await eventually(lambda: engine.requests)
    tokens.put([])
    reply = Reply(await reader.read())
    writer.close()
    assert (reply.status, reply.json()["detail"]) == (401, WHY)
    (one,) = guarded.gateway.traffic.log.after(0)
    assert (one["status"], one["error"], one["error_message"]) == (401, "cut_off", WHY)
    await eventually(lambda: engine.cancelled == 1)


async def test_a_stream_is_broken_off_and_the_log_says_why(
    guarded: Door, engine: FakeEngine, tokens: TokenTable, caplog: pytest.LogCaptureFixture
) -> None:
    engine.faults = Faults(hang_after_chunks=2)
    reader, writer = await guarded.open("POST", CHAT, STREAM, BEARER)
    await reader.readuntil(b"data: ")
    with caplog.at_level(logging.ERROR):
        tokens.put([])
        assert not (await reader.read()).endswith(b"0\r\n\r\n")
    writer.close()
    (one,) = guarded.gateway.traffic.log.after(0)
    assert (one["status"], one["error"], one["error_message"]) == (200, "cut_off", WHY)
    await eventually(lambda: engine.cancelled == 1)
    assert not caplog.records, "nothing went wrong here"
