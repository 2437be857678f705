"""A reply in the client's format: read like the upstream's own, which it takes the place of."""

from __future__ import annotations

import re
import time

import msgspec

from nimhost.errors import NotSupported, UpstreamError
from nimhost.gateway.bodies import JsonBody
from nimhost.gateway.caller import Caller
from nimhost.gateway.headers import RawHeaders, find, request_headers
from nimhost.gateway.routes import Target
from nimhost.gateway.translate.fields import Json
from nimhost.gateway.translate.pairs import Translation
from nimhost.gateway.translate.replies import read_reply
from nimhost.gateway.translate.streams import Stream
from nimhost.gateway.upstream import Body, Reply

MAX_REPLY_BYTES = 50_000_000
IGNORED = b"x-nimhost-ignored"
"""Reply header that names the fields of the request that were left out."""
_REPLACED = frozenset({b"content-length", b"content-type", b"content-encoding", b"transfer-encoding"})
_NOT_SHOWN = re.compile(r"[^ -~]")
_encode = msgspec.json.Encoder().encode


class Interpreter:
    """For one request to one upstream that speaks another format than its client."""

    def __init__(self, translation: Translation, caller: Caller, body: JsonBody, target: Target) -> None:
        """Raises BadRequest for what the other format cannot express."""
        self._translation = translation
        sent, self._request, self._ignored = translation.request(body, target)
        lines = request_headers(caller.headers, target.route, caller.request_id, translation.not_sent)
        self.asked: tuple[str, bytes, bytes, Body] = (
            translation.url(target.route),
            b"",
            translation.headers(lines),
            sent,
        )
        """Address, query, header lines and body."""

    async def reply(self, reply: Reply) -> Translated:
        """Waits for all of a reply that is no stream. Raises UpstreamError, NotSupported."""
        headers = [(name.lower(), value) for name, value in reply.headers]
        if find(headers, b"content-encoding") not in (None, b"identity"):
            raise UpstreamError("The upstream compressed its reply although it was asked not to.")
        if (find(headers, b"content-type") or b"").startswith(b"text/event-stream") and reply.status < 400:
            stream = self._translation.stream(self._request, int(time.time()))
            return Translated(reply, self._headers(headers, b"text/event-stream; charset=utf-8"), stream)
        said = _encode(self._whole(reply.status, await _read(reply)))
        own = [*self._headers(headers, b"application/json"), (b"content-length", b"%d" % len(said))]
        return Translated(reply, own, None, said)

    def _whole(self, status: int, body: bytes) -> Json:
        if status < 400:
            return self._translation.reply(read_reply(body), int(time.time()))
        if self._translation.may_be_absent and status in (404, 405, 501):
            raise NotSupported("This model's server cannot count tokens.", "Take the usage of a reply instead.")
        return self._translation.error(status, body)

    def _headers(self, upstream: RawHeaders, kind: bytes) -> RawHeaders:
        kept = [(name, value) for name, value in upstream if name not in _REPLACED]
        ignored = _NOT_SHOWN.sub("?", ", ".join(self._ignored))[:1000].encode()  # clients name fields as they like
        return [*kept, (b"content-type", kind), *([(IGNORED, ignored)] if ignored else [])]


class Translated:
    """`stream`: it is read event by event; else `said` is all of it."""

    __slots__ = ("_reply", "_said", "_stream", "complete", "headers", "status")

    def __init__(self, reply: Reply, headers: RawHeaders, stream: Stream | None, said: bytes = b"") -> None:
        self._reply, self._stream, self._said = reply, stream, said
        self.status, self.headers = reply.status, headers
        self.complete = False

    async def read(self) -> bytes:
        """What there is to say since, at least a byte; b"" at the end. Raises UpstreamError."""
        if self.complete or self._stream is None:
            said, self._said, self.complete = self._said, b"", True
            return said
        while True:
            if self._stream.failed:
                raise self._stream.failed
            said = self._stream.feed(await self._reply.read())
            if self._reply.complete:
                said += self._stream.close()
                self.complete = self._stream.failed is None
            if said or self.complete:
                return said


async def _read(reply: Reply) -> bytes:
    pieces, size_bytes = [], 0
    while not reply.complete or reply.pieces:
        pieces.append(await reply.read())
        size_bytes += len(pieces[-1])
        if size_bytes > MAX_REPLY_BYTES:
            raise UpstreamError(f"The upstream's reply is larger than {MAX_REPLY_BYTES:,} bytes.")
    return b"".join(pieces)
