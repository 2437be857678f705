"""Requests through the gateway, as bytes: what arrives at the engine, and what comes back."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest

from nimhost.entities import ServedModel
from nimhost.gateway.proxy import REFUSAL_LENGTH
from nimhost.gateway.routes import build_table
from nimhost.refs import Ref
from tests.fakes.engine import FakeEngine, Faults
from tests.gateway.conftest import Door, G, Reply, engine_upstream, open_door
from tests.support import eventually

PROVIDER = f"{G}/default/provider/p/-"
OPENAI = f"{G}/default/openai/-/v1/chat/completions"
MODEL = f"{G}/default/model/qwen/-/v1/chat/completions"
SHORT = "/v1/chat/completions"
CHAT = b'{"model": "%s",\t"messages":[{"role":"user","content":"h\\u00ef \xc3\xa9"}], "x": 1.50}'
JSON = ["Content-Type: application/json"]


@pytest.fixture(autouse=True)
def routed(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine))


async def direct(engine: FakeEngine, method: str, path: str, body: bytes, headers: list[str]) -> Reply:
    """The same request without the gateway."""
    door = Door(None, engine.port)  # type: ignore[arg-type]
    return await door.ask(method, path, body, headers)


# --- bodies


async def test_provider_route_leaves_every_byte_of_the_body(door: Door, engine: FakeEngine) -> None:
    for body in (CHAT % b"qwen-served", b'{"model": ', b"[]", b"\x00\xff\xfe", b" "):
        await door.ask("POST", f"{PROVIDER}/v1/chat/completions", body, JSON)
        assert engine.requests[-1].body == body


@pytest.mark.parametrize(
    ("path", "model"),
    [(OPENAI, b"qwen"), (OPENAI, b"default/qwen"), (SHORT, b"qwen"), (SHORT, b"default/qwen"), (MODEL, b"whatever")],
)
async def test_model_is_replaced_and_every_other_value_keeps_its_bytes(
    door: Door, engine: FakeEngine, path: str, model: bytes
) -> None:
    reply = await door.ask("POST", path, CHAT % model, JSON)
    assert reply.status == 200
    assert reply.json()["choices"][0]["message"]["content"].startswith("Hello from a as qwen-served:")
    sent = b'{"model":"qwen-served","messages":[{"role":"user","content":"h\\u00ef \xc3\xa9"}],"x":1.50}'
    assert engine.requests[-1].body == sent


async def test_body_is_not_touched_when_the_name_is_right_already(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine, served=(ServedModel("default/qwen-served", "qwen-served"),)))
    body = CHAT % b"qwen-served"
    await door.ask("POST", OPENAI, body, JSON)
    assert engine.requests[-1].body == body


async def test_model_route_adds_a_name_that_is_missing(door: Door, engine: FakeEngine) -> None:
    await door.ask("POST", f"{G}/default/model/default/qwen/-/v1/classify", b'{"input":"x"}', JSON)
    assert engine.requests[-1].json() == {"input": "x", "model": "qwen-served"}


async def test_extras_are_merged_default_client_required(door: Door, engine: FakeEngine) -> None:
    default, required = {"a": 1, "b": 1, "o": {"x": 1}}, {"c": 3, "model": "qwen-served"}
    door.route(engine_upstream(engine, default_body=default, required_body=required))
    for path, model in ((f"{PROVIDER}/v1/chat/completions", b"other"), (OPENAI, b"qwen")):
        await door.ask("POST", path, b'{"model":"%s","b":2,"c":2,"o":{"y":1}}' % model, JSON)
        assert engine.requests[-1].json() == {"model": "qwen-served", "a": 1, "b": 2, "c": 3, "o": {"y": 1}}
    await door.ask("POST", f"{PROVIDER}/v1/classify", b"not json", ["Content-Type: text/plain"])
    assert engine.requests[-1].body == b"not json"
    await door.ask("POST", f"{PROVIDER}/v1/classify", b"[1]", JSON)
    assert engine.requests[-1].body == b"[1]"


async def test_upload_is_streamed_with_its_length(door: Door, engine: FakeEngine) -> None:
    body = bytes(range(256)) * 12_000
    kind = ["Content-Type: multipart/form-data; boundary=x"]
    reply = await door.ask("POST", f"{PROVIDER}/v1/audio/transcriptions", body, kind)
    assert reply.json()["sha256"] == hashlib.sha256(body).hexdigest()
    assert engine.requests[-1].header("content-length") == str(len(body))
    assert engine.requests[-1].header("content-type") == "multipart/form-data; boundary=x"


async def test_upload_in_chunks_arrives_in_chunks(door: Door, engine: FakeEngine) -> None:
    path = f"{PROVIDER}/v1/audio/transcriptions"
    reader, writer = await door.open("POST", path, b"3\r\nabc\r\n", ["Transfer-Encoding: chunked"])
    await asyncio.sleep(0.05)
    writer.write(b"2\r\nde\r\n0\r\n\r\n")
    reply = Reply(await reader.read())
    writer.close()
    assert reply.json()["size_bytes"] == 5
    assert engine.requests[-1].header("transfer-encoding") == "chunked"


async def test_large_json_body_passes_on_every_route(door: Door, engine: FakeEngine) -> None:
    body = json.dumps({"model": "qwen", "messages": [{"role": "user", "content": "x" * 3_000_000}]}).encode()
    for path in (OPENAI, MODEL, SHORT):
        assert (await door.ask("POST", path, body, JSON)).status == 200
        assert len(engine.requests[-1].body) > 3_000_000


@pytest.mark.fault(40)
async def test_body_over_the_limit_is_413(engine: FakeEngine) -> None:
    async with open_door(body_limit_bytes=1_000_000) as door:
        door.route(engine_upstream(engine))
        for path in (OPENAI, f"{PROVIDER}/v1/chat/completions"):
            announced = await door.ask("POST", path, b"{}", ["Content-Length: 99999999"])
            assert (announced.status, announced.headers["x-should-retry"]) == (413, "false")
            chunks = (b"80000\r\n" + b"x" * 0x80000 + b"\r\n") * 3 + b"0\r\n\r\n"
            reader, writer = await door.open(
                "POST", path, chunks, ["Connection: keep-alive", "Transfer-Encoding: chunked"]
            )
            assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
            writer.close()
    assert not [request for request in engine.requests if len(request.body) > 1_000_000]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "Invalid request body"),
        (b'{"model": ', "Invalid request body"),
        (b"[]", "Could not extract model"),
        (b'{"messages":[]}', "Could not extract model from openai request: 'model'"),
        (b'{"model":"","messages":[]}', "Could not extract model from openai request: 'model' is empty"),
        (b'{"model": 5}', "Expected `str`, got `int`"),
        (b'{"model": null}', "Could not extract model"),
        (b"\xff\xfe", "Invalid request body"),
    ],
)
@pytest.mark.parametrize("path", [OPENAI, SHORT])
async def test_body_that_names_no_model_is_400(
    door: Door, engine: FakeEngine, path: str, body: bytes, words: str
) -> None:
    reply = await door.ask("POST", path, body, JSON)
    assert (reply.status, reply.headers["x-nimhost-error"]) == (400, "BadRequest")
    assert words in reply.json()["error"]["message"]
    assert not engine.requests


# --- headers


async def test_only_what_is_meant_for_the_engine_travels(door: Door, engine: FakeEngine) -> None:
    kept = [
        "Accept: text/x",
        "Accept-Encoding: br",
        "User-Agent: me/1",
        "X-Stainless-Lang: python",
        "traceparent: 00-1",
    ]
    dropped = ["Authorization: Bearer mine", "Cookie: a=b", "X-Api-Key: mine", "X-NMP-Principal-Id: me", "TE: trailers",
               "X-Forwarded-For: 1.2.3.4", "Keep-Alive: 5", "Upgrade: h2c", "Expect: 100-continue",
               "Origin: https://chat.lan", "Referer: https://chat.lan/a", "Sec-Fetch-Site: same-site"]  # fmt: skip
    await door.ask("POST", f"{PROVIDER}/v1/chat/completions", CHAT % b"qwen-served", kept + dropped + JSON)
    got = {name.lower(): value for name, value in engine.requests[-1].headers}
    own = {got.pop("x-request-id"), got.pop("host"), got.pop("content-length")}
    assert f"127.0.0.1:{engine.port}" in own
    assert got == {"accept": "text/x", "accept-encoding": "br", "user-agent": "me/1", "x-stainless-lang": "python",
                   "traceparent": "00-1", "content-type": "application/json"}  # fmt: skip


async def test_nothing_is_added_to_a_bare_request(door: Door, engine: FakeEngine) -> None:
    await door.ask("GET", f"{PROVIDER}/v1/models")
    assert [name.lower() for name, _ in engine.requests[-1].headers] == ["host", "x-request-id"]


async def test_headers_of_the_provider_default_client_required_key(door: Door, engine: FakeEngine) -> None:
    door.route(
        engine_upstream(
            engine,
            headers=(("Authorization", "Bearer theirs"),),
            default_headers={"X-A": "default", "X-B": "default"},
            required_headers={"X-C": "required", "authorization": "never"},
        )
    )
    mine = ["x-b: client", "x-c: client", "Authorization: Bearer mine"]
    await door.ask("GET", f"{PROVIDER}/v1/models", headers=mine)
    got = sorted((n, v) for n, v in engine.requests[-1].headers if n.startswith("x-") and n != "x-request-id")
    assert got == [("x-a", "default"), ("x-b", "client"), ("x-c", "required")]
    assert [v for n, v in engine.requests[-1].headers if n.lower() == "authorization"] == ["Bearer theirs"]


async def test_request_id_goes_to_the_engine_and_back(door: Door, engine: FakeEngine) -> None:
    reply = await door.ask("GET", f"{PROVIDER}/v1/models", headers=["X-Request-Id: mine-1"])
    assert (reply.headers["x-request-id"], engine.requests[-1].header("x-request-id")) == ("mine-1", "mine-1")
    made = await door.ask("GET", f"{PROVIDER}/v1/models")
    assert made.headers["x-request-id"] == engine.requests[-1].header("x-request-id") != "mine-1"
    error = await door.ask("GET", f"{G}/default/provider/nope/-/x", headers=["X-Request-Id: mine-2"])
    assert error.headers["x-request-id"] == "mine-2"


async def test_query_passes_raw(door: Door, engine: FakeEngine) -> None:
    await door.ask("GET", f"{PROVIDER}/v1%2Fmodels?a=1&a=%20x&b=+&%2e%2e=/..")
    assert engine.requests[-1].target == "/v1/models?a=1&a=%20x&b=+&%2e%2e=/.."


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
async def test_every_method_passes(door: Door, engine: FakeEngine, method: str) -> None:
    door.route(engine_upstream(engine, policy="generic"))
    reply = await door.ask(method, f"{PROVIDER}/v1/infer", b"{}" if method in ("POST", "PUT", "PATCH") else b"")
    assert engine.requests[-1].method == method
    assert reply.status == (200 if method in ("POST", "PUT") else 405)


async def test_other_methods_are_405(door: Door, engine: FakeEngine) -> None:
    reply = await door.ask("OPTIONS", f"{PROVIDER}/v1/models")
    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD, POST, PUT, PATCH, DELETE")
    assert not engine.requests


# --- replies


@pytest.mark.parametrize("faults", [Faults(), Faults(gzip=True), Faults(event_lines=True), Faults(chunks=300),
                                    Faults(gzip=True, event_lines=True, chunk_delay_s=0.002)])  # fmt: skip
@pytest.mark.parametrize("stream", [b"true", b"false"])
async def test_reply_is_the_engines_byte_for_byte(
    door: Door, engine: FakeEngine, faults: Faults, stream: bytes
) -> None:
    engine.faults = faults
    body = b'{"model":"qwen-served","stream":%s,"stream_options":{"include_usage":true}}' % stream
    headers = [*JSON, "Accept-Encoding: gzip"]
    expected = await direct(engine, "POST", "/v1/chat/completions", body, headers)
    reply = await door.ask("POST", f"{PROVIDER}/v1/chat/completions", body, headers)
    assert reply.whole
    assert reply.body == expected.body
    for name in ("content-type", "content-encoding", "content-length", "transfer-encoding", "cache-control", "server"):
        assert reply.headers.get(name) == expected.headers.get(name)
    assert [name for name, _ in reply.header_list].count("date") == 1


async def test_first_event_does_not_wait_for_the_second(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(hang_after_chunks=1)
    reader, writer = await door.open("POST", OPENAI, b'{"model":"qwen","stream":true}', JSON)
    head = await asyncio.wait_for(reader.readuntil(b'"role":"assistant"'), 2)
    assert b"text/event-stream" in head
    writer.close()


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503, 401, 403])
async def test_status_body_and_headers_of_an_engines_error_pass_unchanged(
    door: Door, engine: FakeEngine, status: int
) -> None:
    headers = {"retry-after": "7", "content-type": "text/x"}
    engine.faults = Faults(status=status, body='{"error": "as it is"}', headers=headers)
    for path in (OPENAI, SHORT):
        reply = await door.ask("POST", path, b'{"model":"qwen"}', JSON)
        assert (reply.status, reply.body) == (status, b'{"error": "as it is"}')
        assert (reply.headers["retry-after"], reply.headers["content-type"]) == ("7", "text/x")
        assert "x-nimhost-error" not in reply.headers


async def test_unknown_model_at_the_engine_passes_as_its_404(door: Door) -> None:
    reply = await door.chat(b'{"model":"nope"}')
    assert reply.status == 404
    assert reply.json()["error"]["message"] == "The model `nope` does not exist."


@pytest.mark.parametrize("status", [401, 403])
async def test_provider_that_refuses_our_key_is_502_without_the_key(
    door: Door, engine: FakeEngine, status: int
) -> None:
    engine.faults = Faults(status=status, body="bad key: sk-canary!")
    key = (("Authorization", "Bearer sk-canary"),)
    door.route(engine_upstream(engine, policy="external", headers=key))
    reply = await door.chat(b'{"model":"x"}')
    assert (reply.status, reply.headers["x-should-retry"]) == (502, "false")
    assert reply.headers["x-nimhost-error"] == "ProviderRefused"
    assert (
        reply.json()["detail"] == f"Provider default/p refused the key that nimhost sent (HTTP {status}): bad key: ***!"
    )
    assert b"canary" not in reply.raw


async def test_a_key_is_not_shown_in_part_where_a_refusal_is_cut(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine, policy="external", headers=(("Authorization", "Bearer sk-canary"),)))
    for before in range(REFUSAL_LENGTH - 10, REFUSAL_LENGTH + 1):
        engine.faults = Faults(status=401, body="x" * before + "sk-canary" * 2)
        reply = await door.chat(b'{"model":"x"}')
        assert reply.json()["detail"].partition("): ")[2] == ("x" * before + "******")[:REFUSAL_LENGTH]


async def test_redirect_is_the_clients_business(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(status=307, headers={"location": "http://elsewhere/"})
    reply = await door.chat(b'{"model":"x"}')
    assert (reply.status, reply.headers["location"]) == (307, "http://elsewhere/")


# --- what the gateway answers itself


async def test_errors_have_the_envelope_of_their_route(door: Door) -> None:
    apis = await door.ask("POST", OPENAI, b'{"model":"qwne"}', JSON)
    assert apis.status == 404
    assert apis.json()["detail"] == "Model entity not found for default/qwne"
    assert "default/qwen" in apis.json()["error"]["message"]
    short = await door.ask("POST", SHORT, b'{"model":"qwne"}', JSON)
    assert short.json() == {"error": apis.json()["error"]}
    for reply in (apis, short):
        assert (reply.headers["x-nimhost-error"], reply.headers["x-should-retry"]) == ("NotFound", "false")


async def test_vendor_id_is_422_on_the_openai_route_and_served_on_the_short_one(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine, served=(ServedModel("default/meta-qwen", "meta/qwen"),)))
    engine.served = ("meta/qwen",)
    refused = await door.ask("POST", OPENAI, b'{"model":"meta/qwen"}', JSON)
    assert refused.status == 422
    assert "default/meta-qwen" in refused.json()["error"]["message"]
    assert (await door.ask("POST", SHORT, b'{"model":"meta/qwen"}', JSON)).status == 200
    assert (await door.ask("POST", OPENAI, b'{"model":"meta-qwen"}', JSON)).status == 200


async def test_deployment_that_is_not_ready_is_503_with_its_message(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine, ready=False, message="Pulling the image: 41 %"))
    for path, body in ((OPENAI, b'{"model":"qwen"}'), (MODEL, b"{}"), (SHORT, b'{"model":"qwen"}'),
                       (f"{PROVIDER}/v1/models", b"{}")):  # fmt: skip
        reply = await door.ask("POST", path, body, JSON)
        assert reply.status == 503
        assert "Pulling the image: 41 %" in reply.json()["error"]["message"]
        assert int(reply.headers["retry-after"]) > 0
        assert reply.headers["x-should-retry"] == "false"
    assert not engine.requests


async def test_lists_of_models(door: Door, engine: FakeEngine) -> None:
    other = engine_upstream(engine, "q", provider=Ref("w2", "q"), served=(ServedModel("w2/mistral", "qwen-served"),))
    door.route(engine_upstream(engine), other)
    card = {"id": "default/qwen", "object": "model", "created": 0, "owned_by": "default"}
    openai = f"{G}/default/openai/-/v1"
    for path in (f"{openai}/models", f"{openai}%2Fmodels"):
        assert (await door.ask("GET", path)).json() == {"object": "list", "data": [card]}
    short = (await door.ask("GET", "/v1/models")).json()["data"]
    assert [model["id"] for model in short] == ["default/qwen", "w2/mistral"]
    for path in (f"{openai}/models/qwen", f"{openai}/models/default%2Fqwen", f"{openai}%2Fmodels%2Fqwen",
                 "/v1/models/qwen", "/v1/models/default/qwen"):  # fmt: skip
        assert (await door.ask("GET", path)).json() == card
    assert (await door.ask("GET", f"{openai}/models/nope")).status == 404
    assert (await door.ask("GET", f"{openai}/models/a/b")).status == 422
    assert not engine.requests


async def test_ready_says_where_and_404_otherwise(door: Door, engine: FakeEngine) -> None:
    reply = await door.ask("GET", f"{G}/default/provider/p/ready")
    assert reply.json() == {"ready": True, "provider": "default/p", "host_url": engine.url}
    unknown = await door.ask("GET", f"{G}/default/provider/nope/ready")
    assert (unknown.status, unknown.json()["detail"]) == (404, "Model provider not found for default/nope")
    door.route(engine_upstream(engine, ready=False, message="starts"))
    waits = await door.ask("GET", f"{G}/default/provider/p/ready")
    assert door.gateway.traffic.log.count == 0, "whoever waits for it asks again and again"
    assert waits.status == 404
    assert waits.json()["detail"].startswith("Provider not ready")
    door.route(engine_upstream(engine, proven=False, message="it refused the key (HTTP 401)"))
    refused = await door.ask("GET", f"{G}/default/provider/p/ready")
    assert (refused.status, refused.json()["detail"]) == (404, "Provider not ready: it refused the key (HTTP 401)")


async def test_workspace_that_does_not_exist_is_404(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine), workspaces=["default", "system"])
    nows = f"{G}/nows/openai/-/v1"
    assert (await door.ask("POST", f"{nows}/chat/completions", b'{"model":"xx"}')).status == 404
    assert (await door.ask("GET", f"{nows}/models")).json()["detail"] == "Workspace not found: nows"


async def test_request_keeps_the_table_it_began_with(door: Door, engine: FakeEngine) -> None:
    engine.faults = Faults(first_byte_delay_s=0.1)
    asking = asyncio.create_task(door.ask("POST", OPENAI, b'{"model":"qwen"}', JSON))
    await eventually(lambda: engine.requests)
    door.gateway.table = build_table([])
    assert (await asking).status == 200
    assert (await door.ask("POST", OPENAI, b'{"model":"qwen"}', JSON)).status == 404


async def test_connection_to_the_engine_is_used_again(door: Door, engine: FakeEngine) -> None:
    for _ in range(5):
        assert (await door.ask("POST", OPENAI, b'{"model":"qwen","stream":true}', JSON)).whole
    assert engine.connections_made == 1
