"""Large bodies on the control plane: limited together with the gateway's, and read beside the loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator

import pytest

from nimhost.api import http
from nimhost.api.decode import parse_json
from nimhost.gateway.buffers import BUFFERS
from tests.api.conftest import MODELS, World
from tests.support import eventually

CREATE = f"{MODELS}/models"
HEADERS = {"content-type": "application/json"}
PIECE = 100_000


def large(name: str, pieces: int) -> bytes:
    return json.dumps({"name": name, "custom_fields": {"pad": "x" * PIECE * pieces}}).encode()


@pytest.mark.fault(40)
async def test_large_bodies_beyond_the_room_for_them_are_503_and_small_ones_are_served(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    async def in_pieces(body: bytes, pause: bool = False) -> AsyncIterator[bytes]:
        for start in range(0, len(body), PIECE):
            yield body[start : start + PIECE]
        if pause:
            await go_on.wait()

    body = large("first", 4)
    monkeypatch.setattr(BUFFERS, "limit_bytes", 20 * len(body))
    slow = asyncio.create_task(world("POST", CREATE, content=in_pieces(body, pause=True), headers=HEADERS))
    await eventually(lambda: BUFFERS.held_bytes > 10 * len(body))
    refused = await world("POST", CREATE, content=in_pieces(large("second", 4)), headers=HEADERS)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert "no room for another large request" in refused.json()["detail"]
    assert (await world("POST", CREATE, {"name": "small"})).status_code == 201
    go_on.set()
    assert (await slow).status_code == 201
    assert BUFFERS.held_bytes == 0
    again = await world("POST", CREATE, content=in_pieces(large("second", 4)), headers=HEADERS)
    assert again.status_code == 201
    assert BUFFERS.held_bytes == 0


@pytest.mark.fault(40)
async def test_a_large_body_is_read_beside_the_loop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    on_loop: list[bool] = []

    def parse(data: bytes) -> http.Json:
        on_loop.append(threading.current_thread() is threading.main_thread())
        return parse_json(data)

    monkeypatch.setattr(http, "parse_json", parse)
    assert (await world("POST", CREATE, {"name": "small"})).status_code == 201
    assert (await world("POST", CREATE, content=large("big", 20), headers=HEADERS)).status_code == 201
    twice = large("more", 20)[:-1] + b', "name": "more"}'
    reply = await world("POST", CREATE, content=twice, headers=HEADERS)
    assert (reply.status_code, reply.json()["detail"][0]["msg"]) == (422, "The field is there twice")
    assert on_loop == [True, False, False]
