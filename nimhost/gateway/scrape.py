"""The metrics of the engines that run here, asked for all at once. One that is slow or dead costs only its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import NamedTuple

from nimhost.errors import NimhostError
from nimhost.gateway.relabel import merge
from nimhost.gateway.routes import Route, Target
from nimhost.gateway.upstream import ConnectionBroken, NothingSent, UpstreamPool
from nimhost.refs import Ref

log = logging.getLogger(__name__)
LIMIT_S = 2.0
LIMIT_BYTES = 2 << 20
_HEADERS = b"accept: text/plain;version=0.0.4\r\naccept-encoding: identity\r\n"


class Scrape(NamedTuple):
    text: str
    up: dict[Ref, bool]
    """Deployment -> did it tell."""


async def scrape(pool: UpstreamPool, providers: Iterable[Target]) -> Scrape:
    """Of all deployments that are ready. Takes `LIMIT_S` at most."""
    routes = [target.route for target in providers]
    own = [route for route in routes if route.upstream.policy != "external" and route.upstream.ready]
    said = await asyncio.gather(*(_ask(pool, route) for route in own))
    found = [(route.upstream.provider, text) for route, text in zip(own, said, strict=True)]
    texts = [((("workspace", ref.workspace), ("deployment", ref.name)), text) for ref, text in found if text]
    # In a thread: some engines tell thousands of lines, and requests must not wait for that.
    return Scrape(await asyncio.to_thread(merge, texts), {ref: text is not None for ref, text in found})


async def _ask(pool: UpstreamPool, route: Route) -> str | None:
    """What the engine of that route tells; None if it does not."""
    path = "v1/metrics" if route.upstream.policy == "nim" else "metrics"
    try:
        async with asyncio.timeout(LIMIT_S):
            return await _get(pool, route, route.url(path))
    except (NimhostError, NothingSent, ConnectionBroken, TimeoutError) as error:
        log.debug("no metrics of %s: %s", route.upstream.provider, error)
        return None


async def _get(pool: UpstreamPool, route: Route, url: str) -> str | None:
    reply = await pool.send(route, "GET", url, b"", _HEADERS + route.set_lines, None)
    try:
        pieces, size_bytes = [], 0
        while not reply.complete or reply.pieces:
            pieces.append(await reply.read())
            size_bytes += len(pieces[-1])
            if size_bytes > LIMIT_BYTES:
                return None
        return b"".join(pieces).decode("utf-8", "replace") if reply.status == 200 else None
    finally:
        reply.close()
