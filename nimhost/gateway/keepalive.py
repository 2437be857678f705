"""Comments into a stream of events that has not begun, so that nobody in between takes it for dead (a long prompt).

They commit the reply to 200 before the upstream has said anything: what it says then must be a stream, or is an error
event. Off unless switched on.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn, Protocol

from nimhost.errors import UpstreamError
from nimhost.gateway.caller import Caller
from nimhost.gateway.headers import REQUEST_ID, find, reply_headers
from nimhost.gateway.routes import Route

PAUSE_S = 15.0
COMMENT = b": keep-alive\n\n"
SHOWN_BYTES = 500


class KeepAlive:
    """Runs from its making to `stop()`."""

    def __init__(self, caller: Caller) -> None:
        self._task = asyncio.get_running_loop().create_task(_comment(caller))

    def stop(self) -> None:
        self._task.cancel()


async def _comment(caller: Caller) -> None:
    await asyncio.sleep(PAUSE_S)
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    caller.start(200, [*headers, (REQUEST_ID, caller.request_id)])
    while True:
        if wait := caller.write(COMMENT, True):
            await wait
        await asyncio.sleep(PAUSE_S)


class Answer(Protocol):
    """A reply, as it came or translated."""

    status: int
    headers: list[tuple[bytes, bytes]]

    async def read(self) -> bytes: ...


def goes_on(reply: Answer) -> bool:
    """Can the reply follow the comments?"""
    kind = find(reply_headers(reply.headers, b""), b"content-type") or b""
    return reply.status == 200 and kind.startswith(b"text/event-stream")


async def tell_instead(reply: Answer, route: Route) -> NoReturn:
    """Raises what a client would have read in a reply that came too late to be one."""
    said = b""
    while len(said) < SHOWN_BYTES and (piece := await reply.read()):
        said += piece
    text = said[:SHOWN_BYTES].decode("utf-8", "replace").strip()
    raise UpstreamError(f"Provider {route.upstream.provider} answered with HTTP {reply.status}: {text}".rstrip(": "))
