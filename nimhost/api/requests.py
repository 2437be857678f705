"""The log of requests to models: the last ones, and each further one as it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimhost.api.http import EndlessReply, JsonReply, event, query_flag, query_int
from nimhost.api.parts import Parts
from nimhost.gateway.requestlog import RequestLog

Json = dict[str, Any]
PATH = "/apis/nimhost/v1/requests"
LIMIT, MOST, STEP = 100, 2000, 200
PAUSE_S = 0.2
"""Followers hear of new requests at most this often."""
HEARTBEAT_S = 15.0
Wanted = Callable[[Json], bool]


def routes(parts: Parts) -> list[Route]:
    log = parts.gateway.traffic.log if parts.gateway else RequestLog()

    async def answer(request: Request) -> Response:
        """The newest `limit` of those that are asked for, the oldest of them first; with `follow=true` as events, and
        then those that come."""
        limit, wanted = query_int(request, "limit", LIMIT, low=0, high=MOST), _wanted(request)
        count = log.count
        found = await last_of(log, wanted, limit)
        if not query_flag(request, "follow"):
            return JsonReply({"data": found, "dropped": log.dropped})
        events = follow(log, count, found, wanted)
        return EndlessReply(events, headers={"cache-control": "no-store"}, media_type="text/event-stream")

    return [Route(PATH, answer, methods=["GET"])]


async def last_of(log: RequestLog, wanted: Wanted, limit: int) -> list[Json]:
    """In steps, so that nobody waits while two thousand of them are looked at."""
    found: list[Json] = []
    end = log.count
    while len(found) < limit and end > log.dropped:
        begin = max(end - STEP, log.dropped)
        found = [one for one in log.between(begin, end) if wanted(one)] + found
        end = begin
        await asyncio.sleep(0)
    return found[len(found) - min(limit, len(found)) :]


async def follow(log: RequestLog, number: int, first: list[Json], wanted: Wanted) -> AsyncIterator[bytes]:
    """`first`, and all that come after that number. Whoever reads too slowly is told how many it missed."""
    for one in first:
        yield event(one)
    while True:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await log.wait(number)
        except TimeoutError:
            yield b": nothing new\n\n"
            continue
        await asyncio.sleep(PAUSE_S if log.count - number < STEP else 0)
        news = log.after(number, STEP)
        if missed := news[0]["number"] - number - 1:
            yield event({"missed": missed})
        number = news[-1]["number"]
        yield b"".join(event(one) for one in news if wanted(one))


def _wanted(request: Request) -> Wanted:
    given = request.query_params
    names = {key: given[key] for key in ("model", "provider", "adapter") if given.get(key)}
    workspace = given.get("workspace")
    failed = query_flag(request, "failed")

    def wanted(one: Json) -> bool:
        return (
            all(_is_named(one[key], name) for key, name in names.items())
            and (not failed or bool(one["error"]))
            and (not workspace or _is_in(one, workspace))
        )

    return wanted


def _is_named(ref: str | None, name: str) -> bool:
    """`workspace/name`, or the name alone."""
    return ref is not None and name in (ref, ref.partition("/")[2])


def _is_in(one: Json, workspace: str) -> bool:
    """Whether it asked for something of that workspace, or was answered there."""
    return any((one[key] or "").startswith(f"{workspace}/") for key in ("model", "provider"))
