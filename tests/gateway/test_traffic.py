"""What is known of requests afterwards: counters, times, tokens, and the log."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nimhost.api.metrics import exposition
from nimhost.api.requests import STEP, follow
from nimhost.config import Gateway as GatewaySettings
from nimhost.entities import ServedModel
from nimhost.gateway.headers import reply_headers, request_headers
from nimhost.gateway.metrics import MOST_SERIES, OTHER, Histogram, Labels, Metrics, labels_of
from nimhost.gateway.requestlog import BODY_BYTES, KEPT, SHOWN_LENGTH, WORDS, Record, RequestLog
from nimhost.gateway.routes import Upstream, build_table
from nimhost.gateway.upstream import split_url
from nimhost.refs import Ref
from tests.fakes.engine import FakeEngine, Faults
from tests.gateway.conftest import Door, G, engine_upstream, open_door
from tests.support import eventually

OPENAI = f"{G}/default/openai/-/v1/chat/completions"
QWEN = b'{"model":"default/qwen","messages":[{"role":"user","content":"hello"}]}'
STREAM = QWEN[:-1] + b',"stream":true,"stream_options":{"include_usage":true}}'
CHAT_AT_P = f"{G}/default/provider/p/-/v1/chat/completions"
WAY = Labels("default/qwen", "default/p", "")


@pytest.fixture(autouse=True)
def routed(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine))


async def logged(door: Door, count: int = 1) -> list[dict[str, Any]]:
    log = door.gateway.traffic.log
    await eventually(lambda: log.count >= count)
    return log.after(0)


def counts(door: Door, way: Labels = WAY) -> tuple[dict[int, int], dict[str, int], int]:
    """Requests by status, errors by kind, and how many are under way."""
    found = {series.labels: series for series in door.gateway.traffic.metrics.all()}[way]
    return found.requests, found.errors, found.in_flight


async def test_a_request_is_counted_and_logged_with_its_tokens(door: Door) -> None:
    reply = await door.ask("POST", OPENAI, QWEN, ["X-Request-Id: mine-1", "Content-Type: application/json"])
    usage = reply.json()["usage"]
    (one,) = await logged(door)
    assert (one["id"], one["method"], one["path"], one["status"]) == ("mine-1", "POST", OPENAI, 200)
    assert (one["model"], one["provider"], one["adapter"], one["error"]) == ("default/qwen", "default/p", None, None)
    assert (one["prompt_tokens"], one["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert not one["streamed"]
    assert 0 < one["overhead_ms"] < one["first_byte_ms"] <= one["total_ms"]
    assert counts(door) == ({200: 1}, {}, 0)
    series = door.gateway.traffic.metrics.all()[0]
    assert (series.prompt_tokens, series.completion_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])


async def test_a_stream_is_timed_from_its_first_byte(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(chunks=10, chunk_delay_s=0.01)
    reply = await door.ask("POST", OPENAI, STREAM)
    assert reply.whole
    (one,) = await logged(door)
    assert one["streamed"]
    assert one["completion_tokens"]
    assert one["total_ms"] - one["first_byte_ms"] > 50
    assert one["tokens_per_second"] < one["completion_tokens"] / 0.05
    assert door.gateway.traffic.metrics.all()[0].tokens_per_s.buckets()[-1][1] == 1


async def test_the_reply_says_how_long_it_was_with_us(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(first_byte_delay_s=0.5)
    reply = await door.ask("POST", OPENAI, QWEN)
    overhead_ms = float(reply.headers["x-nimhost-overhead-ms"])
    assert 0 < overhead_ms < 400
    (one,) = await logged(door)
    assert one["overhead_ms"] == overhead_ms
    assert one["first_byte_ms"] > 500


async def test_a_slow_upload_is_not_our_time(door: Door) -> None:
    reader, writer = await door.open("POST", OPENAI, QWEN[:20], [f"Content-Length: {len(QWEN)}"])
    await asyncio.sleep(0.5)
    writer.write(QWEN[20:])
    assert b" 200 OK" in await reader.readline()
    writer.close()
    (one,) = await logged(door)
    assert one["overhead_ms"] < 400 < one["total_ms"]


async def test_the_request_id_goes_to_the_engine_and_back(door: Door, engine: FakeEngine) -> None:
    reply = await door.ask("POST", OPENAI, QWEN, ["X-Request-Id: mine-2"])
    assert reply.headers["x-request-id"] == "mine-2"
    assert engine.requests[-1].header("x-request-id") == "mine-2"


@pytest.mark.parametrize(
    ("faults", "body", "status", "kind"),
    [
        (Faults(status=429), QWEN, 429, "upstream_4xx"),
        (Faults(status=500), QWEN, 500, "upstream_5xx"),
        (Faults(close_before_reply=True), QWEN, 502, "upstream_error"),
        (Faults(drop_after_chunks=2), STREAM, 200, "upstream_error"),
        (Faults(hang=True), QWEN, 504, "upstream_timeout"),
        (Faults(hang_after_chunks=2), STREAM, 200, "upstream_timeout"),
    ],
)
@pytest.mark.fault(27)
async def test_what_failed_is_counted_by_its_kind(faults: Faults, body: bytes, status: int, kind: str) -> None:
    limits = GatewaySettings(first_byte_timeout_s=0.2, idle_timeout_s=0.2)
    async with FakeEngine(served=("qwen-served",), faults=faults) as engine, open_door(limits) as door:
        door.route(engine_upstream(engine))
        await door.ask("POST", OPENAI, body)
        (one,) = await logged(door)
        assert (one["status"], one["error"]) == (status, kind)
        assert counts(door) == ({status: 1}, {kind: 1}, 0)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind", "model"),
    [
        ("POST", OPENAI, b'{"model":"default/qwem"}', 404, "not_found", "default/qwem"),
        ("POST", OPENAI, b"{", 400, "bad_request", None),
        ("POST", f"{G}/default/provider/nobody/-/v1/x", b"", 404, "not_found", None),
        ("GET", "/v1", b"", 404, "not_found", None),
    ],
)
async def test_what_never_went_anywhere_is_counted_under_other(
    door: Door, method: str, path: str, body: bytes, status: int, kind: str, model: str | None
) -> None:
    if path == "/v1":
        path = "/apis/inference-gateway/v2/workspaces/default/openai/x"
    await door.ask(method, path, body)
    (one,) = await logged(door)
    assert (one["status"], one["error"], one["model"], one["provider"]) == (status, kind, model, None)
    assert one["error_message"]
    assert counts(door, OTHER) == ({status: 1}, {kind: 1}, 0)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model":"qwen-served","stream":true,"messages":[{"role":"user","content":"x"}]}', "default/qwen"),
        (
            b'{"messages":[{"role":"user","content":"\\"model\\": \\"no\\""}], "model" : "qwen\\u002dserved"}',
            "default/qwen",
        ),
        (b'{"model":"qwen-unheard-of","messages":[{"role":"user","content":"x"}]}', None),
        (b'{"model":7,"messages":[{"role":"user","content":"x"}]}', None),
        (b"model", None),
    ],
)
async def test_a_model_asked_for_on_its_provider_s_route_is_counted_by_its_name(
    door: Door, engine: FakeEngine, body: bytes, model: str | None
) -> None:
    way = Labels(model or "", "default/p", "")
    await door.ask("POST", CHAT_AT_P, body)
    (one,) = await logged(door)
    assert (one["model"], one["provider"]) == (model, "default/p")
    assert sum(counts(door, way)[0].values()) == 1
    assert engine.requests[-1].body == body


async def test_so_is_one_whose_body_comes_in_pieces(door: Door, engine: FakeEngine) -> None:
    body = b'{"model":"qwen-served","messages":[{"role":"user","content":"x"}]}'
    reader, writer = await door.open("POST", CHAT_AT_P, body[:30], [f"Content-Length: {len(body)}"])
    await eventually(door.gateway.traffic.metrics.all)
    writer.write(body[30:])
    assert b" 200 OK" in await reader.readline()
    writer.close()
    (one,) = await logged(door)
    assert (one["model"], one["provider"]) == ("default/qwen", "default/p")


def test_before_there_was_a_request_there_is_nothing_to_tell() -> None:
    assert Metrics().all() == []


@pytest.mark.fault(25)
@pytest.mark.parametrize(("faults", "status"), [(Faults(hang=True), 499), (Faults(hang_after_chunks=2), 200)])
async def test_a_client_that_left_is_an_error_of_its_own_kind(
    door: Door, engine: FakeEngine, faults: Faults, status: int
) -> None:
    engine.faults = faults
    reader, writer = await door.open("POST", OPENAI, STREAM)
    await eventually(lambda: engine.requests)
    if status == 200:
        await reader.readuntil(b"data: ")
    assert counts(door)[2] == 1
    writer.close()
    (one,) = await logged(door)
    assert (one["status"], one["error"]) == (status, "client_left")
    assert counts(door)[2] == 0


async def test_lists_of_models_are_not_in_the_log(door: Door) -> None:
    assert (await door.ask("GET", "/v1/models")).status == 200
    await door.ask("POST", OPENAI, QWEN)
    assert [one["path"] for one in await logged(door)] == [OPENAI]


async def test_an_adapter_has_a_label_of_its_own(door: Door, engine: FakeEngine) -> None:
    served = (ServedModel("default/default--poet", "qwen-served"),)
    door.route(engine_upstream(engine, served=served))
    await door.ask("POST", OPENAI, b'{"model":"default/default--poet"}')
    (one,) = await logged(door)
    assert (one["model"], one["adapter"]) == ("default/default--poet", "default--poet")


async def test_a_provider_that_could_not_be_reached_is_not_left_under_way(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine, "gone", base_url="http://127.0.0.1:9"), engine_upstream(engine))
    for _ in range(3):
        assert (await door.ask("POST", OPENAI, QWEN)).status == 200
    await logged(door, 3)
    assert all(series.in_flight == 0 for series in door.gateway.traffic.metrics.all())
    assert counts(door)[0] == {200: 3}


# --- bodies


async def test_bodies_are_kept_only_when_that_is_switched_on(door: Door, engine: FakeEngine) -> None:
    await door.ask("POST", OPENAI, QWEN, ["Authorization: Bearer sk-secret", "X-Other: sk-other"])
    (one,) = await logged(door)
    assert "request_body" not in one
    async with open_door(GatewaySettings(log_bodies=True)) as open_one:
        open_one.route(engine_upstream(engine, headers=(("authorization", "Bearer engine-secret"),)))
        reply = await open_one.ask("POST", OPENAI, QWEN, ["Authorization: Bearer sk-secret", "X-Other: sk-other"])
        (one,) = await logged(open_one)
    assert (one["request_body"], one["reply_body"]) == (QWEN.decode(), reply.body.decode())
    for secret in ("sk-secret", "sk-other", "engine-secret"):
        assert secret not in json.dumps(one)


@pytest.mark.fault(31)
async def test_of_long_bodies_only_the_begin_is_kept(engine: FakeEngine) -> None:
    engine.faults = Faults(chunks=50, chunk_bytes=2000)
    async with open_door(GatewaySettings(log_bodies=True)) as door:
        door.route(engine_upstream(engine))
        await door.ask("POST", OPENAI, STREAM[:-1] + b',"x":"' + b"y" * 100_000 + b'"}')
        (one,) = await logged(door)
    assert len(one["request_body"]) == len(one["reply_body"]) == BODY_BYTES


async def test_the_log_does_not_show_the_bodies_of_another_request(engine: FakeEngine) -> None:
    async with open_door(GatewaySettings(log_bodies=True)) as door:
        door.route(engine_upstream(engine))
        log = door.gateway.traffic.log = RequestLog(1)
        await door.ask("POST", OPENAI, QWEN)
        assert "request_body" in (await logged(door))[0]
        await door.ask("POST", OPENAI, b'{"model":"default/nobody"}')
        await eventually(lambda: log.count == 2)
        (one,) = log.after(1)
        assert one["status"] == 404
        assert "request_body" not in one


async def test_a_fault_of_ours_is_told_apart_from_a_client_that_left(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door.gateway, "_carry", None)
    assert (await door.ask("POST", OPENAI, QWEN)).status == 500
    (one,) = await logged(door)
    assert (one["status"], one["error"]) == (500, "internal_error")


# --- who follows


async def told(events: AsyncIterator[bytes]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((await asyncio.wait_for(anext(events), 5)).removeprefix(b"data: "))
    return found


async def test_a_request_that_comes_while_nobody_listens_yet_is_told_at_once() -> None:
    log = RequestLog()
    log.add(Record("POST", "/1", b"id", 0.0))
    events = follow(log, 0, [], lambda one: True)
    assert (await told(events))["path"] == "/1"
    log.add(Record("POST", "/2", b"id", 0.0))
    assert (await told(events))["path"] == "/2"


async def test_a_thousand_requests_are_told_in_steps() -> None:
    log = RequestLog()
    for number in range(1000):
        log.add(Record("POST", f"/{number}", b"id", 0.0))
    events = follow(log, 0, [], lambda one: True)
    found: list[Any] = []
    while len(found) < 1000:
        piece = await asyncio.wait_for(anext(events), 5)
        assert piece.count(b"data: ") <= STEP
        found += [json.loads(line.removeprefix(b"data: "))["path"] for line in piece.split(b"\n\n") if line]
    assert found == [f"/{number}" for number in range(1000)]


# --- bounds


@pytest.mark.fault(31)
async def test_the_metrics_of_many_ways_do_not_keep_requests_waiting(door: Door) -> None:
    metrics = door.gateway.traffic.metrics
    for number in range(200):
        served = (ServedModel(f"default/m{number}", "m"),)
        (target,) = build_table([Upstream(provider=Ref("default", "x"), base_url="http://x", served=served)]).model(
            "default", f"m{number}"
        )
        metrics.series(target).requests[200] = 1
    begun = time.thread_time()
    text = await exposition(door.gateway, {"deployments": {}, "gpus": []})
    assert time.thread_time() - begun < 0.03  # 0.15 on the loop
    assert text.count(b"nimhost_gateway_requests_total{") == 200


@pytest.mark.fault(31)
def test_of_long_paths_only_the_begin_is_kept() -> None:
    log = RequestLog(1000)
    tracemalloc.start()
    try:
        for number in range(1000):
            log.add(Record("POST", f"/{number}{'x' * 60_000}", b"id", 0.0))
        assert tracemalloc.get_traced_memory()[0] < 2_000_000
    finally:
        tracemalloc.stop()
    assert log.after(999)[0]["path"] == f"/999{'x' * (SHOWN_LENGTH - 4)}"


@pytest.mark.fault(31)
def test_names_of_headers_and_long_urls_are_not_kept_without_end(door: Door) -> None:
    route = next(iter(door.gateway.table.providers.values())).route
    tracemalloc.start()
    try:
        for number in range(3000):
            name = b"%d-" % number + b"x" * 20_000
            request_headers([(name, b"")], route, b"1")
            reply_headers([(name, b"")], b"1")
            split_url(f"http://x/{number}/{'x' * 20_000}")
        for number in range(3000):
            request_headers([(b"x-%d" % number, b"")], route, b"1")
        assert tracemalloc.get_traced_memory()[0] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.fault(31)
def test_a_full_log_forgets_the_oldest_and_says_how_many() -> None:
    log = RequestLog()
    for number in range(KEPT + 10):
        log.add(Record("POST", f"/{number}", b"id", 0.0))
    kept = log.after(0)
    assert (len(kept), log.dropped, kept[0]["number"], kept[-1]["number"]) == (KEPT, 10, 11, KEPT + 10)
    assert [one["number"] for one in log.after(KEPT + 8)] == [KEPT + 9, KEPT + 10]
    assert log.after(KEPT + 10) == []


@pytest.mark.fault(31)
def test_paths_without_number_are_not_kept_without_end() -> None:
    log = RequestLog(3)
    for number in range(WORDS * 3):
        log.add(Record("POST", f"/{number}", b"x" * 128, 0.0))
    assert [one["path"] for one in log.after(0)] == [f"/{WORDS * 3 - left}" for left in (3, 2, 1)]
    assert log.after(0)[0]["id"] == "x" * 128
    assert len(log._known) <= WORDS


@pytest.mark.fault(31)
def test_the_number_of_series_is_bounded(engine: FakeEngine) -> None:
    metrics = Metrics()
    for number in range(MOST_SERIES + 10):
        served = (ServedModel(f"default/m{number}", "m"),)
        (target,) = build_table([engine_upstream(engine, served=served)]).model("default", f"m{number}")
        series = metrics.series(target)
        series.requests[200] = series.requests.get(200, 0) + 1
    assert metrics.all()[-1].requests == {200: 10}
    assert len(metrics.all()) == MOST_SERIES + 1
    assert metrics.all()[-1].labels == OTHER


def test_one_model_under_two_served_names_is_one_series(engine: FakeEngine) -> None:
    metrics = Metrics()
    for name in ("old", "new"):
        (target,) = build_table([engine_upstream(engine, served=(ServedModel("default/m", name),))]).model(
            "default", "m"
        )
        metrics.series(target)
    assert [series.labels.model for series in metrics.all()] == ["default/m"]


@pytest.mark.parametrize(
    ("ref", "served_name", "wanted"),
    [
        (Ref("w", "m"), "x", Labels("w/m", "w/p", "")),
        (Ref("w", "p"), "", Labels("", "w/p", "")),
        (Ref("w", "w--a"), "w--a", Labels("w/w--a", "w/p", "w--a")),
    ],
)
def test_labels(ref: Ref, served_name: str, wanted: Labels) -> None:
    assert labels_of(ref, Ref("w", "p"), served_name) == wanted


def test_a_histogram_counts_up_to_each_bound() -> None:
    found = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 7.0):
        found.add(value)
    assert found.buckets() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert found.total == 10.0
