"""Whole replies in the other format: messages, token counts, and what both formats say about usage and ends. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from nimhost.errors import NotSupported, UpstreamError
from nimhost.gateway.bodies import UNREADABLE
from nimhost.gateway.translate.fields import Json, as_dict, as_dicts, as_int, as_str, read_arguments, write_arguments

FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}


def read_reply(body: bytes) -> Json:
    """Raises UpstreamError for what is no JSON object."""
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except UNREADABLE as error:
        raise UpstreamError(f"The upstream's reply could not be read: {error}") from None


def completion_of(message: Json, created_s: int) -> Json:
    """An Anthropic message as an OpenAI chat completion. `created_s`: the time, which OpenAI's replies carry."""
    choice = {
        "index": 0,
        "message": _said(message),
        "logprobs": None,
        "finish_reason": finish_reason_of(message.get("stop_reason")),
    }
    return {
        "id": as_str(message.get("id")),
        "object": "chat.completion",
        "created": created_s,
        "model": as_str(message.get("model")),
        "choices": [choice],
        "usage": completion_usage_of(as_dict(message.get("usage"))),
    }


def _said(message: Json) -> Json:
    texts, thoughts, calls = [], [], []
    for block in as_dicts(message.get("content")):
        kind = block.get("type")
        if kind == "text":
            texts.append(as_str(block.get("text")))
        elif kind in ("thinking", "redacted_thinking"):
            thoughts.append(block)
        elif kind == "tool_use":
            function = {"name": as_str(block.get("name")), "arguments": write_arguments(as_dict(block.get("input")))}
            calls.append({"id": as_str(block.get("id")), "type": "function", "function": function})
    said: Json = {"role": "assistant", "content": "".join(texts) if texts or not calls else None, "refusal": None}
    if explained := as_dict(message.get("stop_details")).get("explanation"):
        said["refusal"] = explained
    if thoughts:
        said["reasoning_content"] = "".join(as_str(block.get("thinking")) for block in thoughts)
        said["thinking_blocks"] = thoughts
    if calls:
        said["tool_calls"] = calls
    return said


def message_of(completion: Json) -> Json:
    """An OpenAI chat completion as an Anthropic message."""
    choice = next(iter(as_dicts(completion.get("choices"))), {})
    said = as_dict(choice.get("message"))
    content: list[Json] = []
    if thoughts := said.get("reasoning_content") or said.get("reasoning"):
        content.append({"type": "thinking", "thinking": as_str(thoughts), "signature": ""})
    if text := f"{as_str(said.get('content'))}{as_str(said.get('refusal'))}":
        content.append({"type": "text", "text": text})
    calls = as_dicts(said.get("tool_calls"))
    content += [_use(call, number) for number, call in enumerate(calls)]
    return {
        "id": as_str(completion.get("id")),
        "type": "message",
        "role": "assistant",
        "model": as_str(completion.get("model")),
        "content": content,
        "usage": message_usage_of(as_dict(completion.get("usage"))),
        **stop_of(choice, called=bool(calls)),
    }


def _use(call: Json, number: int) -> Json:
    function = as_dict(call.get("function"))
    return {
        "type": "tool_use",
        "id": as_str(call.get("id")) or f"call_{number}",
        "name": as_str(function.get("name")),
        "input": read_arguments(as_str(function.get("arguments"))),
    }


def token_count_of(tokenized: Json) -> Json:
    """Of the reply of vLLM's `/tokenize`. Raises NotSupported if it is another one's."""
    count = tokenized.get("count")
    if not isinstance(count, int):
        raise NotSupported("This model's server cannot count the tokens of a conversation.")
    return {"input_tokens": count}


# --- ends


def finish_reason_of(stop_reason: object) -> str:
    return FINISH_REASONS.get(as_str(stop_reason), "stop")


def stop_of(choice: Json, *, called: bool) -> Json:
    """`stop_reason` and `stop_sequence`. `called`: there are tool calls; vLLM then still says "stop" if a tool was
    named in the request. Its `stop_reason` is the stop string that was met.
    """
    reason, met = STOP_REASONS.get(as_str(choice.get("finish_reason")), "end_turn"), choice.get("stop_reason")
    if reason == "end_turn" and called:
        reason = "tool_use"
    elif reason == "end_turn" and isinstance(met, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": met}
    return {"stop_reason": reason, "stop_sequence": None}


# --- usage: OpenAI counts what came from a cache or went into one among the prompt's tokens, Anthropic beside them


def completion_usage_of(usage: Json) -> Json:
    read, written = as_int(usage.get("cache_read_input_tokens")), as_int(usage.get("cache_creation_input_tokens"))
    prompt, completion = as_int(usage.get("input_tokens")) + read + written, as_int(usage.get("output_tokens"))
    found: Json = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
    }
    details = as_dict(usage.get("output_tokens_details"))
    if "thinking_tokens" in details:
        found["completion_tokens_details"] = {"reasoning_tokens": as_int(details.get("thinking_tokens"))}
    return found


def message_usage_of(usage: Json) -> Json:
    details = as_dict(usage.get("prompt_tokens_details"))
    read, written = as_int(details.get("cached_tokens")), as_int(details.get("cache_write_tokens"))
    found: Json = {
        "input_tokens": max(as_int(usage.get("prompt_tokens")) - read - written, 0),
        "output_tokens": as_int(usage.get("completion_tokens")),
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": written,
    }
    thought = as_dict(usage.get("completion_tokens_details"))
    if thought.get("reasoning_tokens") is not None:
        found["output_tokens_details"] = {"thinking_tokens": as_int(thought.get("reasoning_tokens"))}
    return found
