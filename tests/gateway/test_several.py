"""Several providers for one model, on the wire: who is asked, and what happens when that one is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from nimhost.entities import ServedModel
from nimhost.gateway.balance import OPEN_AFTER
from nimhost.refs import Ref
from tests.fakes.engine import FakeEngine, Faults
from tests.gateway.conftest import Door, G, Reply, engine_upstream
from tests.support import eventually

OPENAI = f"{G}/default/openai/-/v1/chat/completions"
MODEL = f"{G}/default/model/qwen/-/v1/chat/completions"
ASK = b'{"model":"qwen","messages":[{"role":"user","content":"hi"}]}'
STREAM = b'{"model":"qwen","stream":true}'


@pytest.fixture
async def other() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(served=("other-name",), tag="b") as engine:
        yield engine


@pytest.fixture(autouse=True)
def routed(door: Door, engine: FakeEngine, other: FakeEngine) -> None:
    door.route(engine_upstream(engine), engine_upstream(other, "q"))


def served_by(reply: Reply) -> str:
    assert reply.status == 200
    return reply.headers["x-fake-instance"]


async def test_the_least_busy_one_is_asked_under_the_name_it_knows(
    door: Door, engine: FakeEngine, other: FakeEngine
) -> None:
    engine.faults = other.faults = Faults(first_byte_delay_s=0.2)
    asking = [asyncio.create_task(door.ask("POST", path, ASK)) for path in (OPENAI, MODEL) * 3]
    replies = await asyncio.gather(*asking)
    assert sorted(map(served_by, replies)) == ["a", "a", "a", "b", "b", "b"]
    assert {request.json()["model"] for request in other.requests} == {"other-name"}


async def test_what_runs_here_comes_before_what_is_elsewhere(door: Door, engine: FakeEngine, other: FakeEngine) -> None:
    door.route(engine_upstream(engine, policy="external"), engine_upstream(other, "q"))
    engine.faults = other.faults = Faults(first_byte_delay_s=0.1)
    replies = await asyncio.gather(*(door.ask("POST", OPENAI, ASK) for _ in range(4)))
    assert set(map(served_by, replies)) == {"b"}


@pytest.mark.fault(27)
@pytest.mark.parametrize("path", [OPENAI, MODEL, "/v1/chat/completions"])
async def test_one_that_cannot_be_reached_is_passed_over(
    door: Door, engine: FakeEngine, other: FakeEngine, path: str
) -> None:
    await engine.stop()
    replies = [await door.ask("POST", path, ASK) for _ in range(3)]
    assert set(map(served_by, replies)) == {"b"}
    await other.stop()
    assert (await door.ask("POST", path, ASK)).status == 502
    await engine.start()
    assert served_by(await door.ask("POST", path, ASK)) == "a"


@pytest.mark.fault(27)
async def test_what_was_sent_is_not_sent_to_another_one(door: Door, engine: FakeEngine, other: FakeEngine) -> None:
    engine.faults = Faults(close_before_reply=True)
    reply = await door.ask("POST", OPENAI, ASK)
    assert (reply.status, reply.headers["x-nimhost-error"]) == (502, "UpstreamError")
    assert (len(engine.requests), len(other.requests)) == (1, 0)


async def test_the_upstreams_own_refusals_pass(door: Door, engine: FakeEngine, other: FakeEngine) -> None:
    for status in (429, 503):
        engine.faults = Faults(status=status)
        assert (await door.ask("POST", OPENAI, ASK)).status == status
    assert not other.requests


@pytest.mark.fault(27)
async def test_one_that_keeps_failing_is_left_alone_until_it_is_well(
    door: Door, engine: FakeEngine, other: FakeEngine
) -> None:
    engine.faults = Faults(status=500)
    for _ in range(OPEN_AFTER):
        assert (await door.ask("POST", OPENAI, ASK)).status == 500
    assert served_by(await door.ask("POST", OPENAI, ASK)) == "b"
    door.route(engine_upstream(engine), engine_upstream(other, "q"))  # a new table forgets nothing
    assert served_by(await door.ask("POST", OPENAI, ASK)) == "b"
    engine.faults = Faults()
    standing = door.gateway.standings[Ref("default", "p")]
    standing.retry_at_s = 0.001  # the pause is over
    assert served_by(await door.ask("POST", OPENAI, ASK)) == "a"
    assert not standing.open(0.0)


async def test_requests_that_are_over_count_no_more(door: Door, engine: FakeEngine, other: FakeEngine) -> None:
    engine.faults = other.faults = Faults(chunks=100_000, chunk_delay_s=0.01)
    writers = []
    for _ in range(4):
        reader, writer = await door.open("POST", OPENAI, STREAM)
        await reader.readuntil(b"data: ")
        writers.append(writer)
    standings = list(door.gateway.standings.values())
    assert [standing.under_way for standing in standings] == [2, 2]
    for writer in writers:
        writer.close()
    await eventually(lambda: [standing.under_way for standing in standings] == [0, 0])


async def test_the_only_provider_is_asked_however_often_it_failed(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine, served=(ServedModel("default/qwen", "qwen-served"),)))
    engine.faults = Faults(status=500)
    for _ in range(OPEN_AFTER + 2):
        assert (await door.ask("POST", OPENAI, ASK)).status == 500
    engine.faults = Faults()
    assert served_by(await door.ask("POST", OPENAI, ASK)) == "a"
