"""Where requests come in: the socket, the HTTP server, and what a connection may cost.

uvicorn leaves a few doors open that a daemon on a network cannot: a head may come for ever and be of any size, a client
may go silent in the middle of a body or never read its reply, and idle connections may use up all file descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import sys
from asyncio import TimerHandle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nimhost.api.access import is_loopback
from nimhost.config import Server as ServerSettings
from nimhost.errors import StartError
from nimhost.gateway.joining import Joining

HEAD_TIMEOUT_S = 20.0
"""From the connection, or the first byte of a later request, to the end of its head."""
MAX_HEAD_BYTES = 65_536
BODY_QUIET_S = 60.0
"""So long may a client be silent in the middle of a body."""
LINGER_S = 10.0
"""So long is a body read on that was answered before it was complete: closing at once could lose the answer."""
REPLY_STUCK_S = 300.0
"""So long may a client leave a full buffer unread."""
KEEP_ALIVE_S = 75.0
"""Longer than common clients and proxies keep a connection: who closes first must not be a matter of chance."""
MAX_CONNECTIONS = 10_000
OTHER_FILES = 256
"""File descriptors for the database, Docker, uploads and so on."""
BACKLOG = 2048


def listen(server: ServerSettings, has_tokens: bool) -> socket.socket:
    """The listening socket. Raises StartError when the address cannot be had, or other machines reach it and there is
    no token to let them in with.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)[0]
        if not has_tokens and not is_loopback(str(address[0])):
            raise StartError(
                f"{server.host} can be reached from other machines, and there is no API token to let them in with.",
                f"Make one: {_with_data_dir(server)}nimhost tokens create NAME --scope admin   "
                f"or listen on 127.0.0.1, and reach it with: ssh -L {server.port}:127.0.0.1:{server.port} HOST",
            )
        return _bound(socket.socket(family, kind), address)
    except OSError as error:
        raise StartError(
            f"Cannot listen on {server.host}:{server.port}: {error.strerror}.",
            "Choose another port: nimhost serve --port 8081",
        ) from None


def _bound(listener: socket.socket, address: object) -> socket.socket:
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)  # type: ignore[arg-type]
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _with_data_dir(server: ServerSettings) -> str:
    return f"NIMHOST_SERVER__DATA_DIR={server.data_dir} " if server.data_dir else ""


class Server(uvicorn.Server):
    """The first signal drains, the second one forces."""

    def __init__(self, app: Any, drain_timeout_s: float, on_stop: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, Room(raise_limit())),  # type: ignore[arg-type]
                loop="none",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=round(KEEP_ALIVE_S),
                timeout_graceful_shutdown=round(drain_timeout_s),
            )
        )
        self._on_stop = on_stop

    def stop(self) -> None:
        self.force_exit = self.should_exit
        if not self.should_exit:
            self._on_stop()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def raise_limit() -> int:
    """Takes as many file descriptors as the system lets us have. Returns for how many clients they are enough: each may
    need another connection, to an upstream.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS + OTHER_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    files = sys.maxsize if soft == resource.RLIM_INFINITY else soft
    return max(16, min(MAX_CONNECTIONS, (files - OTHER_FILES) // 2))


class Room:
    """For so many connections at once. When it is full, whoever has been idle the longest makes place."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.idle: dict[Connection, None] = {}
        """Without a request under way, the longest first."""
        self._count = 0

    def enter(self, connection: Connection) -> bool:
        """False: it is full, and everybody in it is busy."""
        if self._count >= self.limit:
            oldest = next(iter(self.idle), None)
            if oldest is None:
                return False
            oldest.close()
            self.leave(oldest)
        self._count += 1
        connection.counted = True
        self.idle[connection] = None
        return True

    def leave(self, connection: Connection) -> None:
        self._count -= connection.counted
        connection.counted = False
        self.idle.pop(connection, None)


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits. Nothing is spent on them by a request whose head and body come at once."""

    def __init__(self, room: Room, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counted = False
        """It has a place in the room."""
        self._room = room
        self._timer: TimerHandle | None = None
        self._stuck: TimerHandle | None = None
        self._heard_at = 0.0
        self._head_bytes = 0
        """What has come of a head that is not complete."""
        self._piece_bytes = 0
        self._in_body = False
        self._answer: tuple[bytes, str] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Joining(transport, self.loop))  # type: ignore[arg-type]
        if not self._room.enter(self):
            self._refuse(b"503 Service Unavailable", "Too many connections are busy.")
            return
        self._arm(HEAD_TIMEOUT_S, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.resume_writing()
        self._room.leave(self)
        super().connection_lost(exc)

    def close(self) -> None:
        self.transport.close()

    # --- what comes in

    def data_received(self, data: bytes) -> None:
        self._heard_at = self.loop.time()
        self._piece_bytes = len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_body:
            if self._timer is None:
                self._arm(BODY_QUIET_S, self._body_is_late)
        elif self.cycle is None or self.cycle.response_complete:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(*_TOO_LARGE)
            elif self._timer is None:
                self._arm(HEAD_TIMEOUT_S, self._head_is_late)

    def on_headers_complete(self) -> None:
        if self._head_bytes + self._piece_bytes > MAX_HEAD_BYTES:
            size_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size_bytes > MAX_HEAD_BYTES:
                self._answer = _TOO_LARGE
                raise ValueError  # to the parser, which stops; the answer follows in send_400_response
        self._head_bytes, self._in_body = 0, True
        self._disarm()
        self._room.idle.pop(self, None)
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(*(self._answer or (b"400 Bad Request", msg)))

    def on_message_complete(self) -> None:
        self._in_body = False
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body:
            self._disarm()
            self._arm(LINGER_S, self.transport.close)
        elif self.counted and self.cycle.response_complete:
            self._room.idle[self] = None

    # --- what takes too long

    def _arm(self, delay_s: float, late: Callable[[], None]) -> None:
        self._timer = self.loop.call_later(delay_s, late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        if self._head_bytes:
            self._refuse(b"408 Request Timeout", f"No complete request came within {HEAD_TIMEOUT_S:g} seconds.")
        else:
            self.transport.close()

    def _body_is_late(self) -> None:
        if self.flow.read_paused:
            self._heard_at = self.loop.time()  # it is we who do not listen
        silent_s = self.loop.time() - self._heard_at
        if silent_s < BODY_QUIET_S:
            self._arm(BODY_QUIET_S - silent_s, self._body_is_late)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(REPLY_STUCK_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None
        super().resume_writing()

    def _refuse(self, status: bytes, message: str) -> None:
        body = message.encode()
        fields = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close" % len(body)
        self.transport.write(b"HTTP/1.1 %s\r\n%s\r\n\r\n%s" % (status, fields, body))
        self.transport.close()


_TOO_LARGE = (
    b"431 Request Header Fields Too Large",
    f"The head of the request is larger than {MAX_HEAD_BYTES:,} bytes.",
)
