"""Requests in, replies out: bodies with limits, query parameters, and errors as responses, translated once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nimhost.api.decode import parse_json
from nimhost.errors import (
    ERROR_HEADER,
    BodyTooLarge,
    InvalidRequest,
    NimhostError,
    NotReady,
    Problem,
    Unauthorized,
    status_of,
)
from nimhost.gateway.buffers import BUFFERS
from nimhost.gateway.cycle import DIRECT, ENDLESS

log = logging.getLogger(__name__)
Json = dict[str, Any]
BODY_LIMIT_BYTES = 4 << 20
"""Reading the worst of JSON takes 60 ms of a core for each MB."""
IN_THREAD_BYTES = 64 << 10
"""From here on a body is read beside the loop."""
_READ_FACTOR = 16
"""So many times its size the worst of JSON takes once it is read."""
_HELD = "nimhost.held"
QUIET_LIMIT_S = 60.0
"""A client that sends nothing for so long in the middle of a body has gone away."""
_LARGEST_PAGE = 10**9


# --- in ------------------------------------------------------------------------------------------------------------


async def read_json(request: Request) -> Json:
    """The JSON object in the body. Raises InvalidRequest, BodyTooLarge, NotReady; HTTPException 415, 408."""
    body, held = bytearray(), request.scope.get(_HELD)
    async for chunk in body_chunks(request, BODY_LIMIT_BYTES):
        if body and held is not None:
            held.add(_READ_FACTOR * len(chunk))
        body += chunk
    if body and not request.headers.get("content-type"):
        raise _not_json("one without a content type")
    if len(body) < IN_THREAD_BYTES:
        return parse_json(bytes(body))
    return await asyncio.to_thread(parse_json, bytes(body))


def check_json(request: Request) -> None:
    """Raises HTTPException 415 for a body that is said to be anything but JSON."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type and content_type != "application/json" and not content_type.endswith("+json"):
        raise _not_json(f"'{content_type}'")


def _not_json(given: str) -> HTTPException:
    return HTTPException(415, f"A JSON body is needed, not {given}: send 'Content-Type: application/json'.")


async def body_chunks(request: Request, limit_bytes: int | None = None) -> AsyncIterator[bytes]:
    """The body as it comes. Raises BodyTooLarge; HTTPException 408 when it stops coming."""
    declared = request.headers.get("content-length", "")
    if limit_bytes is not None and declared.isdigit() and int(declared) > limit_bytes:
        raise BodyTooLarge(f"The body is larger than {limit_bytes:,} bytes.")
    stream, size_bytes = request.stream(), 0
    while True:
        try:
            async with asyncio.timeout(QUIET_LIMIT_S):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as e:
            raise HTTPException(408, f"Nothing more of the body came for {QUIET_LIMIT_S:g} seconds.") from e
        except ClientDisconnect as e:
            raise HTTPException(400, "The client went away in the middle of the body.") from e
        size_bytes += len(chunk)
        if limit_bytes is not None and size_bytes > limit_bytes:
            raise BodyTooLarge(f"The body is larger than {limit_bytes:,} bytes.")
        yield chunk


def query_int(request: Request, name: str, default: int, low: int, high: int = _LARGEST_PAGE) -> int:
    """A whole number of the query string. Raises InvalidRequest, naming it."""
    text = request.query_params.get(name)
    if text is None:
        return default
    number = int(text) if text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20 else None
    if number is None:
        raise _bad_query(name, text, "Input should be a valid integer", "int_parsing")
    if number < low:
        raise _bad_query(name, text, f"Input should be greater than or equal to {low}", "greater_than_equal")
    if number > high:
        raise _bad_query(name, text, f"Input should be less than or equal to {high}", "less_than_equal")
    return number


def query_flag(request: Request, name: str) -> bool:
    """A yes or no of the query string. Raises InvalidRequest, naming it."""
    text = request.query_params.get(name, "false").lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise _bad_query(name, text, "Input should be a valid boolean", "bool_parsing")
    return text in ("true", "1", "yes")


def _bad_query(name: str, text: str, msg: str, type: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {msg}", problems=(Problem(("query", name), msg, type, text),))


def bad_sort(text: str, sortable: tuple[str, ...]) -> InvalidRequest:
    choices = ", ".join(f"'{name}', '-{name}'" for name in sortable)
    return _bad_query("sort", text, f"Input should be one of {choices}", "enum")


# --- out -----------------------------------------------------------------------------------------------------------


class JsonReply(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class EndlessReply(StreamingResponse):
    """What comes as it comes: when the daemon stops, that is its end."""

    endless = True
    """False: it has an end of its own, which the daemon waits for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marking(message: Message) -> None:
            await send({**message, ENDLESS: self.endless} if message["type"] == "http.response.start" else message)

        await super().__call__(scope, receive, marking)


def event(body: Json) -> bytes:
    """One of a stream of events."""
    return b"data: %b\n\n" % msgspec.json.encode(body)


def empty_reply(status: int) -> Response:
    return Response(status_code=status)


def error_reply(error: NimhostError) -> Response:
    """The one place where an error of ours becomes a response of the control plane."""
    problems = error.problems if isinstance(error, InvalidRequest) else ()
    body: Json = {"detail": list(problems) or error.message}
    if error.hint:
        body["hint"] = error.hint
    headers = {ERROR_HEADER: type(error).__name__}
    if error.final:
        headers["x-should-retry"] = "false"
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, NotReady):
        headers["retry-after"] = str(error.retry_after_s)
    return JsonReply(body, status_of(error), headers)


def http_error_reply(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    return JsonReply({"detail": detail}, status, dict(headers or {}))


def answering_errors(app: ASGIApp) -> ASGIApp:
    """`app`, with every error that it raises answered; a bug is logged, and its reply tells nothing of the inside."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        begun, held = False, BUFFERS.hold()

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await app({**scope, "app": app, _HELD: held}, receive, sending)
        except ClientDisconnect:
            return
        except Exception as error:  # the border: whatever it is, the client gets an answer and a bug gets a traceback
            reply = _answer_to(error, f"{scope['method']} {scope['path']}")
            if not begun:
                await reply(scope, receive, send)
            elif direct := scope.get("extensions", {}).get(DIRECT):
                direct.broken_off = True
            else:
                raise
        finally:
            held.let_go()

    return answer


def _answer_to(error: Exception, what: str) -> Response:
    if isinstance(error, HTTPException):
        return http_error_reply(error.status_code, error.detail, error.headers)
    if isinstance(error, NimhostError):
        if status_of(error) >= 500:
            log.warning("%s: %s: %s", what, type(error).__name__, error)
        return error_reply(error)
    log.error("%s failed", what, exc_info=error)
    return http_error_reply(500, "An unexpected error occurred.")
