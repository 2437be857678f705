"""Streams in the other format: hand-written exchanges, cut at every byte, and put together again."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import anthropic.types
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from pydantic import TypeAdapter

from nimhost.errors import UpstreamError
from nimhost.gateway.translate.replies import completion_of, message_of
from nimhost.gateway.translate.sse import Events
from nimhost.gateway.translate.stream_to_chat import ChatStream
from nimhost.gateway.translate.stream_to_messages import MessageStream
from nimhost.gateway.translate.streams import Stream
from tests.fakes.anthropic import events

Json = dict[str, Any]
EVENT: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)


def chat_stream() -> ChatStream:
    return ChatStream(1_700_000_000, with_usage=True)


def run(stream: Stream, *pieces: bytes) -> bytes:
    return b"".join([stream.feed(piece) for piece in pieces] + [stream.close()])


def message(*content: Json, stop_reason: str = "end_turn", stop_sequence: str | None = None) -> Json:
    usage = {"input_tokens": 7, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 2, "output_tokens": 11}
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": list(content),
            "stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": usage}  # fmt: skip


TEXT = {"type": "text", "text": "Grüße aus 北京 🦜, schön."}
THOUGHT = {"type": "thinking", "thinking": "Let me think about it.", "signature": "c2lnbmVk"}
USES = [
    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln", "days": [1, 2]}},
    {"type": "tool_use", "id": "t2", "name": "clock", "input": {}},
]
MESSAGES = {
    "text": message(TEXT),
    "nothing": message(),
    "cut short": message(TEXT, stop_reason="max_tokens"),
    "thought": message(THOUGHT, TEXT),
    "tools": message(TEXT, *USES, stop_reason="tool_use"),
    "everything": message(THOUGHT, TEXT, *USES, stop_reason="tool_use"),
}


def sse(*chunks: Json) -> list[bytes]:
    return [b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n" for chunk in chunks]


def chunk(delta: Json, finish_reason: str | None = None, **more: Any) -> Json:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason} | more
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "gpt", "choices": [choice]}


def tool(index: int, arguments: str, **more: Any) -> Json:
    return {"tool_calls": [{"index": index, **more, "function": {"arguments": arguments} | more.get("function", {})}]}


USAGE = {
    "prompt_tokens": 14,
    "completion_tokens": 11,
    "total_tokens": 25,
    "prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 2},
}
LAST = chunk({}) | {"choices": [], "usage": USAGE}
DONE = b"data: [DONE]\n\n"
CHATS: dict[str, tuple[list[Json], Json]] = {
    "text": (
        [chunk({"role": "assistant"}), chunk({"content": "Grü"}), chunk({"content": "ß"}), chunk({}, "stop")],
        {"content": "Grüß"},
    ),
    "reasoning in either field, then text": (
        [chunk({"reasoning_content": "Hm"}), chunk({"reasoning": "."}), chunk({"content": "Yes"}), chunk({}, "length")],
        {"reasoning_content": "Hm.", "content": "Yes"},
    ),
    "two tools, one after the other": (
        [
            chunk({"role": "assistant", "content": "I look."}),
            chunk(tool(0, "", id="t1", type="function", function={"name": "weather"})),
            chunk(tool(0, '{"city": ')),
            chunk(tool(0, '"Köln"}')),
            chunk(tool(1, "{}", id="t2", type="function", function={"name": "clock"})),
            chunk({}, "tool_calls"),
        ],
        {
            "content": "I look.",
            "tool_calls": [
                {"id": "t1", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}},
                {"id": "t2", "function": {"name": "clock", "arguments": "{}"}},
            ],
        },
    ),
    "all in one piece": (
        [chunk({"role": "assistant", "content": "Hi"}, "stop", stop_reason="END")],
        {"content": "Hi"},
    ),
    "tools without numbers": (
        [
            chunk({"tool_calls": [{"id": "t1", "function": {"name": "a", "arguments": "{"}}]}),
            chunk({"tool_calls": [{"function": {"arguments": "}"}}]}),
            chunk({"tool_calls": [{"id": "t2", "function": {"name": "b", "arguments": "{}"}}]}, "stop"),
        ],
        {
            "content": None,
            "tool_calls": [
                {"id": "t1", "function": {"name": "a", "arguments": "{}"}},
                {"id": "t2", "function": {"name": "b", "arguments": "{}"}},
            ],
        },
    ),
    "tools that all have the same number": (
        [
            chunk(tool(0, "{", id="t1", function={"name": "a"})),
            chunk(tool(0, "}", id="t1")),
            chunk(tool(0, "{}", id="t2", function={"name": "a"}), "tool_calls"),
        ],
        {
            "content": None,
            "tool_calls": [
                {"id": "t1", "function": {"name": "a", "arguments": "{}"}},
                {"id": "t2", "function": {"name": "a", "arguments": "{}"}},
            ],
        },
    ),
}  # fmt: skip


# --- what comes out, as the clients read it


def folded_chat(out: bytes) -> Json:
    """The chunks as OpenAI's client puts them together."""
    assert out.endswith(DONE)
    state = ChatCompletionStreamState()
    for data in Events().feed(out)[:-1]:
        ChatCompletionChunk.model_validate_json(data, strict=True)
        state.handle_chunk(ChatCompletionChunk.model_validate_json(data))
    return state.current_completion_snapshot.model_dump(exclude_none=True)


def folded_message(out: bytes) -> Json:
    """The message that the events tell; none may be out of order."""
    found: Json = {}
    content: list[Json] = []
    kinds, pieces = [], []
    for part in out.decode().split("\n\n")[:-1]:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        EVENT.validate_python(event, strict=True)
        assert name == f"event: {event['type']}"
        kinds.append(event["type"].removeprefix("content_block_"))
        if event["type"] == "message_start":
            found = event["message"]
        elif event["type"] == "message_delta":
            found |= event["delta"] | {"usage": event["usage"]}
        elif kinds[-1] == "start":
            assert event["index"] == len(content)
            content.append(event["content_block"])
            pieces.append("")
        elif kinds[-1] == "delta":
            assert event["index"] == len(content) - 1
            pieces[-1] += next(value for key, value in event["delta"].items() if key != "type")
    order = " ".join(kinds)
    assert re.fullmatch(r"message_start( start( delta)* stop)* message_delta message_stop", order), order
    return found | {"content": [_filled(block, text) for block, text in zip(content, pieces, strict=True)]}


def _filled(block: Json, text: str) -> Json:
    if block["type"] == "tool_use":
        return block | {"input": json.loads(text or "{}")}
    return block | {block["type"]: text}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_stream_of_messages_says_what_the_whole_message_says(name: str) -> None:
    found = folded_chat(run(chat_stream(), *events(MESSAGES[name])))
    whole = completion_of(MESSAGES[name], 1_700_000_000)
    said, wanted = found["choices"][0]["message"], whole["choices"][0]["message"]
    assert (said.get("content") or None) == (wanted["content"] or None)
    assert said.get("reasoning_content") == wanted.get("reasoning_content")
    assert [strip(b, "index") for b in said.get("thinking_blocks", [])] == wanted.get("thinking_blocks", [])
    assert calls_of(said) == calls_of(wanted)
    assert found["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert found["usage"] == whole["usage"]
    assert (found["id"], found["model"], found["created"]) == ("msg_1", "claude", 1_700_000_000)


def strip(block: Json, name: str) -> Json:
    return {key: value for key, value in block.items() if key != name}


def calls_of(said: Json) -> list[tuple[str, str, Any]]:
    calls = [(call["id"], call["function"]) for call in said.get("tool_calls") or []]
    return [(call_id, function["name"], json.loads(function["arguments"])) for call_id, function in calls]


@pytest.mark.parametrize("name", CHATS)
def test_a_stream_of_chunks_says_what_the_whole_completion_says(name: str) -> None:
    chunks, said = CHATS[name]
    found = folded_message(run(MessageStream(), *sse(*chunks, LAST), DONE))
    finish = next(c["choices"][0] for c in chunks if c["choices"][0]["finish_reason"])
    whole = message_of({"id": "c1", "model": "gpt", "choices": [{"message": said} | finish], "usage": USAGE})
    assert found == whole


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("name", MESSAGES)
def test_a_stream_of_messages_may_be_cut_at_every_byte(name: str, ends: bytes) -> None:
    sent = b": hello\n\n" + b"".join(events(MESSAGES[name]))
    sent = sent.replace(b"\n", ends)
    whole = run(chat_stream(), sent)
    assert run(chat_stream(), *(sent[at : at + 1] for at in range(len(sent)))) == whole
    for at in range(len(sent)):
        assert run(chat_stream(), sent[:at], sent[at:]) == whole


@pytest.mark.parametrize("name", CHATS)
def test_a_stream_of_chunks_may_be_cut_at_every_byte(name: str) -> None:
    sent = b"".join([*sse(*CHATS[name][0], LAST), DONE])
    whole = run(MessageStream(), sent)
    assert run(MessageStream(), *(sent[at : at + 1] for at in range(len(sent)))) == whole
    for at in range(len(sent)):
        assert run(MessageStream(), sent[:at], sent[at:]) == whole


def test_every_event_goes_out_as_soon_as_it_is_whole() -> None:
    stream = MessageStream()
    first, *rest = sse(chunk({"content": "Hi"}), chunk({"content": "!"}))
    assert b'"text":"Hi"' in stream.feed(first)
    assert b'"text":"!"' in stream.feed(rest[0])


def test_there_and_back_a_stream_says_the_same() -> None:
    for name in ("text", "tools", "cut short"):
        chunks = run(chat_stream(), *events(MESSAGES[name]))
        found = folded_message(run(MessageStream(), chunks))
        assert found == MESSAGES[name]


# --- what goes wrong


def test_usage_is_only_told_to_who_asked_for_it() -> None:
    out = run(ChatStream(1, with_usage=False), *events(MESSAGES["text"]))
    assert b"usage" not in out
    assert out.endswith(DONE)


def test_pings_keep_the_line_alive() -> None:
    assert chat_stream().feed(b'event: ping\ndata: {"type": "ping"}\n\n') == b": ping\n\n"


def test_an_upstreams_error_event_is_the_typed_one_of_the_other_format() -> None:
    sent = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Busy"}}\n\n'
    stream = chat_stream()
    out = run(stream, events(MESSAGES["text"])[0], sent)
    assert json.loads(Events().feed(out)[-1]) == {
        "error": {"message": "Busy", "type": "server_error", "param": None, "code": "overloaded_error"}
    }
    other = MessageStream()
    out = run(other, *sse(chunk({"content": "Hi"}), {"error": {"message": "Busy", "type": "x", "code": 429}}))
    assert out.endswith(
        b'event: error\ndata: {"type":"error","error":{"type":"rate_limit_error","message":"Busy"}}\n\n'
    )
    assert stream.failed is other.failed is None


@pytest.mark.parametrize("bad", [b"data: {\n\n", b"data: []\n\n", b"data: \xff\n\n"])
@pytest.mark.parametrize("make", [chat_stream, MessageStream])
def test_an_event_that_cannot_be_read_ends_the_stream_after_all_that_could(make: Any, bad: bytes) -> None:
    good = {chat_stream: events(MESSAGES["text"])[0], MessageStream: sse(chunk({"content": "Hi"}))[0]}[make]
    stream = make()
    out = stream.feed(good + bad + good)
    assert out == make().feed(good)
    assert isinstance(stream.failed, UpstreamError)
    assert stream.feed(good) == stream.close() == b""


@pytest.mark.parametrize("name", ["text", "everything"])
def test_a_stream_that_ends_in_the_middle_has_failed(name: str) -> None:
    parts = events(MESSAGES[name])
    for count in range(len(parts) - 2):
        stream = chat_stream()
        out = run(stream, *parts[:count])
        assert isinstance(stream.failed, UpstreamError), count
        assert DONE not in out


def test_a_stream_of_chunks_that_ends_in_the_middle_has_failed() -> None:
    parts = sse(*CHATS["text"][0])
    for count in range(len(parts) - 1):
        stream = MessageStream()
        out = run(stream, *parts[:count])
        assert isinstance(stream.failed, UpstreamError), count
        assert b"message_stop" not in out


def test_the_last_words_may_be_missing_once_the_end_is_known() -> None:
    assert run(chat_stream(), *events(MESSAGES["text"])[:-1]).endswith(DONE)
    out = run(MessageStream(), *sse(*CHATS["text"][0]))
    assert folded_message(out)["stop_reason"] == "end_turn"


def test_a_tool_that_the_server_uses_itself_is_no_call_of_the_clients() -> None:
    """As Anthropic's web search, switched on by what a provider puts into every request."""
    used = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "Köln"}}
    stream = chat_stream()
    found = folded_chat(run(stream, *events(message(used, TEXT))))
    assert found["choices"][0]["message"].get("tool_calls") is None
    assert found["choices"][0]["message"]["content"] == TEXT["text"]


@pytest.mark.parametrize("back", [tool(0, "}"), tool(0, "}", id="a", function={"name": "a"})])
def test_going_back_to_an_earlier_tool_call_cannot_be_told(back: Json) -> None:
    stream = MessageStream()
    tools = [tool(0, "{", id="a", function={"name": "a"}), tool(1, "{", id="b", function={"name": "b"}), back]
    stream.feed(b"".join(sse(*(chunk(delta) for delta in tools))))
    assert isinstance(stream.failed, UpstreamError)


def test_an_event_without_an_end_does_not_fill_the_memory() -> None:
    stream = chat_stream()
    for _ in range(20):
        stream.feed(b"x" * 1_000_000)
    assert isinstance(stream.failed, UpstreamError)


@pytest.mark.parametrize("make", [chat_stream, MessageStream])
def test_nonsense_does_not_trip_the_machine(make: Any) -> None:
    rng = random.Random(3)
    keys = ["type", "index", "delta", "content_block", "message", "usage", "choices", "tool_calls", "function", "text",
            "error", "finish_reason", "content", "arguments", "partial_json", "name", "id", "thinking"]  # fmt: skip
    values = ["content_block_start", "content_block_delta", "content_block_stop", "message_start", "message_delta",
              "text_delta", "input_json_delta", "tool_use", "thinking", "text", "stop", 0, None, [], {}]  # fmt: skip

    def nonsense(depth: int = 0) -> Any:
        kind = rng.random()
        if depth > 4 or (depth and kind < 0.5):
            return rng.choice(values)
        if depth and kind < 0.6:
            return [nonsense(depth + 1) for _ in range(2)]
        return {rng.choice(keys): nonsense(depth + 1) for _ in range(4)}

    for _ in range(500):
        run(make(), *sse(*(nonsense() for _ in range(4))))


@pytest.mark.parametrize("cut", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        (b"data: a\n\ndata:b\n\n", [b"a", b"b"]),
        (b"\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b": x\nevent: e\ndata: a\ndata: b\nid: 1\n\n", [b"a\nb"]),
        (b"event: e\n\n: only a comment\n\n", []),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\rx", [b"a", b"b"]),
        (b"data:  a\n\ndata: not whole", [b" a"]),
    ],
)
def test_events_are_found_however_they_are_written(cut: int, sent: bytes, wanted: list[bytes]) -> None:
    found = Events()
    assert [data for at in range(0, len(sent), cut) for data in found.feed(sent[at : at + cut])] == wanted
