"""Whole replies and errors in the other format; the official clients' own models find nothing wrong with them."""

from __future__ import annotations

import json
from typing import Any

import anthropic.types
import pytest
from openai.types.chat import ChatCompletion

from nimhost.errors import NotSupported, UpstreamError
from nimhost.gateway.translate.errors import error_of_chat, error_of_messages
from nimhost.gateway.translate.replies import completion_of, message_of, read_reply, token_count_of

Json = dict[str, Any]
USAGE = {"input_tokens": 7, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 2, "output_tokens": 11}
CHAT_USAGE = {
    "prompt_tokens": 14,
    "completion_tokens": 11,
    "total_tokens": 25,
    "prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 2},
}


def message(content: list[Json], stop_reason: str = "end_turn", **more: Any) -> Json:
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": content,
            "stop_reason": stop_reason, "stop_sequence": None, "usage": USAGE} | more  # fmt: skip


def completion(said: Json, finish_reason: str = "stop", **more: Any) -> Json:
    choice = {"index": 0, "message": {"role": "assistant"} | said, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": "gpt", "choices": [choice | more],
            "usage": CHAT_USAGE}  # fmt: skip


TEXT = {"type": "text", "text": "Hi"}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}
CALL = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
EMPTY_CALL = {"id": "t2", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "s"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([TEXT], {"content": "Hi"}),
        ([], {"content": ""}),
        ([TEXT, {"type": "text", "text": "!"}], {"content": "Hi!"}),
        ([USE, USE | {"id": "t2", "input": {}}], {"content": None, "tool_calls": [CALL, EMPTY_CALL]}),
        ([TEXT, USE], {"content": "Hi", "tool_calls": [CALL]}),
        ([THOUGHT, TEXT], {"content": "Hi", "reasoning_content": "Hm.", "thinking_blocks": [THOUGHT]}),
        ([{"type": "server_tool_use", "id": "s"}, TEXT], {"content": "Hi"}),
    ],
)  # fmt: skip
def test_a_message_becomes_a_completion(content: list[Json], said: Json) -> None:
    found = completion_of(message(content), 1_700_000_000)
    assert found["choices"][0]["message"] == {"role": "assistant", "refusal": None} | said
    assert found["usage"] == CHAT_USAGE
    assert (found["id"], found["model"], found["created"]) == ("msg_1", "claude", 1_700_000_000)
    ChatCompletion.model_validate(found, strict=True)


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("pause_turn", "stop"),
        ("something_new", "stop"),
    ],
)
def test_why_a_message_ended(stop_reason: str, finish_reason: str) -> None:
    assert completion_of(message([TEXT], stop_reason), 1)["choices"][0]["finish_reason"] == finish_reason


def test_why_a_model_refused_is_told() -> None:
    details = {"type": "refusal", "category": "bio", "explanation": "Not that."}
    found = completion_of(message([], "refusal", stop_details=details), 1)
    assert found["choices"][0]["message"]["refusal"] == "Not that."


def test_thinking_tokens_are_counted() -> None:
    found = completion_of(message([TEXT], usage=USAGE | {"output_tokens_details": {"thinking_tokens": 3}}), 1)
    assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert message_of(completion({"content": ""}) | {"usage": found["usage"]})["usage"]["output_tokens_details"] == {
        "thinking_tokens": 3
    }


@pytest.mark.parametrize(
    ("said", "content"),
    [
        ({"content": "Hi"}, [TEXT]),
        ({"content": None}, []),
        ({"content": None, "refusal": "No."}, [{"type": "text", "text": "No."}]),
        ({"content": "Hi", "reasoning_content": "Hm."}, [THOUGHT | {"signature": ""}, TEXT]),
        ({"content": "Hi", "reasoning": "Hm."}, [THOUGHT | {"signature": ""}, TEXT]),
        ({"content": "Hi", "tool_calls": [CALL]}, [TEXT, USE]),
        (
            {"content": "", "tool_calls": [{"function": {"name": "weather", "arguments": '{"ci'}}]},
            [USE | {"id": "call_0", "input": {"INVALID_JSON": '{"ci'}}],
        ),
        ({"content": "Hi", "tool_calls": []}, [TEXT]),
    ],
)
def test_a_completion_becomes_a_message(said: Json, content: list[Json]) -> None:
    found = message_of(completion(said))
    assert found["content"] == content
    assert found["usage"] == USAGE
    assert (found["id"], found["model"], found["role"], found["type"]) == ("c1", "gpt", "assistant", "message")
    anthropic.types.Message.model_validate(found, strict=True)


@pytest.mark.parametrize(
    ("finish", "stop"),
    [
        ({"finish_reason": "stop"}, ("end_turn", None)),
        ({"finish_reason": "stop", "stop_reason": "END"}, ("stop_sequence", "END")),
        ({"finish_reason": "stop", "stop_reason": 151645}, ("end_turn", None)),
        ({"finish_reason": "length"}, ("max_tokens", None)),
        ({"finish_reason": "tool_calls"}, ("tool_use", None)),
        ({"finish_reason": "content_filter"}, ("refusal", None)),
        ({"finish_reason": None}, ("end_turn", None)),
        ({"finish_reason": "stop", "message": {"tool_calls": [CALL]}}, ("tool_use", None)),
        ({"finish_reason": "length", "message": {"tool_calls": [CALL]}}, ("max_tokens", None)),
    ],
)
def test_why_a_completion_ended(finish: Json, stop: tuple[str, str | None]) -> None:
    found = message_of(completion({"content": "Hi"}) | {"choices": [{"message": {"content": "Hi"}} | finish]})
    assert (found["stop_reason"], found["stop_sequence"]) == stop


@pytest.mark.parametrize("content", [[TEXT], [USE], [TEXT, USE]])
@pytest.mark.parametrize("stop_reason", ["end_turn", "max_tokens", "refusal"])
def test_there_and_back_a_message_means_the_same(content: list[Json], stop_reason: str) -> None:
    if stop_reason == "end_turn" and USE in content:
        stop_reason = "tool_use"
    sent = message(content, stop_reason)
    assert message_of(completion_of(sent, 1)) == sent


@pytest.mark.parametrize("odd", [{}, {"choices": "x", "usage": 3}, {"choices": [{"message": {"tool_calls": [1]}}]}])
def test_what_is_missing_in_a_reply_counts_as_absent(odd: Json) -> None:
    anthropic.types.Message.model_validate(message_of(odd), strict=True)
    ChatCompletion.model_validate(completion_of(odd | {"content": 3}, 1), strict=True)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"a": '])
def test_a_reply_that_is_no_json_object_is_the_upstreams_fault(body: bytes) -> None:
    with pytest.raises(UpstreamError, match="could not be read"):
        read_reply(body)


def test_token_counts() -> None:
    assert token_count_of({"count": 12, "tokens": []}) == {"input_tokens": 12}
    with pytest.raises(NotSupported):
        token_count_of({"tokens": []})  # llama.cpp


# --- errors

OPENAI_ERROR = {"error": {"message": "Too long.", "type": "BadRequestError", "param": None, "code": 400}}


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (400, OPENAI_ERROR, "invalid_request_error", "Too long."),
        (400, {"object": "error", "message": "Long.", "type": "x", "code": 400}, "invalid_request_error", "Long."),
        (422, {"detail": [{"loc": ["body"], "msg": "no"}]}, "invalid_request_error", '[{"loc":["body"],"msg":"no"}]'),
        (404, {"detail": "Not Found"}, "not_found_error", "Not Found"),
        (429, b"slow down", "rate_limit_error", "slow down"),
        (500, b"", "api_error", "The upstream answered with HTTP 500."),
        (503, {"error": "loading"}, "overloaded_error", "loading"),
    ],
)  # fmt: skip
def test_an_openai_servers_error_for_a_client_of_anthropics(status: int, body: Any, kind: str, says: str) -> None:
    found = error_of_messages(status, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert found == {"type": "error", "error": {"type": kind, "message": says}}


def test_anthropics_error_for_a_client_of_openais() -> None:
    sent = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}, "request_id": "r"}
    assert error_of_chat(529, json.dumps(sent).encode()) == {
        "error": {"message": "Overloaded", "type": "server_error", "param": None, "code": "overloaded_error"}
    }
