"""The client's side of one request: its body comes in, a reply goes out, as ASGI messages."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from typing import Any
from weakref import WeakSet

from nimhost.errors import BodyTooLarge, NimhostError
from nimhost.gateway.exchange import ClientLeft, Exchange, Receive
from nimhost.gateway.headers import REQUEST_ID, RawHeaders, find
from nimhost.gateway.replies import error_event, error_reply

__all__ = ["Caller", "ClientLeft", "Receive", "Scope", "Send", "Upload"]

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_id_prefix, _id_numbers = secrets.token_hex(6).encode(), itertools.count(1)
_broken_off: WeakSet[Any] = WeakSet()
"""Tasks whose reply had to be left without its end."""


def _is_news(record: logging.LogRecord) -> bool:
    """A reply that we broke off, and said so, is no error of the application, as the server takes it to be."""
    ours = record.msg == "ASGI callable returned without completing response."
    return not (ours and asyncio.current_task() in _broken_off)


logging.getLogger("uvicorn.error").addFilter(_is_news)


class Caller:
    __slots__ = ("_body_limit_bytes", "_last_piece", "_reply_headers", "_send", "fields", "headers", "method", "query",
                 "receive", "request_id", "scope")  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, send: Send, body_limit_bytes: int) -> None:
        self.scope, self.receive, self._send = scope, receive, send
        self.method: str = scope["method"]
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.fields = dict(self.headers)
        self.query: bytes = scope["query_string"]
        self.request_id: bytes = _request_id(self.fields.get(REQUEST_ID))
        self._body_limit_bytes = body_limit_bytes
        self._reply_headers: RawHeaders | None = None
        self._last_piece = b""

    # --- the body

    async def read(self) -> bytes:
        """The whole body. Raises BodyTooLarge, ClientLeft."""
        body, more = await self.read_piece()
        if not more:
            return body
        pieces = [body]
        size_bytes = len(body)
        while more:
            body, more = await self.read_piece(size_bytes)
            size_bytes += len(body)
            pieces.append(body)
        return b"".join(pieces)

    async def read_piece(self, read_before_bytes: int = 0) -> tuple[bytes, bool]:
        """The next piece of the body, and whether more follows. Raises BodyTooLarge, ClientLeft."""
        announced = self.fields.get(b"content-length", b"")
        if len(announced) > 6 and not read_before_bytes and int(announced) > self._body_limit_bytes:
            raise self._too_large()
        message = await self.receive()
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
        return self._reply_headers is not None

    async def answer(self, status: int, headers: RawHeaders, body: bytes) -> None:
        """A reply of our own."""
        own = [(b"content-length", b"%d" % len(body)), (REQUEST_ID, self.request_id)]
        await self.start(status, headers + own)
        await self.send_piece(body, False)

    async def start(self, status: int, headers: RawHeaders) -> None:
        self._reply_headers = headers
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send_piece(self, piece: bytes, more: bool) -> None:
        self._last_piece = piece or self._last_piece
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})

    def push(self, piece: bytes) -> Awaitable[None] | None:
        """The same for a piece that is not the last, at once. The server lets a reply wait only while the client's
        buffer is full: then there is something to await.
        """
        self._last_piece = piece
        sending = self._send({"type": "http.response.body", "body": piece, "more_body": True}).__await__()
        try:
            return _Rest(sending, next(sending))
        except StopIteration:
            return None

    async def fail(self, error: NimhostError) -> None:
        """Before the first byte: the error as a reply. After it: the error as an event where there can be one.

        A reply that has begun is left without its end, and the server closes the connection: the client sees that it
        is not whole.
        """
        if self._reply_headers is None:
            await self.answer(*error_reply(error, self.scope["path"]))
            return
        logger.warning("request %s broke off: %s", self.request_id.decode(), error)
        _broken_off.add(asyncio.current_task())
        if _takes_events(self._reply_headers):
            whole = not self._last_piece or self._last_piece.endswith((b"\n\n", b"\r\n\r\n"))
            event = error_event(error, self.scope["path"])
            await self.send_piece(event if whole else b"\n\n" + event, True)


class _Rest:
    """Of something that was begun outside a task, up to its first wait."""

    def __init__(self, begun: Generator[Any, None, None], waiting_for: Any) -> None:
        self._begun, self._waiting_for = begun, waiting_for

    def __await__(self) -> Generator[Any, None, None]:
        yield self._waiting_for
        yield from self._begun


class Upload:
    """A body that is passed on while it still comes."""

    def __init__(self, caller: Caller, first: bytes) -> None:
        self._caller, self._next, self._more = caller, first, True
        self._size_bytes = len(first)
        self._exchange: Exchange | None = None
        length = caller.fields.get(b"content-length")
        self.framing = b"content-length: %b\r\n" % length if length else b""

    def begin(self, exchange: Exchange) -> None:
        self._exchange, exchange.uploaded = exchange, False

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
        exchange.uploaded = not self._more
        exchange.upstreams_turn()
        return piece


def _request_id(given: bytes | None) -> bytes:
    if given and _REQUEST_ID.fullmatch(given):
        return given
    return b"%b-%x" % (_id_prefix, next(_id_numbers))


def _takes_events(headers: RawHeaders) -> bool:
    """An event can be added: the reply is a stream of events, not compressed and of no announced length."""
    kind = find(headers, b"content-type") or b""
    fixed = find(headers, b"content-encoding") or find(headers, b"content-length")
    return kind.startswith(b"text/event-stream") and not fixed
