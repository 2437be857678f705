"""One request of a client and the reply to it, on their connection.

It speaks ASGI to those who speak it (the control plane). The gateway is spared its messages: it asks for `whole_body`
and calls `start` and `write`, which take effect at once.
"""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Protocol

log = logging.getLogger(__name__)
DIRECT = "nimhost.direct"
"""Where the scope's extensions have the cycle, for whoever need not go through `receive` and `send`."""
ENDLESS = "nimhost.endless"
"""In the message that begins a reply: it has no end of its own, and is ended when the server stops."""
READ_AHEAD_BYTES = 65_536
"""So much of a body is kept for an application that does not read it yet."""
_GONE = {"type": "http.disconnect"}
_BODILESS = frozenset({204, 304})

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def _status_line(status: int) -> bytes:
    known = http.HTTPStatus.__members__.values()
    phrase = next((member.phrase for member in known if member.value == status), "")
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase.encode())


_STATUS_LINES = {status: _status_line(status) for status in range(100, 1000)}


class Connection(Protocol):
    """What a cycle needs of the connection that it is on."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    stuck: bool
    """The client does not keep up: there is something to wait for before more is written."""
    ending: bool
    """The server is about to end."""

    def date_line(self) -> bytes: ...
    def writable(self) -> Awaitable[None]: ...
    def resume_reading(self) -> None: ...
    def completed(self, cycle: Cycle) -> None: ...
    def finished(self, cycle: Cycle) -> None: ...
    def close(self) -> None: ...


class Cycle:
    __slots__ = ("_awaits_100", "_bodiless", "_chunked", "_connection", "_head", "_http_version", "_left", "_method",
                 "_news", "_on_leave", "_pieces", "_size_bytes", "_waiter", "begun", "broken_off", "complete",
                 "endless", "gone", "keep_alive", "more_body", "task")  # fmt: skip

    def __init__(self, connection: Connection, method: str, http_version: str, *, awaits_100: bool) -> None:
        self._connection, self._method, self._http_version = connection, method, http_version
        self._awaits_100 = awaits_100
        self.task: asyncio.Task[None] | None = None
        self.keep_alive = self.more_body = True
        self.gone = False
        """The client is: what is written goes nowhere."""
        self.begun = self.complete = False
        """The reply."""
        self.broken_off = False
        """It is left without its end, and whoever did that has said so."""
        self.endless = False
        """It is to be ended when the server stops."""
        self._pieces: list[bytes] = []
        self._size_bytes = 0
        self._news = self._chunked = self._bodiless = False
        self._waiter: asyncio.Future[None] | None = None
        self._on_leave: Callable[[], None] | None = None
        self._head = b""
        """Held back until the first piece: both leave in one packet."""
        self._left = -1
        """Of the length that the reply announced; negative: it did not."""

    # --- the request

    def feed(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._size_bytes += len(piece)
        self._tell()

    @property
    def full(self) -> bool:
        """Enough of the body is here that nobody has read, and somebody still may."""
        return self._size_bytes > READ_AHEAD_BYTES and not self.complete

    def feed_end(self) -> None:
        self.more_body = False
        self._tell()

    def leave(self) -> None:
        """The client does."""
        if not self.complete:
            self.gone = True
            if self._on_leave:
                self._on_leave()
        self._tell()

    def watch(self, on_leave: Callable[[], None] | None) -> None:
        """Calls it when the client leaves, or now if it is gone; None: nobody wants to know any more."""
        self._on_leave = on_leave
        if on_leave and self.gone:
            on_leave()

    def _tell(self) -> None:
        self._news = True
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def whole_body(self) -> bytes | None:
        """All of the body, if it is here and none of it was read; else None, and `receive` has it."""
        if self.more_body or not self._news or self.gone:
            return None
        self._news = False
        return self._all()

    def _all(self) -> bytes:
        if self._size_bytes > READ_AHEAD_BYTES:
            self._connection.resume_reading()  # now, and not with the next `receive`: there may be none
        pieces, self._pieces, self._size_bytes = self._pieces, [], 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def receive(self) -> MutableMapping[str, Any]:
        if self._awaits_100 and not self.begun and not self.gone:
            self._awaits_100 = False
            self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self.gone and not self.complete:
            while not self._news:
                self._waiter = self._connection.loop.create_future()
                await self._waiter
            self._news = False
        if self.gone or self.complete:
            return _GONE.copy()
        return {"type": "http.request", "body": self._all(), "more_body": self.more_body}

    # --- the reply

    def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """It goes out with the first piece, or with `flush`. `headers`: names in lower case. Raises RuntimeError for
        what would not be a head.
        """
        if self.begun:
            raise RuntimeError("The reply has begun already.")
        lines = [_STATUS_LINES[status], self._connection.date_line()]
        for name, value in headers:
            if name == b"content-length":
                self._left = int(value)
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive = False
                continue
            elif name == b"transfer-encoding":
                continue
            elif b"\n" in value or b"\r" in value:
                raise RuntimeError(f"The header {name.decode()} has the end of a line in it.")
            lines += (name, b": ", value, b"\r\n")
        self._frame(status, lines)
        self.begun = True
        if not self.gone:
            self._head = b"".join(lines)

    def _frame(self, status: int, lines: list[bytes]) -> None:
        """How the client knows where the reply ends."""
        self._bodiless = self._method == "HEAD" or status in _BODILESS
        if not self._bodiless and self._left < 0:
            self._chunked = self._http_version != "1.0"
            self.keep_alive &= self._chunked
            if self._chunked:
                lines += (b"transfer-encoding: chunked", b"\r\n")
        if self._awaits_100 and self.more_body:
            self.keep_alive = False  # nobody can know whether the body follows, or the next request
        if not self.keep_alive:
            lines += (b"connection: close", b"\r\n")
        lines.append(b"\r\n")

    def write(self, piece: bytes, more: bool) -> Awaitable[None] | None:
        """What is returned is to be awaited before the next piece: the client does not keep up."""
        if self.gone:
            return None
        if not self.begun or self.complete:
            raise RuntimeError("There is no reply under way.")
        data = self._framed(piece, more)
        if self._head:
            data, self._head = self._head + data, b""
        if data:
            self._connection.transport.write(data)
        if not more:
            self._end()
        elif self._connection.stuck:
            return self._connection.writable()
        return None

    def _framed(self, piece: bytes, more: bool) -> bytes:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
            return data if more else data + b"0\r\n\r\n"
        if self._bodiless:
            return b""
        if self._left >= 0:
            self._left -= len(piece)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("The reply is not as long as it said.")
        return piece

    def flush_soon(self) -> None:
        """For whoever does not know when there is a first piece."""
        self._connection.loop.call_soon(self.flush)

    def flush(self) -> None:
        """The head alone, if it is still here."""
        if self._head and not self.gone:
            head, self._head = self._head, b""
            self._connection.transport.write(head)

    def _end(self) -> None:
        self.complete = True
        self._tell()
        self._connection.completed(self)

    def end_early(self) -> None:
        """What was said so far is all of it, and the client is told that this is the end."""
        if self.task and not self.complete:
            self.keep_alive = False
            self.write(b"", False)
            self.task.cancel()

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self._connection.stuck and not self.gone:
            await self._connection.writable()
        if self.gone:
            return
        if message["type"] == "http.response.start":
            self.start(message["status"], [(name.lower(), value) for name, value in message.get("headers", ())])
            self.flush_soon()
            self.endless = message.get(ENDLESS, False)
            if self.endless and self._connection.ending:
                self._connection.loop.call_soon(self.end_early)
        elif wait := self.write(message.get("body", b""), message.get("more_body", False)):
            await wait

    # --- the application

    async def run(self, app: App, scope: Scope) -> None:
        try:
            await app(scope, self.receive, self.send)
        except asyncio.CancelledError:
            self.close()
            raise
        except Exception:  # the border: whatever it is, the client gets an answer, and the log a traceback
            log.exception("Exception in ASGI application")
            self._give_up()
        else:
            if not self.complete and not self.gone:
                if not self.broken_off:
                    log.error("ASGI callable returned without completing response.")
                self._give_up()
        finally:
            self._connection.finished(self)

    def _give_up(self) -> None:
        if self.begun or self.gone:
            self.close()
            return
        body = b"Internal Server Error"
        self.start(500, [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body)),
                         (b"connection", b"close")])  # fmt: skip
        self.write(body, False)

    def close(self) -> None:
        """What was written is still sent; the client sees that the rest is missing."""
        self.flush()
        self._connection.close()
