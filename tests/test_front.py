"""HTTP/1.1 as clients may not speak it, and as they seldom do: on raw sockets, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nimhost.config import Server as ServerSettings
from nimhost.gateway import front
from nimhost.gateway.cycle import DIRECT, Cycle
from nimhost.listening import Server, listen
from tests.support import eventually

HOST = b"Host: x\r\n"
LAST = b"Host: x\r\nConnection: close\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
END = b"0\r\n\r\n"


class App:
    """Says what it was asked: method, path, and the body. `/hold` waits until it is let go, `/sized` says its length,
    `/early` does not read, and so on."""

    def __init__(self) -> None:
        self.heads: list[dict[bytes, bytes]] = []
        self.paths: list[str] = []
        self.left: list[str] = []
        self.go = asyncio.Event()
        self.writers: list[asyncio.StreamWriter] = []
        self.port = 0
        self.server: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.paths.append(path)
        headers, status, body = [], 200, b""
        if path == "/hold":
            await self._hold(scope)
        if path not in ("/early", "/boom"):
            body = await read(receive)
        if path == "/boom":
            raise ValueError
        self.heads.append(dict(scope["headers"]))
        if path == "/sized":
            headers = [(b"content-length", b"2")]
        elif path in ("/short", "/long"):
            headers = [(b"content-length", b"3")]
            body = b"ab" if path == "/short" else b"abcd"
        elif path.startswith("/status/"):
            status = int(path.rpartition("/")[2])
        elif path == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            await self.go.wait()
            await send({"type": "http.response.body", "body": b"done"})
            return
        elif path == "/megabytes":
            body = b"x" * 3_000_000
        elif path == "/kilobytes":
            body = b"x" * 40_000
        elif path == "/broken":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            raise ValueError
        await send({"type": "http.response.start", "status": status, "headers": headers})
        said = body if path not in ("/", "/read", "/hold", "/early") else b"%b %d" % (path.encode(), len(body))
        await send({"type": "http.response.body", "body": said})

    async def _hold(self, scope: Any) -> None:
        """As the gateway waits: nobody reads, the cycle tells when the client leaves."""
        task = asyncio.current_task()
        assert task

        def leave() -> None:
            self.left.append(scope["path"])
            task.cancel()

        scope["extensions"][DIRECT].watch(leave)
        await self.go.wait()
        scope["extensions"][DIRECT].watch(None)

    async def connect(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(data)
        return reader, writer

    async def ask(self, data: bytes) -> bytes:
        """All that comes until the server closes."""
        reader, writer = await self.connect(data)
        try:
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.transport.abort()

    def count(self) -> int:
        return len(self.server.server_state.connections)


async def read(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        body, more = body + message["body"], message["more_body"]
    return body


@asynccontextmanager
async def serve() -> AsyncIterator[App]:
    app = App()
    listener = listen(ServerSettings(port=0), has_tokens=False)
    app.server = server = Server(app, drain_timeout_s=1, on_stop=lambda: None)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    app.port = listener.getsockname()[1]
    await eventually(lambda: server.started)
    try:
        yield app
    finally:
        for writer in app.writers:
            writer.transport.abort()
        server.stop()
        server.force_exit = True
        await serving


@pytest.fixture
async def app() -> AsyncIterator[App]:
    async with serve() as app:
        yield app


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_limits(**limits: float) -> None:
        for name, value in limits.items():
            monkeypatch.setattr(front, name, value)

    return set_limits


def post(path: bytes = b"/read", body: bytes = b"", more: bytes = HOST) -> bytes:
    return b"POST %b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b" % (path, more, len(body), body)


def chunked(body: bytes, more: bytes = LAST) -> bytes:
    return b"POST /read HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n%b" % (more, body)


# --- where one reader could see one request and another reader two ---------------------------------------------------


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length:\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: \x0bchunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding:\r\n chunked\r\n",
        b"A: b\r\n c\r\n",
        b" A: b\r\n",
        b"A : b\r\n",
        b"A: b\nB: c\r\n",
        b"A: b\rB: c\r\n",
        b"A: b\0c\r\n",
        b": b\r\n",
    ],
)
async def test_a_head_that_can_be_read_in_two_ways_is_400(app: App, fields: bytes) -> None:
    said = await app.ask(b"POST /read HTTP/1.1\r\n%b%b\r\n0\r\n\r\n" % (HOST, fields))
    assert said.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert said.count(b"HTTP/1.1") == 1
    await eventually(lambda: not app.server.server_state.tasks)
    assert app.heads == []


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    "body",
    [b"3\nabc\n0\n\n", b"3 \r\nabc\r\n0\r\n\r\n", b"0x3\r\nabc\r\n0\r\n\r\n", b"2\r\nabc\r\n0\r\n\r\n",
     b"-3\r\nabc\r\n", b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n", b"3;a\nx\r\nabc\r\n0\r\n\r\n",
     b"\r\n3\r\nabc\r\n0\r\n\r\n"],
)  # fmt: skip
async def test_chunks_that_can_be_read_in_two_ways_are_400(app: App, body: bytes) -> None:
    assert (await app.ask(chunked(body))).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    await eventually(lambda: not app.server.server_state.tasks)
    assert app.heads == []


async def test_chunks_may_have_extensions_and_trailers_are_no_headers(app: App) -> None:
    body = b"3;a=b\r\nabc\r\n0\r\nHost: evil\r\nAuthorization: Bearer t\r\nX-T: 1\r\n\r\n"
    assert (await app.ask(chunked(body))).endswith(b"\r\n\r\n7\r\n/read 3\r\n0\r\n\r\n")
    assert app.heads[-1][b"host"] == b"x"
    assert not {b"x-t", b"authorization"} & set(app.heads[-1])


@pytest.mark.parametrize(
    ("line", "status"),
    [(b"GET / HTTP/0.9", 505), (b"GET / HTTP/2.0", 505), (b"GET / HTTP/1.2", 400), (b"PRI * HTTP/2.0", 400),
     (b"CONNECT x:443 HTTP/1.1", 400), (b"CONNECT /read HTTP/1.1", 400), (b"CONNECT http://x/read HTTP/1.1", 400),
     (b"GET /\xc3\xa9 HTTP/1.1", 400), (b"GET / x HTTP/1.1", 400)],
)  # fmt: skip
async def test_what_is_not_spoken_here(app: App, line: bytes, status: int) -> None:
    assert (await app.ask(b"%b\r\n%b\r\n" % (line, HOST))).startswith(b"HTTP/1.1 %d " % status)
    assert app.paths == []


@pytest.mark.parametrize(
    ("target", "path"),
    [(b"http://x", "/"), (b"http://x?a=b", "/"), (b"http://y/read?a=b", "/read"), (b"//x/read", "//x/read"),
     (b"/read#x", "/read"), (b"/%C3%A9", "/é"), (b"/%ff", "/�"), (b"/a%2fb", "/a/b")],
)  # fmt: skip
async def test_paths_in_all_their_forms(app: App, target: bytes, path: str) -> None:
    assert (await app.ask(b"GET %b HTTP/1.1\r\n%b\r\n" % (target, LAST))).startswith(OK)
    assert app.paths == [path]


async def test_who_speaks_http_1_0_is_not_told_to_go_on(app: App) -> None:
    """It would take that for the answer (RFC 9110, 10.1.1)."""
    reader, writer = await app.connect(b"POST /read HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    await eventually(lambda: app.paths)
    writer.write(b"ab")
    assert (await reader.read()).startswith(OK)


# --- another protocol ------------------------------------------------------------------------------------------------


ASKS = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
"""As Java's own client does with every first request."""


@pytest.mark.parametrize("later", [False, True], ids=["at-once", "body-later"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_is_no_other_protocol_only_because_the_client_could_speak_one(
    app: App, later: bool, framing: str
) -> None:
    body = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    data = post(body=body, more=HOST + ASKS)
    if framing == "chunks":
        data = chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), HOST + ASKS)
    end = data.index(b"\r\n\r\n") + 4 if later else len(data)
    reader, writer = await app.connect(data[:end])
    if later:
        await eventually(lambda: app.paths)
        writer.write(data[end:])
    assert b"/read %d" % len(body) in await reader.readuntil(END)
    writer.write(post(body=b"ab", more=LAST))
    assert b"/read 2" in await reader.read()
    assert app.paths == ["/read", "/read"]


async def test_requests_that_ask_for_another_protocol_may_come_at_once(app: App) -> None:
    asks = b"GET /read HTTP/1.1\r\n%b\r\n" % (HOST + ASKS)
    said = await app.ask(asks * 3 + post(more=LAST))
    assert said.count(OK) == 4


# --- several requests at once ----------------------------------------------------------------------------------------


async def test_the_client_that_leaves_has_left_the_request_that_is_answered_not_the_one_that_waits(app: App) -> None:
    _, writer = await app.connect(post(b"/hold") + post())
    await eventually(lambda: app.paths == ["/hold"])
    writer.transport.abort()
    await eventually(lambda: app.left == ["/hold"])
    assert app.paths == ["/hold"]


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize(
    "bad", [b"nonsense\r\n\r\n", chunked(b"xyz\r\n"), b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000 + b"\r\n\r\n"]
)
async def test_what_came_before_a_bad_request_is_answered_first(app: App, before: int, bad: bytes) -> None:
    said = await app.ask(post(body=b"ab") * before + bad)
    assert said.count(b"/read 2") == said.count(OK) == before
    assert said.rindex(b"HTTP/1.1 4") > said.rindex(b"/read 2")


async def test_a_bad_request_does_not_write_into_the_reply_before_it(app: App) -> None:
    reader, _ = await app.connect(post(b"/begun") + post() + b"nonsense\r\n\r\n")
    assert (await reader.readuntil(b"begun\r\n")).startswith(OK)
    app.go.set()
    rest = await reader.read()
    assert rest.startswith(b"4\r\ndone\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert rest.endswith(b"Invalid HTTP request received.")


@pytest.mark.fault(40)
async def test_requests_do_not_pile_up_faster_than_they_are_answered(app: App) -> None:
    """Forty times what one read brings: each answer made room for another read before."""
    reader, writer = await app.connect(post(b"/hold"))
    await eventually(lambda: app.paths)
    one = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    writer.write(one * 200_000)
    (connection,) = app.server.server_state.connections
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(connection._pipeline))
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    app.go.set()
    for _ in range(20_000):
        await reader.readuntil(END)
    watching.cancel()
    writer.transport.abort()
    assert most <= 262_144 // len(one) + front.MAX_WAITING + 1


@pytest.mark.fault(40)
async def test_a_head_behind_a_request_that_is_answered_is_not_kept_without_end(app: App) -> None:
    reader, writer = await app.connect(post(b"/begun"))
    await reader.readuntil(b"begun\r\n")
    (connection,) = app.server.server_state.connections
    writer.write(b"GET / HTTP/1.1\r\nA: " + b"x" * 2_000_000)
    await eventually(lambda: connection._refusal)
    app.go.set()
    assert b"done" in await reader.readuntil(END)
    assert (await reader.read()).startswith(b"HTTP/1.1 431")


@pytest.mark.fault(40)
@pytest.mark.parametrize("piece", [b"X-T: 1\r\n", b"x" * 8], ids=["trailers", "trailer"])
async def test_trailers_without_end_are_not_kept(app: App, piece: bytes) -> None:
    reader, writer = await app.connect(chunked(b"1\r\na\r\n0\r\nA: b\r\n", HOST))
    writer.write(piece * 200_000)
    with contextlib.suppress(ConnectionResetError):
        assert (await reader.read()).startswith(b"HTTP/1.1 431")
    await eventually(lambda: app.count() == 0)


# --- answers before the end of the body ------------------------------------------------------------------------------


async def test_who_was_not_told_to_go_on_with_its_body_does_not_keep_its_connection(app: App) -> None:
    """It may send the body or leave it: whatever comes next cannot be told apart."""
    head = b"POST /early HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 40\r\n\r\n"
    reader, writer = await app.connect(head)
    assert b"connection: close\r\n" in await reader.readuntil(END)
    writer.write(post(body=b"ab"))
    writer.write_eof()
    await reader.read()
    assert app.paths == ["/early"]


async def test_no_request_is_taken_after_the_one_whose_reply_said_that_it_is_the_last(app: App) -> None:
    reader, writer = await app.connect(post(b"/boom", b"x" * 10)[:-1])
    assert b"connection: close" in await reader.readuntil(b"\nInternal Server Error")
    writer.write(b"x" + post())
    assert await reader.read() == b""
    await eventually(lambda: not app.server.server_state.tasks)
    assert app.paths == ["/boom"]


async def test_who_reads_to_the_end_has_it_with_the_last_reply_though_its_body_is_awaited_still(app: App) -> None:
    reader, writer = await app.connect(post(b"/boom", b"x" * 10)[:-1])
    assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"\nInternal Server Error")
    writer.write(b"x")
    await eventually(lambda: app.count() == 0)


async def test_an_idle_connection_is_not_told_that_it_is_late(app: App, limit: Callable[..., None]) -> None:
    """Its last request was answered before its body was complete."""
    limit(HEAD_TIMEOUT_S=0.3)
    reader, writer = await app.connect(post(b"/early", b"x" * 10)[:-1])
    await reader.readuntil(END)
    writer.write(b"x")
    await asyncio.sleep(0.6)
    writer.write(post(more=LAST))
    assert (await reader.read()).startswith(OK)


# --- replies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_line", "wanted"),
    [
        (b"HEAD /read HTTP/1.1", b"\r\n\r\n"),
        (b"HEAD /sized HTTP/1.1", b"content-length: 2\r\nconnection: close\r\n\r\n"),
        (b"GET /status/204 HTTP/1.1", b"\r\n\r\n"),
        (b"GET /status/304 HTTP/1.1", b"\r\n\r\n"),
        (b"GET /short HTTP/1.1", b"content-length: 3\r\nconnection: close\r\n\r\n"),
        (b"GET /long HTTP/1.1", b"content-length: 3\r\nconnection: close\r\n\r\n"),
        (b"GET /broken HTTP/1.1", b"\r\n\r\n5\r\nbegun\r\n"),
        (b"GET /broken HTTP/1.0", b"\r\n\r\nbegun"),
        (b"GET /boom HTTP/1.1", b"content-length: 21\r\nconnection: close\r\n\r\nInternal Server Error"),
        (b"GET /status/999 HTTP/1.1", b"\r\n\r\n0\r\n\r\n"),
    ],
)
async def test_a_reply_ends_where_its_head_says_or_is_seen_to_be_broken(
    app: App, request_line: bytes, wanted: bytes
) -> None:
    said = await app.ask(b"%b\r\n%b\r\n" % (request_line, LAST))
    assert said.endswith(wanted)
    assert said.count(b"HTTP/1.1") == 1


async def test_after_an_error_of_the_application_the_next_request_needs_a_new_connection(app: App) -> None:
    said = await app.ask(b"GET /boom HTTP/1.1\r\nHost: x\r\n\r\n" + post())
    assert said.startswith(b"HTTP/1.1 500")
    assert app.paths == ["/boom"]


@pytest.mark.fault(40)
@pytest.mark.parametrize("path", [b"/kilobytes", b"/megabytes"])
async def test_who_does_not_read_its_reply_is_not_waited_for_once_it_is_to_be_closed(
    app: App, limit: Callable[..., None], path: bytes
) -> None:
    limit(REPLY_STUCK_S=0.3)
    reader, writer = await app.connect(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(END)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path * 200 + b"GET / HTTP/1.1\r\n%b\r\n" % LAST)
    await eventually(lambda: app.count() == 0, 20)
    writer.transport.abort()


# --- what is left ----------------------------------------------------------------------------------------------------


async def test_nothing_of_a_request_waits_for_the_garbage_collector(app: App) -> None:
    gc.collect()
    gc.disable()
    kinds = (front.ClientConnection, Cycle, asyncio.Task)
    before = [one for one in gc.get_objects() if isinstance(one, kinds)]  # a log may hold the tasks of other tests
    try:
        reader, writer = await app.connect(b"")
        for _ in range(20):
            writer.write(post(body=b"ab"))
            await reader.readuntil(END)
        writer.transport.abort()
        await eventually(lambda: app.count() == 0)
        known = [*before, *asyncio.all_tasks()]
        left = [one for one in gc.get_objects() if isinstance(one, kinds) and one not in known]
        assert left == []
    finally:
        gc.enable()


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_replies_under_way_end_whole_when_the_server_stops_and_idle_connections_close(app: App) -> None:
    idle, _ = await app.connect(post())
    await idle.readuntil(END)
    reader, _ = await app.connect(post(b"/begun"))
    await reader.readuntil(b"begun\r\n")
    app.server.stop()
    assert await asyncio.wait_for(idle.read(), 10) == b""
    app.go.set()
    assert await asyncio.wait_for(reader.read(), 10) == b"4\r\ndone\r\n0\r\n\r\n"
