"""The client's side: a connection over HTTP/1.1, with limits on what it may cost.

A head may not come for ever nor be of any size, a client may not go silent in the middle of a body or never read its
reply, and idle connections may not use up all file descriptors. Nothing is spent on that by a request whose head and
body come at once.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from urllib.parse import unquote

import httptools

from nimhost.gateway.cycle import DIRECT, App, Cycle, Scope
from nimhost.gateway.room import Room

HEAD_TIMEOUT_S = 20.0
"""From the connection, or the first byte of a later request, to the end of its head."""
MAX_HEAD_BYTES = 65_536
MAX_KEPT_BYTES = MAX_HEAD_BYTES + 262_144
"""Of a head that has no end yet; where it began within what was read is not known, and that much is read at once."""
MAX_WAITING = 8
"""So many requests are read ahead of their turn. From there on it is not noticed either when the client leaves."""
BODY_QUIET_S = 75.0
"""So long may a client be silent in the middle of a body. The control plane gives up before, and has an answer."""
LINGER_S = 10.0
"""So long is a body read on that was answered before it was complete: closing at once could lose the answer."""
REPLY_STUCK_S = 300.0
"""So long may a client leave a full buffer unread."""
_METHODS = {m: m.decode() for m in (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS")}
_VERSIONS = frozenset({"1.1", "1.0"})
_ASGI = {"version": "3.0", "spec_version": "2.3"}

Refusal = tuple[bytes, str]
"""Status and reason of an answer to what never became a request."""


class Server(Protocol):
    """The state of the server that connections share: uvicorn's."""

    connections: set[Any]
    tasks: set[asyncio.Task[None]]
    total_requests: int


class ClientConnection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(
        self,
        room: Room,
        config: Any,
        server_state: Server,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """As uvicorn makes them; `config.loaded_app` is the application."""
        self.loop = _loop or asyncio.get_running_loop()
        self.counted = False
        """It has a place in the room."""
        self.stuck = self.ending = False
        self._room, self._config, self._server = room, config, server_state
        self._parser = self._new_parser()
        self._cycle: Cycle | None = None
        """Of the request that came last."""
        self._running: Cycle | None = None
        """Of the one that is answered now, or was last; those between the two are in the pipeline."""
        self._pipeline: deque[tuple[Cycle, Scope]] = deque()
        self._held = False
        """It is not read from."""
        self._writable: asyncio.Future[None] | None = None
        self._timer: TimerHandle | None = None
        self._impatience: TimerHandle | None = None
        self._heard_at = 0.0
        self._head_bytes = 0
        """At most that much has come of a head that is not complete, or between and behind the chunks of a body. The
        parser keeps it, so it must end."""
        self._piece_bytes = 0
        self._in_body = self._stays = False
        self._answer: Refusal | None = None
        """What the parser is told to stop for."""
        self._refusal: Refusal | None = None
        """For the request that ends the connection; the replies to those before it come first."""
        self._client: tuple[str, int] | None = None
        self._local: tuple[str, int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is none by inheritance
        self._client, self._local = (_address(transport, what) for what in ("peername", "sockname"))
        self._server.connections.add(self)
        if not self._room.enter(self):
            self._refuse((b"503 Service Unavailable", "Too many connections are busy."))
            return
        self._arm(HEAD_TIMEOUT_S, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._disarm()
        self._calm()
        self._room.leave(self)
        if self._running:
            self._running.leave()
        self._pipeline.clear()
        self._cycle = self._running = None
        self._parser = None  # type: ignore[assignment]  # each knows the other

    def close(self) -> None:
        """What was written may still leave, for a while."""
        self.transport.close()
        if self._impatience is None and self.transport.get_write_buffer_size():
            self._impatience = self.loop.call_later(REPLY_STUCK_S, self.transport.abort)

    def shutdown(self) -> None:
        """The server is about to end: replies under way may, and those that have no end of their own are ended."""
        self.ending = True
        if self._running and self._running.endless:
            self._running.end_early()
        if self._cycle is None or self._cycle.complete:
            self.close()
        else:
            self._cycle.keep_alive = False

    # --- what comes in

    def data_received(self, data: bytes) -> None:
        if self._refusal:
            return
        self._heard_at = self.loop.time()
        self._piece_bytes = size_bytes = len(data)
        self._head_bytes += size_bytes
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(self._answer or _INVALID)
            return
        if self.transport.is_closing():
            return
        if self._head_bytes > MAX_KEPT_BYTES:
            self._refuse(_TOO_LARGE)
        elif self._in_body:
            if self._cycle and self._cycle.full:
                self.pause_reading()
            if self._timer is None:
                self._arm(BODY_QUIET_S, self._body_is_late)
        elif self._head_bytes and self._timer is None and (self._cycle is None or self._cycle.complete):
            self._room.rest(self)
            self._arm(HEAD_TIMEOUT_S, self._head_is_late)

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # answer the first of pipelined requests
        return parser

    def _feed(self, data: bytes) -> None:
        """Raises HttpParserError."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as asked:
            self._go_on_without(data, asked.args[0])

    def _go_on_without(self, data: bytes, at: int) -> None:
        """Nothing but HTTP/1.1 is spoken here: a request that asks for more is answered as if it had not. The parser
        would take its body for that other protocol, so it is handed the head once more, without the question.
        """
        rest = memoryview(data)
        while True:
            rest = rest[at:]
            method, version = self._parser.get_method(), self._parser.get_http_version().encode()
            line = b"%b %b HTTP/%b\r\n" % (method, self._url, version)
            kept = [b"%b: %b\r\n" % pair for pair in self._headers if pair[0] != b"upgrade"]
            self._parser, self._stays = self._new_parser(), False
            try:
                self._parser.feed_data(b"".join([line, *kept, b"\r\n"]))
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as asked:
                at = asked.args[0]

    def on_message_begin(self) -> None:
        self._url, self._head_bytes = b"", self._head_bytes or self._piece_bytes
        self._headers: list[tuple[bytes, bytes]] = []
        self._awaits_100 = False

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._awaits_100 = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        if self._head_bytes > MAX_HEAD_BYTES:
            size_bytes = len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers)
            if size_bytes > MAX_HEAD_BYTES:
                self._stop_for(_TOO_LARGE)
        if parser.should_upgrade():
            if parser.get_method() == b"CONNECT":
                self._stop_for(_INVALID)  # it always asks for another protocol, and would without end
            self._stays = True
            return
        before, version = self._cycle, parser.get_http_version()
        if version not in _VERSIONS:
            self._stop_for(_OTHER_VERSION)
        if before and before.complete and not before.keep_alive:
            self._stop_for(_INVALID)  # it was told that there is no next request
        scope = self._scope()
        self._headers = []  # trailers are no headers: they go nowhere
        self._head_bytes, self._in_body = 0, True
        self._disarm()
        self._room.work(self)
        self._cycle = cycle = Cycle(self, scope["method"], version, awaits_100=self._awaits_100 and version != "1.0")
        cycle.keep_alive = version != "1.0" and parser.should_keep_alive()
        scope["http_version"], scope["extensions"] = version, {DIRECT: cycle}
        if before is None or before.complete:
            self._start(cycle, scope)
        else:
            self._pipeline.append((cycle, scope))
            if len(self._pipeline) > MAX_WAITING:
                self.pause_reading()

    def _stop_for(self, answer: Refusal) -> None:
        """Raises, to the parser, which stops."""
        self._answer = answer
        raise ValueError(answer[1])

    def _scope(self) -> Scope:
        """Raises, to the parser, for what is no path."""
        url, method = self._url, self._parser.get_method()
        if url[:1] == b"/" and b"#" not in url:
            raw_path, _, query = url.partition(b"?")
        else:
            parsed = httptools.parse_url(url)
            raw_path, query = parsed.path or b"/", parsed.query or b""
        path = raw_path.decode("ascii")
        return {
            "type": "http",
            "asgi": _ASGI,
            "method": _METHODS.get(method) or method.decode("ascii"),
            "scheme": "http",
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": self._headers,
            "client": self._client,
            "server": self._local,
        }

    def _start(self, cycle: Cycle, scope: Scope) -> None:
        app: App = self._config.loaded_app
        self._running = cycle
        cycle.task = task = self.loop.create_task(cycle.run(app, scope))
        self._server.tasks.add(task)

    def on_body(self, piece: bytes) -> None:
        self._head_bytes = 0
        if self._cycle and not self._cycle.complete:
            self._cycle.feed(piece)

    def on_message_complete(self) -> None:
        if self._stays:
            return
        self._in_body, self._head_bytes = False, 0
        self._disarm()
        if self._cycle and not self._cycle.complete:
            self._cycle.feed_end()
        elif self._cycle and not self._cycle.keep_alive:
            self.close()
        elif self.counted:
            self._room.rest(self)

    # --- what a cycle needs

    def date_line(self) -> bytes:
        return self._room.date_line()

    def pause_reading(self) -> None:
        if not self._held:
            self._held = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Unless there are requests enough: a client may not send them faster than they are answered."""
        if self._held and not self._pipeline:
            self._held = False
            self.transport.resume_reading()

    def writable(self) -> Awaitable[None]:
        if self._writable is None or self._writable.done():
            self._writable = self.loop.create_future()
        return self._writable

    def completed(self, cycle: Cycle) -> None:
        self._server.total_requests += 1
        if self.transport.is_closing():
            return
        if self._pipeline and cycle.keep_alive:
            self._start(*self._pipeline.popleft())
        elif self._in_body and not self._pipeline:
            self._disarm()
            self._arm(LINGER_S, self.close)
            if not cycle.keep_alive:
                self.transport.write_eof()  # who reads to the end need not wait for ours
        elif not cycle.keep_alive:
            self.close()
        elif self._refusal:
            self._answer_last(self._refusal)
        elif self.counted:
            self._room.rest(self)
        self.resume_reading()

    def finished(self, cycle: Cycle) -> None:
        if cycle.task:
            self._server.tasks.discard(cycle.task)

    # --- what takes too long

    def _arm(self, delay_s: float, late: Callable[[], None]) -> None:
        self._timer = self.loop.call_later(delay_s, late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        if self._head_bytes:
            self._refuse((b"408 Request Timeout", f"No complete request came within {HEAD_TIMEOUT_S:g} seconds."))
        else:
            self.close()

    def _body_is_late(self) -> None:
        if self._held:
            self._heard_at = self.loop.time()  # it is we who do not listen
        silent_s = self.loop.time() - self._heard_at
        if silent_s < BODY_QUIET_S:
            self._arm(BODY_QUIET_S - silent_s, self._body_is_late)
        else:
            self.close()

    def pause_writing(self) -> None:
        self.stuck = True
        if self._impatience is None:
            self._impatience = self.loop.call_later(REPLY_STUCK_S, self.transport.abort)

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._calm()

    def _calm(self) -> None:
        self.stuck = False
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        if self._writable and not self._writable.done():
            self._writable.set_result(None)

    # --- what is no request

    def _refuse(self, refusal: Refusal) -> None:
        """The last answer on this connection: after those to the requests that came before, if they are answered."""
        self._refusal, own, running = refusal, self._in_body, self._running
        self._in_body = False
        if self.transport.is_closing():
            return
        if own and self._pipeline:
            self._pipeline.pop()  # it is the one whose body is broken
        elif own and running and running.begun and not running.complete:
            running.close()  # a reply of its own would be taken for a part of that one
            return
        if running is None or running.complete or (own and running is self._cycle):
            self._answer_last(refusal)

    def _answer_last(self, refusal: Refusal) -> None:
        status, body = refusal[0], refusal[1].encode()
        fields = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close" % len(body)
        self.transport.write(b"HTTP/1.1 %s\r\n%s\r\n\r\n%s" % (status, fields, body))
        self.close()


_INVALID: Refusal = (b"400 Bad Request", "Invalid HTTP request received.")
_OTHER_VERSION: Refusal = (b"505 HTTP Version Not Supported", "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
_TOO_LARGE: Refusal = (
    b"431 Request Header Fields Too Large",
    f"The head of the request is larger than {MAX_HEAD_BYTES:,} bytes.",
)


def _address(transport: asyncio.BaseTransport, what: str) -> tuple[str, int] | None:
    found = transport.get_extra_info(what)
    return (str(found[0]), int(found[1])) if isinstance(found, tuple | list) else None
