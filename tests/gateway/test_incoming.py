"""Bodies on their way in, of every kind and on every route; and what of their headers goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nimhost.gateway.bodies import COUNTED_BYTES, MOST_VALUES, name_in, read_json
from nimhost.gateway.headers import request_headers
from nimhost.gateway.routes import Route, Upstream, build_table
from nimhost.refs import Ref
from tests.fakes.engine import FakeEngine
from tests.gateway.conftest import Door, G, engine_upstream
from tests.gateway.test_forms import FILE, LANGUAGE, MODEL, form
from tests.support import eventually

MODEL_ROUTE = f"{G}/default/model/qwen/-"
PROVIDER_ROUTE = f"{G}/default/provider/p/-"
JSON = ["Content-Type: application/json"]
FORM = ["Content-Type: multipart/form-data; boundary=xYz"]
DEEP = b"[" * 5000 + b"]" * 5000


@pytest.fixture(autouse=True)
def routed(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine, policy="generic"))


# --- nested without end


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/messages", f"{G}/default/openai/-/v1/chat/completions",
     f"{MODEL_ROUTE}/v1/chat/completions"],
)  # fmt: skip
async def test_json_that_is_nested_without_end_is_400_and_reaches_nobody(
    door: Door, engine: FakeEngine, path: str
) -> None:
    reply = await door.ask("POST", path, b'{"model": "qwen", "x": %b}' % DEEP, JSON)
    assert (reply.status, reply.headers["x-nimhost-error"]) == (400, "BadRequest")
    assert "nested too deeply" in reply.json()["error"]["message"]
    assert not engine.requests


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", "application/json"),
        ("/v1/messages", "application/json"),
        (f"{MODEL_ROUTE}/v1/chat/completions", "application/json"),
        (f"{MODEL_ROUTE}/v1/chat/completions", "text/plain"),
        (f"{PROVIDER_ROUTE}/v1/chat/completions", "application/json"),
    ],
)
async def test_json_with_fields_without_end_is_413_and_reaches_nobody(
    door: Door, engine: FakeEngine, path: str, kind: str
) -> None:
    """Nor does it pass by what the provider puts into every body."""
    door.route(engine_upstream(engine, policy="generic", required_body={"x": 1}))
    body = b'{"model": "qwen", "messages": [], %b}' % b",".join(b'"k%d":1' % i for i in range(200_000))
    reply = await door.ask("POST", path, body, [f"Content-Type: {kind}"])
    assert (reply.status, reply.headers["x-nimhost-error"]) == (413, "BodyTooLarge")
    assert "more than 1,000 fields at its top level. Put" in reply.json()["error"]["message"]
    assert not engine.requests


@pytest.mark.fault(40)
@pytest.mark.parametrize("value", [b"{}", b'["a,{["]', b'{"a": 1}', b"1"])
@pytest.mark.parametrize("place", [b'"messages": [%b]', b'"messages": [], "metadata": {"x": {"y": [%b]}}'])
async def test_json_with_values_without_end_is_not_translated(
    door: Door, engine: FakeEngine, place: bytes, value: bytes
) -> None:
    """Fifty megabytes of them were seconds of work, and gigabytes of memory."""
    body = b'{"model": "qwen", %b}' % place % b",".join([value] * MOST_VALUES)
    reply = await door.ask("POST", "/v1/messages", body, JSON)
    assert (reply.status, reply.headers["x-nimhost-error"]) == (413, "BodyTooLarge")
    assert "more than 200,000 values. Put" in reply.json()["error"]["message"]
    assert not engine.requests


async def test_a_long_text_is_translated_whatever_is_in_it(door: Door, engine: FakeEngine) -> None:
    text = ',[{"\\' * MOST_VALUES
    body = {"model": "qwen", "max_tokens": 5, "messages": [{"role": "user", "content": text}]}
    reply = await door.ask("POST", "/v1/messages", json.dumps(body).encode(), JSON)
    assert reply.status == 200
    assert json.loads(engine.requests[-1].body)["messages"] == body["messages"]


async def test_a_large_body_keeps_every_field_but_the_model_s_name(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine, policy="generic", default_body={"x": 1, "k1": 2}, required_body={"y": 2}))
    fields = {"model": "qwen", "messages": [], "text": "é" * COUNTED_BYTES, "y": 1, **{f"k{i}": i for i in range(900)}}
    reply = await door.ask("POST", "/v1/chat/completions", json.dumps(fields).encode(), JSON)
    assert reply.status == 200
    assert json.loads(engine.requests[-1].body) == {"x": 1, **fields, "y": 2, "model": "qwen-served"}


async def test_json_that_is_nested_too_deeply_to_be_translated_is_400(door: Door, engine: FakeEngine) -> None:
    """What is only passed over is not read as deeply as what is translated."""
    depth = 150
    while True:
        body = b'{"model": "qwen", "messages": [], "metadata": %b}' % (b"[" * depth + b"]" * depth)
        reply = await door.ask("POST", "/v1/messages", body, JSON)
        assert reply.status in (200, 400), reply.raw
        if b"nested too deeply" in reply.body:
            return
        depth += 50


@pytest.mark.parametrize("extra", [{}, {"default_body": {"x": 1}}], ids=["streamed", "looked-at"])
async def test_the_provider_route_passes_on_whatever_it_cannot_read(
    door: Door, engine: FakeEngine, extra: dict[str, Any]
) -> None:
    door.route(engine_upstream(engine, policy="generic", **extra))
    body = b'{"model": %b}' % DEEP
    await door.ask("POST", f"{PROVIDER_ROUTE}/v1/infer", body, JSON)
    assert engine.requests[-1].body == body


@pytest.mark.parametrize("kind", ["Application/JSON", "application/problem+JSON; charset=utf-8"])
async def test_json_is_json_in_capitals_too(door: Door, engine: FakeEngine, kind: str) -> None:
    door.route(engine_upstream(engine, policy="generic", required_body={"x": 1}))
    await door.ask("POST", f"{PROVIDER_ROUTE}/v1/infer", b"{}", [f"Content-Type: {kind}"])
    assert json.loads(engine.requests[-1].body) == {"x": 1}


def test_a_model_that_is_no_text_has_no_name() -> None:
    assert [name_in(read_json(body)) for body in (b'{"model": "\xff"}', b'{"model": [[1]]}', b"{}")] == ["", "", ""]


# --- the model's own route


@pytest.mark.parametrize("preamble", [b"", b"before it all\r\n"])
async def test_a_form_on_the_model_route_is_told_the_model(door: Door, engine: FakeEngine, preamble: bytes) -> None:
    own = MODEL.removesuffix(b"qwen") + b"qwen-served"
    sent = {
        "without": (form(FILE, LANGUAGE), form(own, FILE, LANGUAGE)),
        "with": (form(FILE, MODEL), form(FILE, own)),
        "with another": (form(MODEL + b"x", FILE), form(own, FILE)),
    }
    for body, expected in sent.values():
        reply = await door.ask("POST", f"{MODEL_ROUTE}/v1/audio/transcriptions", preamble + body, FORM)
        assert (reply.status, engine.requests[-1].body) == (200, preamble + expected)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"--x--", "multipart/form-data; boundary=other"),
        (b"--x--", "multipart/form-data"),
        (b"RIFF\x00\xff", "audio/wav"),
        (b"\x89PNG" + bytes(3_000_000), "application/octet-stream"),
        (b"a=b", "application/x-www-form-urlencoded"),
        (b"Hello", "text/plain"),
        (b"", "application/json"),
        (b"", ""),
    ],
)
async def test_any_other_body_on_the_model_route_goes_on_as_it_came(
    door: Door, engine: FakeEngine, body: bytes, kind: str
) -> None:
    headers = [f"Content-Type: {kind}"] if kind else []
    await door.ask("POST", f"{MODEL_ROUTE}/v1/infer", body, headers)
    assert engine.requests[-1].body == body
    assert engine.requests[-1].header("content-type") == (kind or None)


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", ""])
async def test_json_on_the_model_route_is_told_the_model_whatever_it_is_called(
    door: Door, engine: FakeEngine, kind: str
) -> None:
    body = json.dumps({"model": "another", "messages": []}).encode()
    await door.ask("POST", f"{MODEL_ROUTE}/v1/chat/completions", body, [f"Content-Type: {kind}"] if kind else [])
    assert json.loads(engine.requests[-1].body)["model"] == "qwen-served"


async def test_broken_json_on_the_model_route_is_400(door: Door, engine: FakeEngine) -> None:
    reply = await door.ask("POST", f"{MODEL_ROUTE}/v1/chat/completions", b'{"model": ', JSON)
    assert reply.status == 400
    assert not engine.requests


async def test_a_recording_on_the_model_route_is_passed_on_while_it_comes(door: Door, engine: FakeEngine) -> None:
    chunks = b"3\r\nabc\r\n" + b"0\r\n\r\n"
    headers = ["Content-Type: audio/wav", "Transfer-Encoding: chunked"]
    reader, writer = await door.open("POST", f"{MODEL_ROUTE}/v1/infer", b"4\r\nRIFF\r\n", headers)
    await eventually(lambda: engine.connections)  # it is asked before the body has an end
    writer.write(chunks)
    await reader.read()
    writer.close()
    assert (engine.requests[-1].body, engine.requests[-1].header("transfer-encoding")) == (b"RIFFabc", "chunked")


# --- requests without a body


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/foo", "/v1/", f"{G}/default/openai/-/v1/foo"])
async def test_a_request_without_a_body_where_it_has_to_name_the_model_says_so(
    door: Door, method: str, path: str
) -> None:
    reply = await door.ask(method, path)
    assert (reply.status, reply.headers["x-nimhost-error"]) == (404, "NotFound")
    said = reply.json()["error"]["message"]
    assert f"nothing at {path} itself" in said
    assert "names its model in its body" in said


async def test_a_get_with_a_body_that_names_its_model_is_carried(door: Door, engine: FakeEngine) -> None:
    assert (await door.ask("GET", "/v1/version", b'{"model": "qwen"}', JSON)).status == 200
    assert engine.requests[-1].path == "/v1/version"


# --- headers


def route(**more: Any) -> Route:
    upstream = Upstream(provider=Ref("default", "p"), base_url="http://x", **more)
    return build_table([upstream]).provider("default", "p").route


def sent(client: list[tuple[bytes, bytes]], route: Route, without: frozenset[bytes] = frozenset()) -> dict[str, str]:
    lines = request_headers(client, route, b"1", without).decode().splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    assert found.pop("x-request-id") == "1"
    return found


@pytest.mark.parametrize("name", ["x-api-key", "x-nmp-principal-id", "x-forwarded-for", "x-real-ip"])
def test_a_default_header_is_sent_where_the_clients_own_stays_here(name: str) -> None:
    assert sent([(name.encode(), b"mine")], route(default_headers={name: "default"})) == {name: "default"}


def test_a_default_header_gives_way_to_a_clients_that_is_sent() -> None:
    assert sent([(b"x-a", b"mine")], route(default_headers={"X-A": "default"})) == {"x-a": "mine"}


def test_a_header_that_must_stay_here_is_not_sent_by_default_either() -> None:
    compressed = route(default_headers={"accept-encoding": "gzip"})
    assert sent([(b"accept-encoding", b"br")], compressed, frozenset({b"accept-encoding"})) == {}


@pytest.mark.parametrize(
    "connection",
    [[b"x-hop"], [b"keep-alive, X-Hop"], [b"close,x-hop"], [b"close", b"x-hop"], [b"x-hop", b"x-other, close"]],
)
def test_headers_that_connection_names_stay_here(connection: list[bytes]) -> None:
    client = [(b"x-hop", b"1"), (b"accept", b"*/*"), *((b"connection", value) for value in connection)]
    assert sent(client, route()) == {"accept": "*/*"}


def test_what_connection_names_is_the_clients_and_not_ours() -> None:
    client = [(b"connection", b"x-a, authorization, x-b"), (b"x-a", b"mine"), (b"x-b", b"mine")]
    ours = route(default_headers={"x-a": "default"}, headers=(("Authorization", "Bearer k"),))
    assert sent(client, ours) == {"x-a": "default", "authorization": "Bearer k"}


@pytest.mark.parametrize("connection", ["keep-alive, X-Hop", "X-Hop"])
async def test_a_hop_by_hop_header_of_the_client_does_not_reach_the_engine(
    door: Door, engine: FakeEngine, connection: str
) -> None:
    await door.ask("GET", f"{PROVIDER_ROUTE}/v1/models", headers=[f"Connection: {connection}, close", "X-Hop: 1"])
    assert [name.lower() for name, _ in engine.requests[-1].headers] == ["host", "x-request-id"]
