"""A request's body on its way in: how much of it is read before it goes on, and as what."""

from __future__ import annotations

import asyncio

from nimhost.errors import BadRequest, BodyTooLarge, NotFound
from nimhost.gateway.bodies import (
    FormBody,
    JsonBody,
    PlainBody,
    name_in,
    read_form,
    read_form_for_model,
    read_json,
    read_model,
)
from nimhost.gateway.caller import Caller, Upload
from nimhost.gateway.routes import Route

AnyBody = JsonBody | FormBody | PlainBody | Upload | None
LARGE_BYTES = 1 << 20
"""From here on each step that a body takes is long enough for others to have their turn before the next one."""
_FORM = b"multipart/form-data"
_MAY_BE_JSON = (b"application/x-www-form-urlencoded", b"text/")
"""What clients say of JSON that they took no trouble with, curl for one."""


async def read_with_model(caller: Caller) -> JsonBody | FormBody:
    """Of a request whose model its body tells. Raises BadRequest; NotFound for a GET that has no body."""
    kind = caller.fields.get(b"content-type", b"")
    body = await _read(caller)
    if not body and caller.method in ("GET", "HEAD", "DELETE"):
        raise _nobody_named(caller)
    read = read_form(body, kind) if _is_form(kind) else read_model(body)
    if len(body) >= LARGE_BYTES:
        await asyncio.sleep(0)
    return read


async def read_for_model(caller: Caller) -> AnyBody:
    """Of a request whose model its path tells: JSON and forms are told it, anything else goes on as it comes.

    Raises BadRequest for broken JSON, BodyTooLarge.
    """
    kind = caller.fields.get(b"content-type", b"").lower()
    if _is_form(kind):
        return read_form_for_model(await _read(caller), caller.fields[b"content-type"])
    is_json = not kind or b"json" in kind
    if not is_json and not kind.startswith(_MAY_BE_JSON):
        return await _as_it_comes(caller)
    body = await _read(caller)
    try:
        return read_json(body) if body else PlainBody(body)
    except BodyTooLarge:
        raise
    except BadRequest:
        if is_json:
            raise
        return PlainBody(body)


async def read_for_provider(caller: Caller, route: Route, *, may_stream: bool) -> AnyBody:
    """As it came, streamed if it comes in pieces; read whole only if there is something to look for. `may_stream`: what
    is asked for has to be known.

    Raises BodyTooLarge for what should be looked at and is too much to."""
    absent = route.upstream.absent
    if (route.merges or may_stream or absent) and b"json" in caller.fields.get(b"content-type", b"json").lower():
        body = await _read(caller)
        try:
            read = read_json(body)
        except BodyTooLarge:
            raise
        except BadRequest:
            return PlainBody(body)
        if absent:
            route.check_adapter(name_in(read))
        return read
    return await _as_it_comes(caller)


async def _read(caller: Caller) -> bytes:
    body = await caller.read()
    if len(body) >= LARGE_BYTES:
        await asyncio.sleep(0)
    return body


async def _as_it_comes(caller: Caller) -> PlainBody | Upload:
    piece, more = await caller.read_piece()
    return Upload(caller, piece) if more else PlainBody(piece)


def _is_form(kind: bytes) -> bool:
    return kind[: len(_FORM)].lower() == _FORM


def _nobody_named(caller: Caller) -> NotFound:
    return NotFound(
        f"There is nothing at {caller.scope['path']} itself: what is asked for here names its model in its body, and "
        f"this {caller.method} has none.",
        "The list of models is at v1/models; any path of one provider at "
        "/apis/inference-gateway/v2/workspaces/WORKSPACE/provider/NAME/-/PATH",
    )
