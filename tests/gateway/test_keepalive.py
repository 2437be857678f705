"""Comments before the first byte, for streams that take long to begin."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from nimhost.config import Gateway as GatewaySettings
from nimhost.gateway import keepalive
from tests.fakes.engine import FakeEngine, Faults
from tests.gateway.conftest import Door, G, engine_upstream, open_door
from tests.support import eventually

COMMENT = keepalive.COMMENT
OPENAI = f"{G}/default/openai/-/v1/chat/completions"
PROVIDER = f"{G}/default/provider/p/-/v1/chat/completions"
STREAM = b'{"model":"qwen-served","stream":true}'
JSON = ["Content-Type: application/json", "Accept-Encoding: gzip"]

pytestmark = pytest.mark.fault(26)


@pytest.fixture
async def patient(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Door]:
    monkeypatch.setattr(keepalive, "PAUSE_S", 0.05)
    async with open_door(GatewaySettings(keepalive_comments=True, first_byte_timeout_s=2)) as door:
        door.route(engine_upstream(engine))
        yield door


@pytest.mark.parametrize(("path", "body"), [(OPENAI, b'{"model":"qwen","stream": true}'), (PROVIDER, STREAM)])
async def test_stream_that_takes_long_to_begin_has_comments_and_then_every_byte(
    patient: Door, engine: FakeEngine, path: str, body: bytes
) -> None:
    engine.faults = Faults(gzip=True)
    quick = await patient.ask("POST", path, body, ["Content-Type: application/json"])
    assert COMMENT not in quick.body
    engine.faults = Faults(gzip=True, first_byte_delay_s=0.3)
    slow = await patient.ask("POST", path, body, JSON)
    assert (slow.status, slow.whole) == (200, True)
    assert slow.headers["content-type"].startswith("text/event-stream")
    assert slow.body.count(COMMENT) >= 3
    assert slow.body.replace(COMMENT, b"") == quick.body
    assert "content-encoding" not in slow.headers


async def test_error_after_a_comment_is_an_event(patient: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(first_byte_delay_s=0.15, status=400, body='{"error": "too long"}')
    reply = await patient.ask("POST", OPENAI, b'{"model":"qwen","stream":true}', JSON)
    assert reply.status == 200
    event = json.loads(reply.body.rpartition(b"data: ")[2])
    assert event["error"]["code"] == "upstream_error"
    assert "HTTP 400" in event["error"]["message"]
    assert "too long" in event["error"]["message"]


async def test_engine_that_never_answers_is_an_event_in_time(patient: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(hang=True)
    async with open_door(GatewaySettings(keepalive_comments=True, first_byte_timeout_s=0.2)) as door:
        door.route(engine_upstream(engine))
        reply = await door.ask("POST", OPENAI, b'{"model":"qwen","stream":true}', JSON)
    assert reply.body.startswith(COMMENT)
    assert json.loads(reply.body.rpartition(b"data: ")[2])["error"]["code"] == "upstream_timeout"


async def test_what_is_no_stream_waits_for_its_status(patient: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(first_byte_delay_s=0.2, status=429)
    for body in (b'{"model":"qwen"}', b'{"model":"qwen","stream":false}', b'{"model":"qwen","n":{"stream":true}}'):
        assert (await patient.ask("POST", OPENAI, body, JSON)).status == 429


async def test_client_that_leaves_between_comments_takes_the_upstream_with_it(
    patient: Door, engine: FakeEngine
) -> None:
    engine.faults = Faults(hang=True)
    reader, writer = await patient.open("POST", OPENAI, b'{"model":"qwen","stream":true}', JSON)
    await reader.readuntil(COMMENT)
    writer.close()
    await eventually(lambda: engine.cancelled == 1)


async def test_there_are_none_unless_switched_on(
    door: Door, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepalive, "PAUSE_S", 0.05)
    door.route(engine_upstream(engine))
    engine.faults = Faults(first_byte_delay_s=0.2)
    reply = await door.ask("POST", OPENAI, b'{"model":"qwen","stream":true}', JSON)
    assert COMMENT not in reply.body
