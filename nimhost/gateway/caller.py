"""The client's side of one request: its body comes in, a reply goes out."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence

from nimhost.errors import BodyTooLarge, NimhostError
from nimhost.gateway.buffers import BUFFERS, Held
from nimhost.gateway.cycle import DIRECT, Cycle, Receive, Scope, Send
from nimhost.gateway.exchange import ClientLeft, Exchange
from nimhost.gateway.headers import REQUEST_ID, RawHeaders, find
from nimhost.gateway.messages import Messages
from nimhost.gateway.replies import error_event, error_reply, kind_of
from nimhost.gateway.requestlog import BODY_BYTES, SHOWN_LENGTH, Record

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_id_prefix, _id_numbers = secrets.token_hex(6).encode(), itertools.count(1)


class Caller:
    __slots__ = ("_body_limit_bytes", "_wire", "before_last", "fields", "first_piece", "headers", "held", "last_piece",
                 "method", "query", "record", "reply_headers", "request_id", "scope", "status")  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, send: Send, body_limit_bytes: int) -> None:
        self.scope = scope
        direct: Cycle | None = (scope.get("extensions") or {}).get(DIRECT)
        self._wire: Cycle | Messages = direct or Messages(receive, send)
        self.method: str = scope["method"]
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.fields = dict(self.headers)
        self.query: bytes = scope["query_string"]
        self.request_id: bytes = _request_id(self.fields.get(REQUEST_ID))
        self._body_limit_bytes = body_limit_bytes
        self.record = Record(self.method, scope["path"], self.request_id, time.perf_counter())
        self.status = 0
        """Of the reply; 0: it has not begun."""
        self.reply_headers: Sequence[tuple[bytes, bytes]] = ()
        self.first_piece = self.before_last = self.last_piece = b""
        """Of what an upstream said."""
        self.held: Held | None = None
        """Its part of the room for large bodies, until the request is over."""

    @property
    def task(self) -> asyncio.Task[None] | None:
        return self._wire.task

    def watch(self, on_leave: Callable[[], None] | None) -> None:
        """Calls back when the client leaves; None: nobody wants to know any more."""
        self._wire.watch(on_leave)

    # --- the body

    async def read(self) -> bytes:
        """The whole body. Raises BodyTooLarge, ClientLeft; NotReady when large bodies fill the room for them."""
        body = self._wire.whole_body()
        if body is None:
            return await self._read_pieces()
        if len(body) > self._body_limit_bytes:
            raise self._too_large()
        return body

    async def _read_pieces(self) -> bytes:
        self.held = BUFFERS.hold()
        pieces: list[bytes] = []
        size_bytes, more = 0, True
        while more:
            piece, more = await self.read_piece(size_bytes)
            size_bytes += len(piece)
            if pieces:
                self.held.add(len(piece))
            pieces.append(piece)
        return b"".join(pieces)

    async def read_piece(self, read_before_bytes: int = 0) -> tuple[bytes, bool]:
        """The next piece of the body, and whether more follows. Raises BodyTooLarge, ClientLeft."""
        announced = self.fields.get(b"content-length", b"")
        if len(announced) > 6 and not read_before_bytes and int(announced) > self._body_limit_bytes:
            raise self._too_large()
        record, since_s = self.record, time.perf_counter()
        message = await self._wire.receive()
        record.waited_s += time.perf_counter() - since_s
        if message["type"] == "http.disconnect":
            raise ClientLeft
        piece: bytes = message.get("body", b"")
        if read_before_bytes + len(piece) > self._body_limit_bytes:
            raise self._too_large()
        return piece, message.get("more_body", False)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is larger than {self._body_limit_bytes:,} bytes.")

    # --- the reply

    @property
    def begun(self) -> bool:
        return self.status != 0

    async def answer(self, status: int, headers: RawHeaders, body: bytes) -> None:
        """A reply of our own."""
        own = [(b"content-length", b"%d" % len(body)), (REQUEST_ID, self.request_id)]
        self.start(status, headers + own)
        if wait := self.write(body, False):
            await wait

    def start(self, status: int, headers: RawHeaders) -> None:
        """It goes out with the first piece, or after `flush_soon`."""
        self.status, self.reply_headers = status, headers
        self._wire.start(status, headers)

    def flush_soon(self) -> None:
        self._wire.flush_soon()

    def write(self, piece: bytes, more: bool) -> Awaitable[None] | None:
        """A piece of the reply, at once. What is returned is to be awaited before the next one: the client does not
        keep up.
        """
        if piece:
            self._see(piece)
        return self._wire.write(piece, more)

    def _see(self, piece: bytes) -> None:
        self.before_last, self.last_piece = self.last_piece, piece
        record = self.record
        if not record.first_at_s and record.head_at_s:
            self.first_piece, record.first_at_s = piece, time.perf_counter()
        if record.reply_body is not None:
            record.reply_body += piece[: BODY_BYTES - len(record.reply_body)]

    async def fail(self, error: NimhostError) -> None:
        """Before the first byte: the error as a reply. After it: the error as an event where there can be one.

        A reply that has begun is left without its end, and the server closes the connection: the client sees that it
        is not whole.
        """
        self.record.error, self.record.reason = kind_of(error), error.message.partition("\n")[0][:SHOWN_LENGTH]
        if not self.begun:
            await self.answer(*error_reply(error, self.scope["path"]))
            return
        logger.warning("request %s broke off: %s", self.request_id.decode(), error)
        self._wire.broken_off = True
        if _takes_events(self.reply_headers):
            whole = not self.last_piece or self.last_piece.endswith((b"\n\n", b"\r\n\r\n"))
            event = error_event(error, self.scope["path"])
            self.write(event if whole else b"\n\n" + event, True)


class Upload:
    """A body that is passed on while it still comes."""

    def __init__(self, caller: Caller, first: bytes) -> None:
        self._caller, self._next, self._more = caller, first, True
        self.first_piece = first
        self._size_bytes = len(first)
        self._exchange: Exchange | None = None
        length = caller.fields.get(b"content-length")
        self.framing = b"content-length: %b\r\n" % length if length else b""

    def begin(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __aiter__(self) -> Upload:
        return self

    async def __anext__(self) -> bytes:
        while not self._next:
            if not self._more:
                raise StopAsyncIteration
            self._next = await self._pull()
        piece, self._next = self._next, b""
        return piece

    async def _pull(self) -> bytes:
        exchange = self._exchange
        assert exchange, "begin() comes first"
        exchange.clients_turn()
        try:
            piece, self._more = await self._caller.read_piece(self._size_bytes)
        except (ClientLeft, BodyTooLarge) as error:
            exchange.end(error)
            await asyncio.Event().wait()  # the end of the exchange cancels us
        self._size_bytes += len(piece)
        exchange.upstreams_turn()
        return piece


def _request_id(given: bytes | None) -> bytes:
    if given and _REQUEST_ID.fullmatch(given):
        return given
    return b"%b-%x" % (_id_prefix, next(_id_numbers))


def _takes_events(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """An event can be added: the reply is a stream of events, not compressed and of no announced length."""
    kind = find(headers, b"content-type") or b""
    fixed = find(headers, b"content-encoding") or find(headers, b"content-length")
    return kind.startswith(b"text/event-stream") and not fixed
