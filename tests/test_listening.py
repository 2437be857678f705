"""What a connection may cost: heads, bodies and replies that take for ever, and more connections than there is room."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nimhost import listening
from nimhost.config import Server as ServerSettings
from nimhost.errors import StartError
from nimhost.gateway import front, room
from nimhost.gateway.cycle import ENDLESS
from nimhost.listening import Server, listen
from tests.support import eventually

ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
RELEASE = asyncio.Event()
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """`/read`: reads the body, and says how long it was. `/big`: a reply without end. `/smuggle`: a header
    with the end of a line in it. `/follow`, `/follow-late`: a piece, and
    then nothing more; the second after the body. `/slow`: two pieces, RELEASE between them.
    Anything else: OK at once."""
    size = 0
    if scope["path"] in ("/read", "/follow-late"):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            if not message["more_body"]:
                break
    headers = [(b"x-a", b"b\r\nset-cookie: c=d")] if scope["path"] == "/smuggle" else []
    endless = {ENDLESS: True} if scope["path"].startswith("/follow") else {}
    await send({"type": "http.response.start", "status": 200, "headers": headers, **endless})
    if endless or scope["path"] == "/slow":
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await (asyncio.Event() if endless else RELEASE).wait()
    while scope["path"] == "/big":
        await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"read %d" % size})


class Open:
    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.port = port
        self.streams: list[Stream] = []

    async def connect(self, data: bytes = b"") -> Stream:
        stream = await asyncio.open_connection("127.0.0.1", self.port)
        self.streams.append(stream)
        if data:
            stream[1].write(data)
        return stream

    async def ask(self, data: bytes = ASK) -> bytes:
        """The whole answer on a connection of its own; the server closes it, or has nothing more to say."""
        reader, writer = await self.connect(data.replace(b"Host:", b"Connection: close\r\nHost:", 1))
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()

    def count(self) -> int:
        return len(self.server.server_state.connections)


@asynccontextmanager
async def serve() -> AsyncIterator[Open]:
    listener = listen(ServerSettings(port=0), has_tokens=False)
    server = Server(app, drain_timeout_s=1, on_stop=lambda: None)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    opened = Open(server, listener.getsockname()[1])
    await eventually(lambda: server.started)
    try:
        yield opened
    finally:
        for _, writer in opened.streams:
            writer.transport.abort()
        server.stop()
        server.force_exit = True
        await serving


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_limits(**limits: float) -> None:
        for name, value in limits.items():
            monkeypatch.setattr(room if name == "KEEP_ALIVE_S" else front, name, value)

    return set_limits


async def read_all(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), 20)
    except ConnectionResetError:
        return b""


# --- where -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault(36)
@pytest.mark.parametrize(("host", "place"), [("0.0.0.0", ""), ("::", ""), ("0.0.0.0", "/d")])
def test_an_address_for_other_machines_takes_a_token(host: str, place: str) -> None:
    with pytest.raises(StartError, match="there is no API token") as caught:
        listen(ServerSettings(host=host, port=0, data_dir=place), has_tokens=False)
    command = "nimhost tokens create NAME --scope admin"
    assert (f"NIMHOST_SERVER__DATA_DIR={place} {command}" if place else f"one: {command}") in (caught.value.hint or "")


def test_localhost_is_where_clients_look_for_it_whatever_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian says ::1 first: nobody would be at 127.0.0.1."""
    addresses = [(socket.AF_INET6, ("::1", 0, 0, 0)), (socket.AF_INET, ("127.0.0.1", 0))]
    found = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listen(ServerSettings(host="localhost", port=0), has_tokens=False) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_with_a_token_it_listens_and_on_loopback_it_needs_none() -> None:
    listen(ServerSettings(host="127.0.0.1", port=0), has_tokens=False).close()
    listen(ServerSettings(host="127.0.0.1", port=0), has_tokens=True).close()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port}"):
            listen(ServerSettings(port=port), has_tokens=False)


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
def test_an_address_that_this_machine_has_not_is_no_fault_of_the_port(host: str) -> None:
    with pytest.raises(StartError, match=host) as caught:
        listen(ServerSettings(host=host, port=0), has_tokens=True)
    assert "Choose an address of this machine" in (caught.value.hint or "")


# --- what takes for ever ---------------------------------------------------------------------------------------------


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"GET / HTT", b"HTTP/1.1 408"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: b", b"HTTP/1.1 408"),
        (b"\r\n", b"HTTP/1.1 408"),
    ],
)
async def test_a_head_that_never_ends_is_given_up(limit: Callable[..., None], sent: bytes, answer: bytes) -> None:
    limit(HEAD_TIMEOUT_S=0.3)
    async with serve() as opened:
        reader, _ = await opened.connect(sent)
        assert (await read_all(reader))[:12] == answer
        assert opened.count() == 0


@pytest.mark.fault(40)
async def test_dripping_a_head_does_not_buy_time_and_a_second_head_is_no_better(limit: Callable[..., None]) -> None:
    limit(HEAD_TIMEOUT_S=0.5)
    async with serve() as opened:
        reader, writer = await opened.connect(ASK)
        assert b"read 0" in await reader.readuntil(b"0\r\n\r\n")
        begun = time.monotonic()
        for byte in b"GET / HTTP/1.1\r\nA: " + b"x" * 10_000:
            writer.write(bytes([byte]))
            if opened.count() == 0:  # what it said may be lost: a byte of ours can cross it
                break
            await asyncio.sleep(0.02)
        assert opened.count() == 0
        assert time.monotonic() - begun < 20


@pytest.mark.fault(40)
@pytest.mark.parametrize("head", [b"A: " + b"x" * 70_000, b"A: b\r\n" * 20_000, b"A: " + b"x" * 5_000_000])
async def test_a_head_that_is_too_large_is_431(head: bytes) -> None:
    async with serve() as opened:
        reader, writer = await opened.connect(b"GET / HTTP/1.1\r\nHost: x\r\n" + head)
        writer.write(b"\r\n\r\n")
        assert (await read_all(reader))[:12] in (b"HTTP/1.1 431", b"")
        assert opened.count() == 0
        assert (await opened.ask()).endswith(b"0\r\n\r\n")


@pytest.mark.fault(40)
async def test_a_head_without_end_is_not_kept(limit: Callable[..., None]) -> None:
    limit(HEAD_TIMEOUT_S=1000)
    async with serve() as opened:
        _, writer = await opened.connect(b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
        with pytest.raises(ConnectionError):
            await _pour(writer, 5_000_000)
        await eventually(lambda: opened.count() == 0)


@pytest.mark.fault(40)
async def test_a_head_just_within_the_limit_in_pieces_is_read() -> None:
    async with serve() as opened:
        reader, writer = await opened.connect(b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 40_000)
        await asyncio.sleep(0.05)
        writer.write(b"x" * 20_000 + b"\r\n\r\n")
        assert b"read 0" in await reader.readuntil(b"0\r\n\r\n")


@pytest.mark.fault(40)
async def test_a_client_that_goes_silent_in_a_body_is_left_and_a_slow_one_is_not(limit: Callable[..., None]) -> None:
    limit(BODY_QUIET_S=0.6)
    post = b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
    async with serve() as opened:
        silent, _ = await opened.connect(post + b"12345")
        slow, writer = await opened.connect(post)
        for byte in b"1234567890":
            writer.write(bytes([byte]))
            await asyncio.sleep(0.1)
        assert b"read 10" in await slow.readuntil(b"0\r\n\r\n")
        assert await read_all(silent) == b""


@pytest.mark.fault(40)
async def test_a_reply_that_nobody_reads_is_given_up(limit: Callable[..., None]) -> None:
    limit(REPLY_STUCK_S=0.5)
    async with serve() as opened:
        await opened.connect(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        await eventually(lambda: opened.count() == 1)
        await eventually(lambda: opened.count() == 0, 20)


@pytest.mark.fault(40)
async def test_a_body_that_is_not_wanted_is_not_read_for_ever(limit: Callable[..., None]) -> None:
    limit(LINGER_S=0.3)
    async with serve() as opened:
        reader, writer = await opened.connect(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000\r\n\r\n")
        assert b"read 0" in await reader.readuntil(b"0\r\n\r\n")  # answered before it came
        with pytest.raises(ConnectionError):
            await _pour(writer, 900_000_000)
        await eventually(lambda: opened.count() == 0)


@pytest.mark.parametrize("how", ["close", "keep-alive"])
async def test_an_answer_before_the_end_of_the_body_is_not_lost(how: str) -> None:
    async with serve() as opened:
        head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: {how}\r\nContent-Length: 30000000\r\n\r\n".encode()
        reader, writer = await opened.connect(head)
        for _ in range(30):
            writer.write(b"x" * 1_000_000)
            await writer.drain()
        assert b"read 0" in await reader.readuntil(b"0\r\n\r\n")
        writer.write(ASK)
        if how == "close":
            assert await read_all(reader) == b""
        else:
            assert b"read 0" in await reader.readuntil(b"0\r\n\r\n")


async def test_a_header_cannot_smuggle_another_in() -> None:
    async with serve() as opened:
        assert (await opened.ask(ASK.replace(b"GET /", b"GET /smuggle"))).startswith(b"HTTP/1.1 500 Internal")


async def test_requests_sent_at_once_are_answered_in_order() -> None:
    async with serve() as opened:
        bodies = [b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (n, b"x" * n) for n in (1, 2, 3)]
        reader, writer = await opened.connect(b"".join(bodies))
        for n in (1, 2, 3):
            assert b"read %d" % n in await reader.readuntil(b"0\r\n\r\n")
        writer.write(ASK.replace(b"Host", b"Connection: close\r\nHost") + ASK)
        assert (await read_all(reader)).count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        (b"GET /read HTTP/1.0\r\n\r\n", [b"HTTP/1.1 200 OK", b"connection: close", b"\r\n\r\nread 0"]),
        (b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [b"HTTP/1.1 200 OK"]),
        (b"GET http://x/read?a=b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [b"read 0"]),
        (b"GET /r%65ad HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [b"read 0"]),
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", [b"200 OK", b"read 0"]),
        (b"nonsense\r\n\r\n", [b"HTTP/1.1 400 Bad Request", b"connection: close"]),
        (b"GET \xff HTTP/1.1\r\n\r\n", [b"HTTP/1.1 400 Bad Request"]),
    ],
)
async def test_what_old_and_odd_clients_send(sent: bytes, wanted: list[bytes]) -> None:
    async with serve() as opened:
        reader, _ = await opened.connect(sent)
        if b"upgrade" in sent:
            answer = await reader.readuntil(b"0\r\n\r\n")
        else:
            answer = await read_all(reader)
        assert [part for part in wanted if part not in answer] == []
        if sent.startswith(b"HEAD"):
            assert answer.endswith(b"\r\n\r\n")
            assert b"read" not in answer


async def test_a_body_is_asked_for_when_the_client_waits_to_be_asked() -> None:
    async with serve() as opened:
        head = b"POST /read HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        reader, writer = await opened.connect(head)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ab")
        assert b"read 2" in await reader.readuntil(b"0\r\n\r\n")


async def test_an_idle_connection_is_closed_after_a_while_and_a_busy_one_is_not(limit: Callable[..., None]) -> None:
    limit(KEEP_ALIVE_S=0.5)
    async with serve() as opened:
        idle, _ = await opened.connect(ASK)
        assert b"read 0" in await idle.readuntil(b"0\r\n\r\n")
        busy, writer = await opened.connect(b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
        assert await read_all(idle) == b""
        await asyncio.sleep(0.3)
        writer.write(b"x")
        assert b"read 1" in await busy.readuntil(b"0\r\n\r\n")


async def _pour(writer: asyncio.StreamWriter, size_bytes: int) -> None:
    for _ in range(size_bytes // 100_000):
        writer.write(b"x" * 100_000)
        await asyncio.wait_for(writer.drain(), 10)
        await asyncio.sleep(0.001)


# --- the end of the server -------------------------------------------------------------------------------------------


async def test_when_the_server_stops_a_reply_without_end_is_ended_and_the_others_are_waited_for() -> None:
    RELEASE.clear()
    async with serve() as opened:
        opened.server.config.timeout_graceful_shutdown = 60
        follower, _ = await opened.connect(ASK.replace(b"/ ", b"/follow "))
        slow, _ = await opened.connect(ASK.replace(b"/ ", b"/slow "))
        for reader in (follower, slow):
            await reader.readuntil(b"begun\r\n")
        opened.server.stop()
        assert await read_all(follower) == b"0\r\n\r\n"
        assert opened.count() == len(opened.server.server_state.tasks) == 1
        RELEASE.set()
        assert (await read_all(slow)).endswith(b"read 0\r\n0\r\n\r\n")


async def test_a_reply_without_end_that_begins_while_the_server_stops_is_ended_too() -> None:
    async with serve() as opened:
        opened.server.config.timeout_graceful_shutdown = 60
        post = b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n"
        late, writer = await opened.connect(post.replace(b"/read", b"/follow-late"))
        await eventually(lambda: opened.server.server_state.tasks)
        opened.server.stop()
        await eventually(lambda: not opened.server.servers or not opened.server.servers[0].is_serving())
        writer.write(b"x")
        assert (await read_all(late)).endswith(b"begun\r\n0\r\n\r\n")


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.fault(40)
async def test_when_there_is_no_room_the_longest_idle_makes_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "raise_limit", lambda: 3)
    async with serve() as opened:
        idle = [await opened.connect() for _ in range(2)]
        await eventually(lambda: opened.count() == 2)
        busy, writer = await opened.connect(b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
        await eventually(lambda: opened.count() == 3)
        assert (await opened.ask()).endswith(b"0\r\n\r\n")
        assert await read_all(idle[0][0]) == b""
        idle[1][1].write(ASK)
        assert b"read 0" in await idle[1][0].readuntil(b"0\r\n\r\n")
        writer.write(b"x")
        assert b"read 1" in await busy.readuntil(b"0\r\n\r\n")


@pytest.mark.fault(40)
async def test_when_everybody_is_busy_a_newcomer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "raise_limit", lambda: 1)
    async with serve() as opened:
        busy, writer = await opened.connect(b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
        await eventually(lambda: opened.count() == 1)
        assert (await opened.ask(b"")).startswith(b"HTTP/1.1 503")
        writer.write(b"x")
        assert b"read 1" in await busy.readuntil(b"0\r\n\r\n")
        assert (await opened.ask()).endswith(b"0\r\n\r\n")


@pytest.mark.fault(40)
async def test_two_thousand_idle_connections_cost_little_and_harm_nobody() -> None:
    async with serve() as opened:
        tracemalloc.start()
        try:
            for _ in range(20):
                await asyncio.gather(*(opened.connect() for _ in range(100)))
            await eventually(lambda: opened.count() == 2000, 20)
            cost_bytes = tracemalloc.get_traced_memory()[0] / 2000  # both ends of each
            begun = time.monotonic()
            for _ in range(20):
                assert (await opened.ask()).endswith(b"0\r\n\r\n")
            each_s = (time.monotonic() - begun) / 20
        finally:
            tracemalloc.stop()
        print(f"2,000 idle connections: {cost_bytes / 1024:.1f} KiB each (both ends); a request {1000 * each_s:.1f} ms")
        assert cost_bytes < 60_000
        assert each_s < 0.5


def test_the_limit_leaves_files_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    for soft, hard, limit_, wanted in (
        (1024, 4096, 1920, (4096, 4096)),
        (1024, 1 << 20, 10_000, (20_256, 1 << 20)),
        (1024, -1, 10_000, (20_256, -1)),
        (1 << 20, 1 << 20, 10_000, None),
        (-1, -1, 10_000, None),
        (100, 100, 16, None),
    ):
        asked.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda _, found=(soft, hard): found)
        assert listening.raise_limit() == limit_
        assert asked == ([wanted] if wanted else [])
