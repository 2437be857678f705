"""Clients that leave, engines that hang, die or lie, and readers that do not read."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator

import pytest

from nimhost.config import Gateway as GatewaySettings
from nimhost.entities import ServedModel
from nimhost.gateway.cycle import Receive, Scope, Send
from tests.fakes.engine import CONTROL_PATHS, FakeEngine, Faults
from tests.gateway.conftest import Door, G, Reply, engine_upstream, open_door
from tests.support import eventually

PROVIDER = f"{G}/default/provider/p/-"
CHAT_PATH = f"{PROVIDER}/v1/chat/completions"
OPENAI = f"{G}/default/openai/-/v1/chat/completions"
STREAM = b'{"model":"qwen-served","stream":true}'
WHOLE = b'{"model":"qwen-served"}'
CANCELLED_WITHIN_S = 0.1
HALF = b'data: {"half": "an ev'


@pytest.fixture
async def hasty(engine: FakeEngine) -> AsyncIterator[Door]:
    """A gateway with short limits."""
    async with open_door(GatewaySettings(connect_timeout_s=0.2, first_byte_timeout_s=0.3, idle_timeout_s=0.2)) as door:
        door.route(engine_upstream(engine))
        yield door


@pytest.fixture(autouse=True)
def routed(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine))


def last_event(reply: Reply) -> dict[str, dict[str, str]]:
    """The data of the last event of a stream."""
    event = reply.body.rstrip(b"\n").rpartition(b"\n\n")[2]
    found: dict[str, dict[str, str]] = json.loads(event.removeprefix(b"data: "))
    return found


# --- the client leaves


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("faults", "body"),
    [
        (Faults(hang=True), WHOLE),
        (Faults(hang=True), STREAM),
        (Faults(hang_after_chunks=3), STREAM),
        (Faults(chunks=100_000, chunk_delay_s=0.01), STREAM),
        (Faults(chunks=100_000, chunk_bytes=5_000), STREAM),
    ],
    ids=["before-the-first-byte", "stream-before-the-first-byte", "stream-that-hangs", "slow-stream", "fast-stream"],
)
@pytest.mark.parametrize("after_s", [0.0, 0.06], ids=["at-once", "later"])
@pytest.mark.parametrize("abort", [False, True], ids=["fin", "reset"])
async def test_client_that_leaves_takes_the_upstream_with_it(
    door: Door, engine: FakeEngine, faults: Faults, body: bytes, after_s: float, abort: bool
) -> None:
    engine.faults = faults
    reader, writer = await door.open("POST", CHAT_PATH, body)
    await eventually(lambda: engine.requests)
    if not faults.hang:
        await reader.readuntil(b"data: ")
    await asyncio.sleep(after_s)
    left = time.monotonic()
    writer.transport.abort() if abort else writer.close()
    await eventually(lambda: engine.cancelled == 1)
    assert engine.cancelled_at is not None
    assert engine.cancelled_at - left < CANCELLED_WITHIN_S
    await eventually(lambda: not engine.connections)
    await eventually(lambda: engine.open_streams == 0)


@pytest.mark.fault(25)
@pytest.mark.parametrize("size_bytes", [70_000, 250_000, 2_000_000])
@pytest.mark.parametrize("path", [CHAT_PATH, OPENAI], ids=["streamed-on", "read-whole"])
async def test_client_that_leaves_after_a_large_body_takes_the_upstream_with_it(
    door: Door, engine: FakeEngine, size_bytes: int, path: str
) -> None:
    """Its last piece alone may be more than is read ahead."""
    engine.faults = Faults(hang=True)
    _, writer = await door.open("POST", path, b'{"model":"default/qwen","x":"%b"}' % (b"x" * size_bytes))
    await eventually(lambda: engine.requests)
    left = time.monotonic()
    writer.close()
    await eventually(lambda: engine.cancelled == 1)
    assert engine.cancelled_at is not None
    assert engine.cancelled_at - left < CANCELLED_WITHIN_S


@pytest.mark.fault(25)
async def test_client_that_leaves_during_its_upload_takes_the_upstream_with_it(door: Door, engine: FakeEngine) -> None:
    headers = ["Content-Length: 1000000"]
    _, writer = await door.open("POST", f"{PROVIDER}/v1/audio/transcriptions", b"x" * 100_000, headers)
    await eventually(lambda: engine.connections)
    writer.close()
    await eventually(lambda: not engine.connections, timeout_s=CANCELLED_WITHIN_S * 3)
    assert not engine.requests


@pytest.mark.fault(25)
async def test_client_that_leaves_before_its_body_is_complete_costs_the_engine_nothing(
    door: Door, engine: FakeEngine
) -> None:
    _, writer = await door.open("POST", OPENAI, b'{"model"', ["Content-Length: 1000"])
    await asyncio.sleep(0.05)
    writer.close()
    await asyncio.sleep(0.05)
    assert engine.connections_made == 0


async def test_others_are_not_disturbed_by_a_client_that_leaves(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(chunks=50, chunk_delay_s=0.005)
    staying = [asyncio.create_task(door.ask("POST", CHAT_PATH, STREAM)) for _ in range(10)]
    for _ in range(10):
        reader, writer = await door.open("POST", CHAT_PATH, STREAM)
        await reader.readuntil(b"data: ")
        writer.close()
    replies = await asyncio.gather(*staying)
    assert all(reply.whole and reply.body.endswith(b"data: [DONE]\n\n") for reply in replies)
    await eventually(lambda: engine.cancelled == 10)


# --- the upstream dies


@pytest.mark.fault(27)
async def test_stream_that_breaks_off_ends_with_a_typed_event_and_without_an_end(
    door: Door, engine: FakeEngine
) -> None:
    engine.faults = Faults(drop_after_chunks=4)
    reply = await door.ask("POST", OPENAI, b'{"model":"qwen","stream":true}')
    assert reply.status == 200
    assert not reply.whole
    assert b"[DONE]" not in reply.body
    assert last_event(reply)["error"]["code"] == "upstream_error"
    assert "default/p" in last_event(reply)["error"]["message"]
    assert len(engine.requests) == 1


@pytest.mark.fault(27)
async def test_stream_that_breaks_off_is_logged_once_and_not_as_an_error_of_ours(
    door: Door, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nimhost.gateway")
    engine.faults = Faults(drop_after_chunks=4)
    await door.ask("POST", CHAT_PATH, STREAM)
    assert [record.levelname for record in caplog.records if "broke off" in record.getMessage()] == ["WARNING"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]

    async def forgets(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    door.server.config.loaded_app = forgets
    await door.ask("GET", "/")
    assert [record for record in caplog.records if "without completing response" in record.getMessage()]


@pytest.mark.fault(27)
async def test_error_event_after_half_an_event_stands_on_its_own(door: Door) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n" % (len(HALF), HALF))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    async with server:
        door.route(engine_upstream(FakeEngine(port=server.sockets[0].getsockname()[1])))
        reply = await door.ask("GET", f"{PROVIDER}/v1/models")
    assert reply.body.startswith(HALF + b"\n\ndata: ")
    assert last_event(reply)["error"]["code"] == "upstream_error"


@pytest.mark.fault(27)
async def test_what_came_before_the_break_reaches_a_slow_client_whole(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(chunks=3_000, chunk_bytes=10_000, drop_after_chunks=2_000)
    direct = await Door(door.gateway, engine.port).ask("POST", "/v1/chat/completions", STREAM)
    assert direct.body.count(b"data: ") == 2_000
    for _ in range(2):
        reader, writer = await door.open("POST", CHAT_PATH, STREAM, limit=1000)
        raw = b""
        while piece := await reader.read(50_000):
            raw += piece
            await asyncio.sleep(0.001)
        writer.close()
        body = Reply(raw).body
        assert body.startswith(direct.body)
        assert b'"upstream_error"' in body[len(direct.body) :]


@pytest.mark.fault(27)
async def test_compressed_stream_that_breaks_off_gets_nothing_added(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(gzip=True)
    whole = await door.ask("POST", CHAT_PATH, STREAM, ["Accept-Encoding: gzip"])
    engine.faults = Faults(drop_after_chunks=4, gzip=True)
    reply = await door.ask("POST", CHAT_PATH, STREAM, ["Accept-Encoding: gzip"])
    assert not reply.whole
    assert reply.body
    assert whole.body.startswith(reply.body)


@pytest.mark.fault(27)
async def test_reply_of_known_length_that_breaks_off_is_short(door: Door) -> None:
    async def short(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(short, "127.0.0.1", 0)
    async with server:
        door.route(engine_upstream(FakeEngine(port=server.sockets[0].getsockname()[1])))
        reply = await door.ask("GET", f"{PROVIDER}/v1/models")
    assert (reply.status, reply.body, reply.whole) == (200, b"{", False)


@pytest.mark.fault(27)
async def test_engine_that_dies_before_its_answer_is_502_and_not_asked_again(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(exit_after_requests=1)
    reply = await door.ask("POST", CHAT_PATH, WHOLE)
    assert (reply.status, reply.headers["x-nimhost-error"]) == (502, "UpstreamError")
    assert len(engine.requests) == 1
    assert (await door.ask("POST", CHAT_PATH, WHOLE)).status == 502


@pytest.mark.fault(27)
async def test_engine_that_is_not_there_is_502_and_says_where_to_look(door: Door, engine: FakeEngine) -> None:
    await engine.stop()
    reply = await door.ask("POST", OPENAI, b'{"model":"qwen"}')
    assert (reply.status, reply.headers["x-nimhost-error"]) == (502, "UpstreamError")
    assert "onnect" in reply.json()["detail"]
    assert "nimhost logs p" in reply.json()["hint"]
    assert "x-should-retry" not in reply.headers
    await engine.start()
    assert (await door.ask("POST", OPENAI, b'{"model":"qwen"}')).status == 200


@pytest.mark.fault(27)
@pytest.mark.parametrize("junk", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"", b"\x16\x03\x01"])
async def test_upstream_that_speaks_no_http_is_502(door: Door, junk: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(junk)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        door.route(engine_upstream(FakeEngine(port=server.sockets[0].getsockname()[1])))
        reply = await door.ask("GET", f"{PROVIDER}/v1/models")
    assert (reply.status, reply.headers["x-nimhost-error"]) == (502, "UpstreamError")


async def test_malformed_json_is_the_engines_own_answer(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(malformed_json=True)
    reply = await door.ask("POST", CHAT_PATH, WHOLE)
    assert (reply.status, reply.body) == (200, b'{"id": "chatcmpl-fake", "choices": [{"message"')


# --- the upstream is silent


@pytest.mark.fault(28)
@pytest.mark.parametrize("body", [WHOLE, STREAM])
async def test_engine_that_never_answers_is_504_in_time(hasty: Door, engine: FakeEngine, body: bytes) -> None:
    engine.faults = Faults(hang=True)
    began = time.monotonic()
    reply = await hasty.ask("POST", CHAT_PATH, body)
    assert 0.3 <= time.monotonic() - began < 5
    assert (reply.status, reply.headers["x-nimhost-error"]) == (504, "UpstreamTimeout")
    assert reply.headers["x-should-retry"] == "false"
    await eventually(lambda: engine.cancelled == 1)


@pytest.mark.fault(28)
async def test_upstream_that_never_accepts_is_504_in_time(hasty: Door) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:  # until the queue is full and a further connection is not answered
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        hasty.route(engine_upstream(FakeEngine(port=port)))
        reply = await hasty.ask("POST", CHAT_PATH, WHOLE)
        for one in waiting:
            one.close()
    assert (reply.status, reply.headers["x-nimhost-error"]) == (504, "UpstreamTimeout")


@pytest.mark.fault(28)
async def test_stream_that_stops_ends_with_a_typed_event_in_time(hasty: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(hang_after_chunks=2)
    began = time.monotonic()
    reply = await hasty.ask("POST", CHAT_PATH, STREAM)
    assert time.monotonic() - began < 5
    assert not reply.whole
    assert last_event(reply)["error"]["code"] == "upstream_timeout"
    await eventually(lambda: engine.cancelled == 1)


@pytest.mark.fault(28)
async def test_slow_stream_may_take_longer_than_every_limit(hasty: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(chunks=20, chunk_delay_s=0.05)
    reply = await hasty.ask("POST", CHAT_PATH, STREAM)
    assert reply.whole
    assert reply.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.fault(28)
async def test_slow_reader_is_not_the_engines_fault(hasty: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(chunks=3_000, chunk_bytes=10_000)
    reader, writer = await hasty.open("POST", CHAT_PATH, STREAM)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(0.6)
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    reply = Reply(await reader.read())
    writer.close()
    assert reply.whole
    assert reply.body.endswith(b"data: [DONE]\n\n")


# --- the reader does not read


@pytest.mark.fault(40)
async def test_reader_that_does_not_read_stops_the_engine_and_not_our_memory(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(chunks=20_000, chunk_bytes=10_000)
    _, writer = await door.open("POST", CHAT_PATH, STREAM)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await eventually(lambda: engine.pieces_sent > 10)

    async def stands_still() -> bool:
        before = engine.pieces_sent
        await asyncio.sleep(0.2)
        return engine.pieces_sent == before

    await eventually(stands_still)
    sent_bytes = engine.pieces_sent * 10_000
    assert sent_bytes < 30_000_000, "the kernel's buffers of two connections, and little of ours"
    writer.transport.abort()
    await eventually(lambda: engine.cancelled == 1)


@pytest.mark.fault(40)
@pytest.mark.parametrize("path", [f"{PROVIDER}/v1/audio/transcriptions", "/v1/audio/transcriptions"])
async def test_body_of_50_mb_arrives_whole(door: Door, engine: FakeEngine, path: str) -> None:
    door.route(engine_upstream(engine, served=(ServedModel("default/qwen-served", "qwen-served"),)))
    start, end = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nqwen-served\r\n--x\r\n\r\n', b"\r\n--x--"
    body = start + os.urandom(50_000_000 - len(start) - len(end)) + end
    reply = await door.ask("POST", path, body, ["Content-Type: multipart/form-data; boundary=x"])
    assert reply.json()["size_bytes"] == 50_000_000
    assert reply.json()["sha256"] == hashlib.sha256(body).hexdigest()
    over = await door.ask(
        "POST", path, b"", ["Content-Type: multipart/form-data; boundary=x", "Content-Length: 50000001"]
    )
    assert over.status == 413


async def test_streams_side_by_side_lose_and_mix_nothing(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(chunks=20, chunk_delay_s=0.01)

    def body(number: int) -> bytes:
        return b'{"model":"qwen-served","stream":true,"messages":[{"content":"stream %d"}]}' % number

    replies = await asyncio.gather(*(door.ask("POST", CHAT_PATH, body(number)) for number in range(300)))
    engine.faults = Faults(chunks=20)
    for number in range(0, 300, 50):
        alone = await Door(door.gateway, engine.port).ask("POST", "/v1/chat/completions", body(number))
        assert replies[number].body == alone.body
    assert all(reply.whole and reply.body.count(b"data: ") == 23 for reply in replies)


# --- what clients must not do


@pytest.mark.fault(33)
@pytest.mark.parametrize("policy", ["vllm", "nim", "generic"])
async def test_control_endpoints_of_engines_are_out_of_reach(door: Door, engine: FakeEngine, policy: str) -> None:
    door.route(engine_upstream(engine, policy=policy))
    control = ["/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/start_profile", "/pause"]
    assert set(control) <= set(CONTROL_PATHS)
    for path in [*control, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]:
        name = path[1:]
        for written in (name, f"/{name}", name.replace("/", "%2F"), f"v1/../{name}", f"v1/%2e%2e/{name}", f"{name}/",
                        f"%2F{name}", name.replace("l", "%6c"), f"x/%252e%252e/{name}", name.replace("a", "%2561"),
                        f"{name}%3fx", f"{name};x"):  # fmt: skip
            for route in (PROVIDER, f"{G}/default/model/qwen/-"):
                await door.ask("POST", f"{route}/{written}", b'{"lora_name":"x","lora_path":"/etc"}')
    reached = [request.target for request in engine.requests if request.path in CONTROL_PATHS or "lora" in request.path]
    assert reached == []
    assert engine.adapters == {}


@pytest.mark.fault(33)
async def test_refused_path_says_why(door: Door) -> None:
    reply = await door.ask("POST", f"{PROVIDER}/v1/load_lora_adapter", b"{}")
    assert (reply.status, reply.headers["x-nimhost-error"]) == (403, "Forbidden")
    assert "control endpoint" in reply.json()["detail"]


@pytest.mark.fault(34)
@pytest.mark.parametrize("name", ["../x", "/abs/path", "..", "default/../../x", "ws--nope", "C:\\x", "\u0000"])
async def test_model_name_that_is_a_path_never_reaches_an_engine(door: Door, engine: FakeEngine, name: str) -> None:
    body = json.dumps({"model": name}).encode()
    assert (await door.ask("POST", OPENAI, body)).status in (404, 422)
    assert (await door.ask("POST", "/v1/chat/completions", body)).status == 404
    assert not engine.requests


# --- nothing is left


async def test_nothing_is_left_of_requests_that_went_wrong(hasty: Door, engine: FakeEngine) -> None:
    tasks = len(asyncio.all_tasks())
    ways = [Faults(), Faults(drop_after_chunks=2), Faults(hang=True), Faults(status=500), Faults(malformed_json=True),
            Faults(close_before_reply=True), Faults(hang_after_chunks=1)]  # fmt: skip
    for faults in ways:
        engine.faults = faults
        asking = [asyncio.create_task(hasty.ask("POST", CHAT_PATH, STREAM)) for _ in range(10)]
        for _ in range(5):
            _, writer = await hasty.open("POST", CHAT_PATH, STREAM)
            await asyncio.sleep(0.005)
            writer.close()
        assert all(reply.status for reply in await asyncio.gather(*asking))
    engine.faults = Faults()
    del asking
    await eventually(lambda: engine.open_streams == 0)
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks + len(engine.connections))
    gc.collect()  # a future with an exception that nobody fetched would be an error here
    assert (await hasty.ask("POST", CHAT_PATH, STREAM)).whole
