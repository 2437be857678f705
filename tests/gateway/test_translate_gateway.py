"""The official clients of both formats at the real gateway, each before a server that speaks only the other one."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest

from nimhost.config import Gateway as GatewaySettings
from nimhost.entities import ServedModel
from nimhost.gateway import keepalive
from nimhost.gateway.routes import Upstream
from nimhost.gateway.translate.pairs import DEFAULT_MAX_TOKENS
from nimhost.refs import Ref
from tests.fakes.anthropic import count_tokens, error, events, messages
from tests.fakes.engine import FakeEngine, Faults, Received, Reply
from tests.gateway.conftest import Door, G, engine_upstream, open_door
from tests.support import eventually

HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
PROPERTIES = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PROPERTIES}},
    {"type": "function", "function": {"name": "clock"}},
]
OPENAI_ROUTES = ["/v1", f"{G}/default/openai/-/v1", f"{G}/default/model/claude/-/v1"]
SSE = {"content-type": "text/event-stream; charset=utf-8"}


def claude_upstream(engine: FakeEngine, **changes: Any) -> Upstream:
    """Anthropic, as the manual has it set up."""
    fields: dict[str, Any] = {
        "provider": Ref("default", "anthropic"),
        "base_url": engine.url,
        "headers": (("X-Api-Key", "sk-ant"),),
        "served": (ServedModel("default/claude", "claude-x"),),
    }
    return Upstream(**fields | changes)


def route_claude(door: Door, engine: FakeEngine, **changes: Any) -> None:
    engine.scripted = {"/v1/messages": messages, "/v1/messages/count_tokens": count_tokens}
    formats = {Ref("default", "claude"): "ANTHROPIC_MESSAGES"}
    door.route(claude_upstream(engine, **changes), formats=formats)


# --- OpenAI's client, Anthropic's server


@pytest.fixture(params=OPENAI_ROUTES, ids=["short", "workspace", "model"])
async def chatter(door: Door, engine: FakeEngine, request: pytest.FixtureRequest) -> AsyncIterator[openai.AsyncOpenAI]:
    route_claude(door, engine)
    url = f"{door.url}{request.param}"
    async with openai.AsyncOpenAI(base_url=url, api_key="client-key", max_retries=0) as client:
        yield client


async def test_chat_with_claude(chatter: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await chatter.chat.completions.create(
        model="claude", messages=[{"role": "system", "content": "Be brief."}, *HELLO], temperature=1.5, stop=["END"]
    )
    assert answer.choices[0].message.content == 'You said: [{"type": "text", "text": "Hello!"}]'
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert answer.usage.prompt_tokens_details
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (14, 11, 25)
    assert answer.usage.prompt_tokens_details.cached_tokens == 5
    assert abs(answer.created - time.time()) < 60
    sent = engine.requests[-1]
    assert sent.target == "/v1/messages"
    assert sent.json() == {
        "model": "claude-x",
        "max_tokens": DEFAULT_MAX_TOKENS,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}],
        "temperature": 1,
        "stop_sequences": ["END"],
    }
    assert (sent.header("x-api-key"), sent.header("authorization")) == ("sk-ant", None)
    assert sent.header("anthropic-version") == "2023-06-01"


async def test_chat_with_claude_as_a_stream(chatter: openai.AsyncOpenAI) -> None:
    stream = await chatter.chat.completions.create(
        model="claude", messages=HELLO, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len(chunks) > 5
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == 'You said: [{"type": "text", "text": "Hello!"}]'
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage
    assert chunks[-1].usage.total_tokens == 25


@pytest.mark.parametrize("streamed", [False, True])
async def test_tools_of_claude(chatter: openai.AsyncOpenAI, engine: FakeEngine, streamed: bool) -> None:
    asked: dict[str, Any] = {"model": "claude", "tools": TOOLS, "extra_body": {"thinking": {"type": "adaptive"}}}
    if streamed:
        async with chatter.chat.completions.stream(messages=HELLO, **asked) as stream:
            first: Any = await stream.get_final_completion()
    else:
        first = await chatter.chat.completions.create(messages=HELLO, **asked)
    said = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert (said.content, said.reasoning_content) == ("I look it up.", "Let me see.")
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in said.tool_calls]
    assert calls == [("weather", {"city": "Paris"}), ("clock", {})]

    results: list[Any] = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in said.tool_calls]
    again = said.model_dump(exclude_none=True, exclude={"parsed": True, "tool_calls": {"__all__": {"function": {
        "parsed_arguments"}, "index": True}}})  # fmt: skip
    second = await chatter.chat.completions.create(messages=[*HELLO, again, *results], **asked)
    assert "sunny" in (second.choices[0].message.content or "")
    assert engine.requests[-1].json()["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": "c2lnbmVk"},
        {"type": "text", "text": "I look it up."},
        {"type": "tool_use", "id": "toolu_0", "name": "weather", "input": {"city": "Paris"}},
        {"type": "tool_use", "id": "toolu_1", "name": "clock", "input": {}},
    ]


async def test_images_for_claude(chatter: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    parts: Any = [
        {"type": "text", "text": "Which?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}},
    ]
    await chatter.chat.completions.create(model="claude", messages=[{"role": "user", "content": parts}])
    assert [block.get("source") for block in engine.requests[-1].json()["messages"][0]["content"]] == [
        None,
        {"type": "base64", "media_type": "image/png", "data": PNG},
        {"type": "url", "url": "https://x.org/a.jpg"},
    ]


async def test_what_claude_was_not_told_is_named(chatter: openai.AsyncOpenAI) -> None:
    raw = await chatter.chat.completions.with_raw_response.create(
        model="claude", messages=HELLO, seed=1, frequency_penalty=1
    )
    assert raw.headers["x-nimhost-ignored"] == "frequency_penalty, seed"
    assert raw.headers["request-id"] == "req_fake"


async def test_a_field_with_an_odd_name_is_named_in_one_line(door: Door, engine: FakeEngine) -> None:
    route_claude(door, engine)
    body = {"model": "claude", "messages": HELLO, "x\r\nSet-Cookie: é": 1}
    reply = await door.ask(
        "POST", "/v1/chat/completions", json.dumps(body).encode(), ["Content-Type: application/json"]
    )
    assert (reply.status, reply.headers["x-nimhost-ignored"]) == (200, "x??Set-Cookie: ?")


async def test_what_claude_cannot_do_is_refused_without_asking(chatter: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError, match="n: this model gives one answer"):
        await chatter.chat.completions.create(model="claude", messages=HELLO, n=2)
    assert not engine.requests


async def test_an_error_of_claude_keeps_its_status_and_words(chatter: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.scripted["/v1/messages"] = lambda _: error(529, "overloaded_error", "Overloaded")
    with pytest.raises(openai.InternalServerError, match="Overloaded") as caught:
        await chatter.chat.completions.create(model="claude", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (529, "overloaded_error")
    engine.scripted["/v1/messages"] = lambda _: error(429, "rate_limit_error", "Slow down")._replace(
        headers={"retry-after": "7"}
    )
    with pytest.raises(openai.RateLimitError, match="Slow down") as limited:
        await chatter.chat.completions.create(model="claude", messages=HELLO)
    assert limited.value.response.headers["retry-after"] == "7"


async def test_a_key_that_claude_refuses_is_our_error(chatter: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.scripted["/v1/messages"] = lambda _: error(401, "authentication_error", "invalid x-api-key")
    with pytest.raises(openai.APIStatusError, match="refused the key") as caught:
        await chatter.chat.completions.create(model="claude", messages=HELLO)
    assert caught.value.status_code == 502


@pytest.mark.fault(27)
async def test_a_stream_of_claude_that_breaks_off(chatter: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.faults = Faults(drop_after_chunks=5)
    stream = await chatter.chat.completions.create(model="claude", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="broke off"):
        async for _ in stream:
            pass


async def test_a_stream_in_which_claude_fails(chatter: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    failing = events(
        {
            "content": [{"type": "text", "text": "Hm"}],
            "usage": {"output_tokens": 1},
            "stop_reason": "x",
            "stop_sequence": None,
        }
    )
    failing[4:] = [b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"Oh no"}}\n\n']
    engine.scripted["/v1/messages"] = lambda _: Reply(200, stream_of(failing), SSE)
    stream = await chatter.chat.completions.create(model="claude", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="Oh no"):
        async for _ in stream:
            pass


async def stream_of(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@pytest.mark.fault(25)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_ends_its_request_at_claude(door: Door, engine: FakeEngine, streamed: bool) -> None:
    route_claude(door, engine)
    engine.faults = Faults(chunk_delay_s=5) if streamed else Faults(hang=True)
    body = {"model": "claude", "messages": HELLO, "stream": streamed}
    _, writer = await door.open("POST", "/v1/chat/completions", json.dumps(body).encode())
    await eventually(lambda: bool(engine.requests))
    writer.close()
    await eventually(lambda: engine.cancelled == 1, timeout_s=5)


async def test_extras_of_the_provider_are_in_its_own_format(door: Door, engine: FakeEngine) -> None:
    route_claude(
        door,
        engine,
        default_body={"max_tokens": 77, "top_p": 0.5},
        required_body={"metadata": {"user_id": "us"}},
        default_headers={"anthropic-version": "2026-10-21"},
    )
    reply = await door.ask("POST", "/v1/chat/completions", json.dumps({"model": "claude", "messages": HELLO}).encode())
    assert reply.status == 200
    sent = engine.requests[-1]
    assert (sent.json()["max_tokens"], sent.json()["top_p"]) == (77, 0.5)
    assert sent.json()["metadata"] == {"user_id": "us"}
    assert [value for name, value in sent.headers if name == "anthropic-version"] == ["2026-10-21"]


@pytest.mark.parametrize("suffix", ["", "/v1", "/v1/"])
async def test_a_provider_may_be_named_with_its_version(door: Door, engine: FakeEngine, suffix: str) -> None:
    route_claude(door, engine, base_url=engine.url + suffix)
    for path in ("/v1/chat/completions", f"{G}/default/openai/-/chat/completions"):
        reply = await door.ask("POST", path, json.dumps({"model": "claude", "messages": HELLO}).encode())
        assert (reply.status, engine.requests[-1].target) == (200, "/v1/messages")


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Reply(200, b"<html>"), "could not be read"),
        (Reply(200, b"\x1f\x8b", {"content-encoding": "gzip"}), "compressed"),
    ],
)
async def test_a_reply_that_cannot_be_understood_is_a_bad_gateway(
    door: Door, engine: FakeEngine, reply: Reply, says: str
) -> None:
    route_claude(door, engine)
    engine.scripted["/v1/messages"] = lambda _: reply
    found = await door.ask("POST", "/v1/chat/completions", json.dumps({"model": "claude", "messages": HELLO}).encode())
    assert found.status == 502
    assert says in found.json()["error"]["message"]


# --- Anthropic's client, OpenAI's server


def plain_upstream(engine: FakeEngine, **changes: Any) -> Upstream:
    """An engine that knows nothing of Anthropic."""
    return engine_upstream(engine, **{"policy": "generic"} | changes)


@pytest.fixture(params=["", f"{G}/default/openai/-", f"{G}/default/model/qwen/-"], ids=["short", "workspace", "model"])
async def claude(
    door: Door, engine: FakeEngine, request: pytest.FixtureRequest
) -> AsyncIterator[anthropic.AsyncAnthropic]:
    door.route(plain_upstream(engine))
    url = f"{door.url}{request.param}"
    async with anthropic.AsyncAnthropic(base_url=url, api_key="client-key", max_retries=0) as client:
        yield client


async def test_messages_of_an_openai_engine(claude: anthropic.AsyncAnthropic, engine: FakeEngine) -> None:
    answer = await claude.messages.create(model="qwen", max_tokens=50, system="Be brief.", messages=HELLO)
    assert [block.model_dump(exclude_none=True) for block in answer.content] == [
        {"type": "text", "text": "Hello from a as qwen-served: Hello!"}
    ]
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == ("end_turn", 1, 6)
    sent = engine.requests[-1]
    assert sent.target == "/v1/chat/completions"
    assert sent.json() == {
        "model": "qwen-served",
        "max_tokens": 50,
        "messages": [{"role": "system", "content": "Be brief."}, *HELLO],
    }
    assert (sent.header("x-api-key"), sent.header("authorization"), sent.header("anthropic-version")) == (None,) * 3


async def test_messages_of_an_openai_engine_as_a_stream(claude: anthropic.AsyncAnthropic) -> None:
    async with claude.messages.stream(model="qwen", max_tokens=50, messages=HELLO) as stream:
        pieces = [text async for text in stream.text_stream]
        answer = await stream.get_final_message()
    assert len(pieces) > 3
    assert "".join(pieces).strip() == "Hello from a as qwen-served: Hello!"
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == ("end_turn", 1, 6)


def calling(request: Received) -> Reply:
    """An engine that calls the tools it is given until it sees a result."""
    body = request.json()
    if any(message["role"] == "tool" for message in body["messages"]):
        return FakeEngine.chat(ENGINE[0], request)
    names = [tool["function"]["name"] for tool in body["tools"]]
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": '{"city": "Paris"}'}}
             for i, name in enumerate(names)]  # fmt: skip
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}}
    frame = {"id": "c", "model": "m", "created": 1}
    if not body.get("stream"):
        message = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": calls}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        return Reply(200, frame | {"object": "chat.completion", "choices": [choice], "usage": usage})
    deltas: list[Any] = [{"role": "assistant", "reasoning_content": "Hm."}]
    for index, call in enumerate(calls):
        deltas.append({"tool_calls": [{"index": index, **call, "function": {"name": names[index], "arguments": ""}}]})
        deltas += [
            {"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in ('{"city":', ' "Paris"}')
        ]
    chunks = [frame | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append(frame | {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    chunks.append(frame | {"choices": [], "usage": usage})
    sent = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]
    return Reply(200, stream_of(sent), SSE)


ENGINE: list[FakeEngine] = []


@pytest.mark.parametrize("streamed", [False, True])
async def test_tools_of_an_openai_engine(claude: anthropic.AsyncAnthropic, engine: FakeEngine, streamed: bool) -> None:
    ENGINE[:] = [engine]
    engine.scripted["/v1/chat/completions"] = calling
    tools: Any = [{"name": name, "input_schema": PROPERTIES} for name in ("weather", "clock")]
    asked: dict[str, Any] = {"model": "qwen", "max_tokens": 50, "tools": tools}
    if streamed:
        async with claude.messages.stream(messages=HELLO, **asked) as stream:
            first: Any = await stream.get_final_message()
    else:
        first = await claude.messages.create(messages=HELLO, **asked)
    assert first.stop_reason == "tool_use"
    assert (first.content[0].type, first.content[0].thinking) == ("thinking", "Hm.")
    uses = first.content[1:]
    assert [(use.id, use.name, use.input) for use in uses] == [
        ("c0", "weather", {"city": "Paris"}),
        ("c1", "clock", {"city": "Paris"}),
    ]
    assert (first.usage.input_tokens, first.usage.cache_read_input_tokens, first.usage.output_tokens) == (3, 6, 4)
    results = [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"} for use in uses]
    turns: Any = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = await claude.messages.create(messages=turns, **asked)
    assert second.stop_reason == "end_turn"
    assert [message["role"] for message in engine.requests[-1].json()["messages"]] == [
        "user",
        "assistant",
        "tool",
        "tool",
    ]


async def test_images_for_an_openai_engine(claude: anthropic.AsyncAnthropic, engine: FakeEngine) -> None:
    image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    content: Any = [image, {"type": "text", "text": "What?"}]
    await claude.messages.create(model="qwen", max_tokens=5, messages=[{"role": "user", "content": content}])
    assert engine.requests[-1].json()["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "text", "text": "What?"},
    ]


async def test_tokens_are_counted_by_the_engines_tokenizer(
    claude: anthropic.AsyncAnthropic, engine: FakeEngine
) -> None:
    found = await claude.messages.count_tokens(model="qwen", messages=[{"role": "user", "content": "one two three"}])
    assert found.input_tokens == 3
    assert engine.requests[-1].target == "/tokenize"


@pytest.mark.parametrize("reply", [Reply(404, {"detail": "Not Found"}), Reply(200, {"tokens": []})])
async def test_an_engine_that_counts_no_tokens_is_said_to_be_one(
    claude: anthropic.AsyncAnthropic, engine: FakeEngine, reply: Reply
) -> None:
    engine.scripted["/tokenize"] = lambda _: reply
    with pytest.raises(anthropic.APIStatusError, match="cannot count") as caught:
        await claude.messages.count_tokens(model="qwen", messages=HELLO)
    assert caught.value.status_code == 501
    assert caught.value.response.headers["x-should-retry"] == "false"


async def test_an_engines_error_keeps_its_status_and_words(
    claude: anthropic.AsyncAnthropic, engine: FakeEngine
) -> None:
    engine.faults = Faults(
        status=400, body='{"error": {"message": "Too long.", "type": "BadRequestError", "code": 400}}'
    )
    with pytest.raises(anthropic.BadRequestError, match="Too long") as caught:
        await claude.messages.create(model="qwen", max_tokens=5, messages=HELLO)
    assert caught.value.body == {"type": "error", "error": {"type": "invalid_request_error", "message": "Too long."}}


@pytest.mark.fault(27)
async def test_an_engine_that_dies_mid_stream_is_a_typed_error_event(
    claude: anthropic.AsyncAnthropic, engine: FakeEngine
) -> None:
    engine.faults = Faults(drop_after_chunks=3)
    with pytest.raises(anthropic.APIStatusError, match="broke off") as caught:
        async with claude.messages.stream(model="qwen", max_tokens=5, messages=HELLO) as stream:
            await stream.get_final_message()
    assert caught.value.body["error"]["type"] == "api_error"  # type: ignore[index]


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("last", "says"), [(b"", "ended its stream in the middle"), (b"data: {nonsense\n\n", "could not be read")]
)
async def test_a_stream_that_ends_in_nonsense_or_too_early_is_a_typed_error_event(
    claude: anthropic.AsyncAnthropic, engine: FakeEngine, last: bytes, says: str
) -> None:
    first = b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "Hi"}}]}\n\n'
    engine.scripted["/v1/chat/completions"] = lambda _: Reply(200, stream_of([first, last] if last else [first]), SSE)
    texts = []
    with pytest.raises(anthropic.APIStatusError, match=says):  # noqa: PT012 what came before the error counts
        async with claude.messages.stream(model="qwen", max_tokens=5, messages=HELLO) as stream:
            async for text in stream.text_stream:
                texts.append(text)  # noqa: PERF401
    assert texts == ["Hi"]


@pytest.mark.fault(27)
async def test_a_stream_of_claude_that_ends_too_early(chatter: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    whole = events({"content": [{"type": "text", "text": "Hm"}], "usage": {"output_tokens": 1}, "stop_reason": "x",
                    "stop_sequence": None})  # fmt: skip
    engine.scripted["/v1/messages"] = lambda _: Reply(200, stream_of(whole[:4]), SSE)
    stream = await chatter.chat.completions.create(model="claude", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="ended its stream in the middle"):
        async for _ in stream:
            pass


# --- whose words our own errors are in


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", f"{G}/default/openai/-/v1/messages"])
async def test_our_own_errors_are_anthropics_where_its_clients_ask(door: Door, engine: FakeEngine, path: str) -> None:
    door.route(plain_upstream(engine))
    reply = await door.ask("POST", path, b'{"model": "qwne", "messages": []}')
    assert reply.status == 404
    found = reply.json()
    assert (found["type"], found["error"]["type"]) == ("error", "not_found_error")
    assert "Did you mean default/qwen" in found["error"]["message"]
    assert ("detail" in found) == path.startswith("/apis/")


async def test_a_model_that_is_not_ready_is_overloaded_for_anthropics_clients(door: Door, engine: FakeEngine) -> None:
    door.route(plain_upstream(engine, ready=False, message="loading weights"))
    async with asyncio.timeout(5), anthropic.AsyncAnthropic(base_url=door.url, api_key="x") as client:
        with pytest.raises(anthropic.APIStatusError, match="loading weights") as caught:
            await client.messages.create(model="qwen", max_tokens=5, messages=HELLO)
    assert caught.value.status_code == 503


@pytest.mark.fault(27)
async def test_a_native_stream_of_messages_that_breaks_off_ends_with_a_typed_error_event(
    door: Door, engine: FakeEngine
) -> None:
    engine.scripted["/v1/messages"] = messages
    engine.faults = Faults(drop_after_chunks=4)
    door.route(engine_upstream(engine))
    async with anthropic.AsyncAnthropic(base_url=door.url, api_key="x", max_retries=0) as client:
        with pytest.raises(anthropic.APIStatusError, match="broke off"):
            async with client.messages.stream(model="qwen", max_tokens=5, messages=HELLO) as stream:
                await stream.get_final_message()


@pytest.mark.fault(27)
async def test_a_stream_of_responses_that_breaks_off_ends_with_its_typed_error_event(
    door: Door, engine: FakeEngine
) -> None:
    engine.scripted["/v1/responses"] = lambda _: Reply(200, stream_of([b"event: a\ndata: {}\n\n"] * 9), SSE)
    engine.faults = Faults(drop_after_chunks=2)
    door.route(engine_upstream(engine))
    reply = await door.ask("POST", "/v1/responses", b'{"model": "qwen", "stream": true}')
    last = reply.chunks[-1].decode().split("\n")
    assert last[0] == "event: error"
    assert json.loads(last[1].removeprefix("data: "))["code"] == "upstream_error"


# --- what is not translated

STRANGE = b'{ "model":"%b" ,"messages": [ ], "x":1e1,"y":"\\u00e9"}'


@pytest.mark.parametrize(
    ("upstream", "formats", "path"),
    [
        ({"policy": "vllm"}, {}, "/v1/messages"),
        ({"policy": "vllm"}, {}, "/v1/messages/count_tokens"),
        ({"policy": "vllm"}, {Ref("default", "qwen"): "ANTHROPIC_MESSAGES"}, "/v1/chat/completions"),
        ({"policy": "external"}, {Ref("default", "qwen"): "ANTHROPIC_MESSAGES"}, "/v1/messages"),
        ({"policy": "external"}, {Ref("default", "qwen"): "ANTHROPIC_MESSAGES"}, "/v1/messages/count_tokens"),
        ({"policy": "external"}, {Ref("default", "qwen"): "ANTHROPIC_MESSAGES"}, "/v1/embeddings"),
        ({"policy": "external"}, {}, "/v1/chat/completions"),
        ({"policy": "nim"}, {Ref("default", "qwen"): "OPENAI_CHAT"}, "/v1/chat/completions"),
    ],
)
async def test_who_speaks_the_clients_format_gets_it_byte_for_byte(
    door: Door, engine: FakeEngine, upstream: dict[str, Any], formats: dict[Ref, Any], path: str
) -> None:
    said = b"event: x\r\ndata:  [ 1 ]\r\n\r\n: odd\n\n"
    engine.scripted[path] = lambda _: Reply(200, said, {"content-type": "text/event-stream", "x-odd": "Yes"})
    served = (ServedModel("default/qwen", "qwen"),)
    door.route(engine_upstream(engine, served=served, **upstream), formats=formats)
    body = STRANGE % b"qwen"
    # the name by which the model is served is the one in the body: nothing is left to rewrite
    reply = await door.ask("POST", path, body, ["Content-Type: application/json", "anthropic-beta: b"])
    sent = engine.requests[-1]
    assert (sent.target, sent.body, sent.header("anthropic-beta")) == (path, body, "b")
    assert (reply.status, reply.body, reply.headers["x-odd"]) == (200, said, "Yes")


async def test_the_provider_route_never_translates(door: Door, engine: FakeEngine) -> None:
    route_claude(door, engine)
    engine.scripted["/v1/chat/completions"] = lambda _: Reply(418, b"odd")
    path = f"{G}/default/provider/anthropic/-/v1/chat/completions"
    reply = await door.ask("POST", path, STRANGE % b"claude")
    assert (reply.status, reply.body, engine.requests[-1].body) == (418, b"odd", STRANGE % b"claude")


async def test_who_answers_in_whose_stead_is_asked_in_its_own_format(door: Door, engine: FakeEngine) -> None:
    """The engine here is down: the provider elsewhere, which speaks another format, answers the same request."""
    engine.scripted = {"/v1/messages": messages}
    gone = engine_upstream(engine, base_url="http://127.0.0.1:9")
    away = claude_upstream(engine, served=(ServedModel("default/qwen", "claude-x"),))
    door.route(gone, away, formats={Ref("default", "qwen"): "ANTHROPIC_MESSAGES"})
    reply = await door.ask("POST", "/v1/chat/completions", json.dumps({"model": "qwen", "messages": HELLO}).encode())
    assert reply.status == 200
    assert reply.json()["object"] == "chat.completion"
    assert engine.requests[-1].target == "/v1/messages"


@pytest.mark.parametrize("fault", [Faults(first_byte_delay_s=0.3), Faults(first_byte_delay_s=0.3, status=529)])
async def test_comments_keep_a_translated_stream_alive_before_it_begins(
    engine: FakeEngine, fault: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepalive, "PAUSE_S", 0.05)
    engine.faults = fault
    async with open_door(GatewaySettings(keepalive_comments=True)) as door:
        route_claude(door, engine)
        body = {"model": "claude", "messages": HELLO, "stream": True}
        reply = await door.ask("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert reply.status == 200
    assert reply.chunks[0] == keepalive.COMMENT
    if fault.status:
        assert b"fault 529" in reply.chunks[-1]
    else:
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert b"chat.completion.chunk" in reply.body
