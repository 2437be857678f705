"""One HTTP/1.1 connection to an upstream, one request at a time: bytes out, a reply's payload back.

Chunks and lengths are undone by httptools; what they carried is handed on as it came. The pool above this file knows
where to connect; here is only what happens on the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple, Protocol

import httptools

MAX_HEAD_BYTES = 65_536
MAX_HEADERS = 256
READ_AHEAD_BYTES = 131_072
"""So much of a reply is kept for a slow client before the upstream is made to wait."""
JOINED_BYTES = 65_536
"""Up to here a copy of the body is cheaper than a second buffer for the kernel."""

BROKE_OFF, NO_ANSWER = "broke off in the middle of its reply", "closed the connection without an answer"


class Origin(NamedTuple):
    """What a connection leads to."""

    host: str
    port: int
    secure: bool


class ConnectionBroken(Exception):
    """`what` completes "Provider x …". `untouched`: not one byte of a reply had come."""

    def __init__(self, what: str, *, untouched: bool) -> None:
        super().__init__(what)
        self.what, self.untouched = what, untouched


class Uploading(Protocol):
    """A body that is still coming in."""

    framing: bytes
    """Its length if that is known, as a header line."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...


Body = bytes | Uploading | None
Taker = Callable[[bytes], Awaitable[None] | None]
"""Takes a piece of a reply at once; what it returns is to be awaited before the next one."""


class Reply:
    """A reply as it arrives; `status` and `headers` hold once `head()` has returned. Close it always: before its end
    that closes the connection too.
    """

    __slots__ = ("_broken", "_connection", "_stalled", "_waiter", "begun", "complete", "headers", "pieces",
                 "size_bytes", "status", "taker")  # fmt: skip

    def __init__(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self._waiter: asyncio.Future[None] | None = None
        self._broken: ConnectionBroken | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.size_bytes = 0
        """Of `pieces`: what has arrived and nobody has read."""
        self.begun = self.complete = False
        self.taker: Taker | None = None
        """Takes what comes while somebody waits in `read()`, so that nobody has to be woken for it."""
        self._stalled: Awaitable[None] | None = None

    async def head(self) -> None:
        """Wait for status and headers. Raises ConnectionBroken. Given up, the reply is closed."""
        try:
            while not self.begun:
                if self._broken:
                    raise self._broken
                self._waiter = self._connection.loop.create_future()
                await self._waiter
        except BaseException:  # cancelled, most of the time
            self.close()
            raise

    async def read(self) -> bytes:
        """What has arrived since, at least a byte; b"" at the end. Raises ConnectionBroken once all before the break
        has been read: the client is owed those bytes.
        """
        while not self.pieces:
            if self.complete:
                return b""
            if self._broken:
                raise self._broken
            self._waiter = self._connection.loop.create_future()
            await self._waiter
            if self._stalled:
                stalled, self._stalled = self._stalled, None
                await stalled
        self.size_bytes = 0
        if self._connection.held and not self.complete:
            self._connection.go_on()
        return self._all_pieces()

    def whole(self) -> bytes | None:
        """All of its body, if that is here already; else None, and `read` has it."""
        return self._all_pieces() if self.complete else None

    def _all_pieces(self) -> bytes:
        pieces = self.pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return piece

    def hand_over(self) -> bool:
        """What has come to the taker, if there is one and nothing before it is still on its way. False: it is kept."""
        if not self.taker or not self.pieces or not self._waiter or self._waiter.done():
            return False
        self._stalled = self.taker(self._all_pieces())
        if self._stalled:
            self.tell()
        return True

    def close(self) -> None:
        if not self.complete:
            self._connection.close()

    def tell(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def end_broken(self, why: ConnectionBroken) -> None:
        self._broken = why
        self.tell()


class UpstreamConnection(asyncio.Protocol):
    """Made by the pool, which is told when it may be used again (`on_free`) and when it is no more (`on_lost`)."""

    transport: asyncio.Transport

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        origin: Origin,
        on_free: Callable[[UpstreamConnection], None],
        on_lost: Callable[[UpstreamConnection], None],
    ) -> None:
        self.loop = loop
        self.origin = origin
        self.held = False
        """Its reply is read more slowly than it comes: the upstream has to wait."""
        self._on_free, self._on_lost = on_free, on_lost
        self._parser = httptools.HttpResponseParser(self)
        self._reply: Reply | None = None
        self._upload: asyncio.Task[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._open = True

    # --- the request

    def request(self, head: bytes, body: Body, *, bodiless: bool) -> Reply:
        """Send a request; `head` is all of it but the framing of the body and the empty line. `bodiless`: its reply
        has no body, whatever its headers say (HEAD).
        """
        self._reply = reply = Reply(self)
        self._headers, self._pieces = reply.headers, reply.pieces
        self._head_bytes = 0
        self._interim, self._keep, self._to_end, self._bodiless = False, False, False, bodiless
        if isinstance(body, bytes):
            head += b"content-length: %d\r\n\r\n" % len(body)
            if len(body) <= JOINED_BYTES:
                self.transport.write(head + body)
            else:
                self.transport.writelines((head, body))
        elif body is None:
            self.transport.write(head + b"\r\n")
        else:
            self.transport.write(head + (body.framing or b"transfer-encoding: chunked\r\n") + b"\r\n")
            self._upload = self.loop.create_task(self._send_pieces(body))
        return reply

    async def _send_pieces(self, body: Uploading) -> None:
        chunked = not body.framing
        async for piece in body:
            self.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if self._writable:
                await self._writable
        if chunked:
            self.transport.write(b"0\r\n\r\n")

    def pause_writing(self) -> None:
        self._writable = self.loop.create_future()

    def resume_writing(self) -> None:
        if self._writable:
            self._writable.set_result(None)
            self._writable = None

    # --- the reply: called by httptools, see `data_received`

    def on_message_begin(self) -> None:
        if self._reply and self._reply.complete:
            self._keep = False  # a second reply that nobody asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self._headers) >= MAX_HEADERS:
            raise ValueError("too many headers")
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        reply, status = self._reply, self._parser.get_status_code()
        if reply is None or reply.begun or status == 101:
            return
        if status < 200:
            self._interim = True
            self._headers.clear()
            return
        reply.status, reply.begun = status, True
        self._keep = self._parser.should_keep_alive()
        self._to_end = not self._keep and not _has_length(reply.headers)
        self._headers = []  # trailers are no headers: they go nowhere
        if self._bodiless:
            self._keep, reply.complete = False, True
            self._pieces = []

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        elif self._reply and self._reply.begun:
            self._reply.complete = True
            self._headers, self._pieces = [], []  # whatever may follow is not part of it

    # --- the socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:  # nobody asked
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._break("wants to speak another protocol, which the gateway does not")
            return
        except httptools.HttpParserError:
            if not reply.complete:
                self._break("does not speak HTTP")
                return
            self._keep = False
        if not reply.begun:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._break("sends too large headers")
            return
        if reply.complete:
            self._free()
        elif reply.hand_over():
            return
        else:
            reply.size_bytes += len(data)
            if reply.size_bytes > READ_AHEAD_BYTES and not self.held:
                self.held = True
                self.transport.pause_reading()
        reply.tell()

    def connection_lost(self, error: Exception | None) -> None:
        self._open = False
        if self._writable:  # the upload, if any, is cancelled below
            self._writable = None
        if reply := self._reply:
            if self._to_end and reply.begun and error is None:
                reply.complete = True
                self._stop()
                reply.tell()
            else:
                self._break(BROKE_OFF if reply.begun else NO_ANSWER)
        self._on_lost(self)

    def go_on(self) -> None:
        self.held = False
        if self._open:
            self.transport.resume_reading()

    def close(self) -> None:
        """At once: what was not sent yet is not sent any more."""
        self._stop()
        if self._open:
            self._open = False
            self.transport.abort()

    @property
    def usable(self) -> bool:
        return self._open and not self.transport.is_closing()

    def _free(self) -> None:
        """The reply is complete."""
        whole = self._upload is None or self._upload.done()
        self._stop()
        if self._keep and whole:
            if self.held:
                self.go_on()
            self._on_free(self)
        else:
            self.close()

    def _break(self, what: str) -> None:
        reply = self._reply
        self.close()
        if reply:
            reply.end_broken(ConnectionBroken(what, untouched=not reply.begun and not self._head_bytes))

    def _stop(self) -> None:
        self._reply = None
        if self._upload:
            self._upload.cancel()
            self._upload = None


def _has_length(headers: list[tuple[bytes, bytes]]) -> bool:
    """False: the reply ends where the connection does."""
    for name, value in headers:
        lower = name.lower()
        if lower == b"content-length" or (lower == b"transfer-encoding" and b"chunked" in value.lower()):
            return True
    return False
