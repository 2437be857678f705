"""The messages API of Anthropic, as strict as the real one where a translation could go wrong.

    engine.scripted["/v1/messages"] = messages

It says what the last user said; it thinks first when thinking is switched on, and calls every tool it is given until it
sees a result. Usage: 7 tokens in, 5 of them from a cache, 2 into it; 11 out.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from tests.fakes.engine import Received, Reply

Json = dict[str, Any]
FIELDS = {
    "model", "messages", "max_tokens", "system", "stop_sequences", "stream", "temperature", "top_p", "top_k", "tools",
    "tool_choice", "metadata", "thinking", "output_config",
}  # fmt: skip
USAGE_IN = {"input_tokens": 7, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 2}
STREAM = {"content-type": "text/event-stream; charset=utf-8"}


def messages(request: Received) -> Reply:
    body = request.json()
    if problem := _problem(request, body):
        return error(400, "invalid_request_error", problem)
    content, stop_reason = _answer(body)
    if body.get("stream"):
        return Reply(200, _stream(body, content, stop_reason), STREAM | {"request-id": "req_fake"})
    return Reply(200, _message(body, content, stop_reason), {"request-id": "req_fake"})


def count_tokens(request: Received) -> Reply:
    return Reply(200, {"input_tokens": 42})


def error(status: int, kind: str, message: str) -> Reply:
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_fake"}
    return Reply(status, body, {"request-id": "req_fake"})


def _problem(request: Received, body: Json) -> str | None:
    if request.header("anthropic-version") is None:
        return "anthropic-version: header is required"
    if unknown := sorted(body.keys() - FIELDS):
        return f"{unknown[0]}: Extra inputs are not permitted"
    if not isinstance(body.get("max_tokens"), int):
        return "max_tokens: Field required"
    if not 0 <= body.get("temperature", 1) <= 1:
        return "temperature: range: 0..1"
    if body["messages"][0]["role"] != "user":
        return "messages: first message must use the user role"
    called: set[str] = set()
    for number, message in enumerate(body["messages"]):
        blocks = _blocks(message)
        if message["role"] not in ("user", "assistant"):
            return f"messages.{number}.role: unexpected"
        if not blocks or any(b["type"] == "text" and not b["text"] for b in blocks):
            return "messages: text content blocks must be non-empty"
        results = {b["tool_use_id"] for b in blocks if b["type"] == "tool_result"}
        if results != called:
            return f"messages.{number}: tool_use ids without tool_result blocks, or the other way round"
        called = {b["id"] for b in blocks if b["type"] == "tool_use"}
    return None


def _blocks(message: Json) -> list[Json]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _answer(body: Json) -> tuple[list[Json], str]:
    content: list[Json] = []
    if body.get("thinking", {}).get("type") in ("enabled", "adaptive"):
        content.append({"type": "thinking", "thinking": "Let me see.", "signature": "c2lnbmVk"})
    last = _blocks(body["messages"][-1])
    answered = any(block["type"] == "tool_result" for block in last)
    if body.get("tools") and not answered and body.get("tool_choice", {}).get("type") != "none":
        content.append({"type": "text", "text": "I look it up."})
        for number, tool in enumerate(body["tools"]):
            given = {"city": "Paris"} if tool["input_schema"].get("properties") else {}
            content.append({"type": "tool_use", "id": f"toolu_{number}", "name": tool["name"], "input": given})
        return content, "tool_use"
    content.append({"type": "text", "text": f"You said: {json.dumps(last)}"})
    return content, "max_tokens" if body["max_tokens"] < 10 else "end_turn"


def _message(body: Json, content: list[Json], stop_reason: str | None) -> Json:
    usage = USAGE_IN | {"output_tokens": 11 if stop_reason else 1}
    return {"id": "msg_fake", "type": "message", "role": "assistant", "model": body["model"], "content": content,
            "stop_reason": stop_reason, "stop_sequence": None, "usage": usage}  # fmt: skip


async def _stream(body: Json, content: list[Json], stop_reason: str) -> AsyncIterator[bytes]:
    for event in events(_message(body, content, stop_reason)):
        yield event


def events(message: Json) -> list[bytes]:
    """A message as the real thing streams it."""
    start = {**message, "content": [], "stop_reason": None, "usage": message["usage"] | {"output_tokens": 1}}
    found = [_event("message_start", message=start), _event("ping")]
    for index, block in enumerate(message["content"]):
        found += _block_events(index, block)
    delta = {"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]}
    usage = {"output_tokens": message["usage"]["output_tokens"]}
    return [*found, _event("message_delta", delta=delta, usage=usage), _event("message_stop")]


def _block_events(index: int, block: Json) -> list[bytes]:
    if block["type"] == "text":
        start, deltas = block | {"text": ""}, [{"type": "text_delta", "text": t} for t in _cut(block["text"])]
    elif block["type"] == "thinking":
        start = block | {"thinking": "", "signature": ""}
        deltas = [{"type": "thinking_delta", "thinking": t} for t in _cut(block["thinking"])]
        deltas.append({"type": "signature_delta", "signature": block["signature"]})
    elif block["type"] in ("tool_use", "server_tool_use"):
        text = json.dumps(block["input"]) if block["input"] else ""
        start = block | {"input": {}}
        deltas = [{"type": "input_json_delta", "partial_json": t} for t in ("", *_cut(text))]
    else:
        start, deltas = block, []
    return [
        _event("content_block_start", index=index, content_block=start),
        *(_event("content_block_delta", index=index, delta=delta) for delta in deltas),
        _event("content_block_stop", index=index),
    ]


def _cut(text: str) -> list[str]:
    return [text[at : at + 7] for at in range(0, len(text), 7)]


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()
