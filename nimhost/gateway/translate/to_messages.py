"""An OpenAI chat request as an Anthropic messages request. Pure.

Carried over: the conversation with its tools, images and files; limits, stops, sampling, streaming; structured output
and reasoning effort; and what Anthropic's API has and OpenAI's clients send as extras (`thinking`, `top_k`,
`cache_control`, `thinking_blocks`). Refused: what would make the reply another one than asked for (`n`, `logprobs`,
audio, free-form JSON). Left out and named: the rest, which only tunes or labels (`seed`, penalties, `store`, …).
"""

from __future__ import annotations

from nimhost.gateway.translate.fields import Asked, Json, as_list, as_object, as_text, given, read_arguments, refusal

TO_MODEL_OF_OPENAI = "Use a model of an OpenAI-compatible provider for that."
_CARRIED = frozenset([
    "model", "messages", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options", "temperature",
    "top_p", "top_k", "tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort", "thinking",
    "user", "safety_identifier", "n", "logprobs", "modalities",
])  # fmt: skip
_AS_THEY_ARE = ("model", "stream", "top_p", "top_k", "thinking")
_REFUSED = ("logprobs", "top_logprobs", "functions", "function_call", "audio", "web_search_options")
_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "max"}


def to_messages(chat: Json) -> Asked:
    """Without `max_tokens` if the client gave none: Anthropic needs one, see `translate.ask`. Raises BadRequest."""
    chat = given(chat)
    _refuse(chat)
    system, turns = _conversation(as_list(chat.get("messages"), "messages"))
    request = {name: chat[name] for name in _AS_THEY_ARE if name in chat} | {"messages": turns}
    if system:
        request["system"] = _joined(system)
    request |= _limits(chat) | _tools(chat) | _output(chat)
    return Asked(request, tuple(sorted(chat.keys() - _CARRIED)))


def _refuse(chat: Json) -> None:
    if chat.get("n", 1) != 1:
        raise refusal("n", "this model gives one answer to a request.", "Send the request several times.")
    for name in _REFUSED:
        if chat.get(name):
            instead = "Use tools and tool_choice." if name.startswith("function") else TO_MODEL_OF_OPENAI
            raise refusal(name, "Anthropic's API, which this model speaks, has no such thing.", instead)
    if any(kind != "text" for kind in as_list(chat.get("modalities", []), "modalities")):
        raise refusal("modalities", "this model answers with text.", TO_MODEL_OF_OPENAI)


def _limits(chat: Json) -> Json:
    found: Json = {}
    limit = chat.get("max_completion_tokens", chat.get("max_tokens"))
    if limit is not None:
        found["max_tokens"] = limit
    if stop := chat.get("stop"):
        found["stop_sequences"] = [stop] if isinstance(stop, str) else as_list(stop, "stop")
    if "temperature" in chat:
        heat = chat["temperature"]
        found["temperature"] = min(heat, 1) if isinstance(heat, int | float) else heat  # OpenAI's go up to 2
    if user := chat.get("safety_identifier") or chat.get("user"):
        found["metadata"] = {"user_id": user}
    return found


# --- the conversation


def _conversation(messages: list[object]) -> tuple[list[Json], list[Json]]:
    """System prompts, which come first wherever they stood, and the turns: the messages of one side are one turn."""
    system: list[Json] = []
    turns: list[Json] = []
    for number, item in enumerate(messages):
        where = f"messages[{number}]"
        message = as_object(item, where)
        side, blocks = _turn(message, where)
        if side == "system":
            system += blocks
        elif side == "user" and not blocks:
            raise refusal(f"{where}.content", "is empty, which Anthropic's API, which this model speaks, refuses.")
        elif turns and turns[-1]["role"] == side:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": side, "content": blocks})
    if not turns:
        raise refusal("messages", "there is nothing to answer: a user's message is needed.")
    return system, turns


def _turn(message: Json, where: str) -> tuple[str, list[Json]]:
    role = message.get("role")
    blocks = _content(message.get("content"), f"{where}.content")
    if role in ("system", "developer"):
        return "system", blocks
    if role == "user":
        return "user", blocks
    if role == "assistant":
        return "assistant", [*_thoughts(message, where), *blocks, *_refused(message), *_calls(message, where)]
    if role == "tool":
        return "user", [_result(message, blocks, where)]
    raise refusal(f"{where}.role", f"'{role}' is not one of system, developer, user, assistant, tool.")


def _content(content: object, where: str) -> list[Json]:
    if content is None:
        return []
    if isinstance(content, str):
        return _text(content)
    parts = (as_object(part, f"{where}[{number}]") for number, part in enumerate(as_list(content, where)))
    return [block for number, part in enumerate(parts) for block in _part(part, f"{where}[{number}]")]


def _text(text: str) -> list[Json]:
    return [{"type": "text", "text": text}] if text else []  # Anthropic refuses empty ones


def _part(part: Json, where: str) -> list[Json]:
    kind = part.get("type")
    if kind in ("text", "refusal"):
        blocks = _text(as_text(part.get(kind), f"{where}.{kind}"))
    elif kind == "image_url":
        image = part.get("image_url")
        url = image if isinstance(image, str) else as_object(image, f"{where}.image_url").get("url")
        blocks = [{"type": "image", "source": _source(as_text(url, f"{where}.image_url.url"), where)}]
    elif kind == "file":
        blocks = [_document(as_object(part.get("file"), f"{where}.file"), f"{where}.file")]
    else:
        raise refusal(where, f"Anthropic's API, which this model speaks, takes no '{kind}'.", TO_MODEL_OF_OPENAI)
    if "cache_control" in part:
        for block in blocks:
            block["cache_control"] = part["cache_control"]
    return blocks


def _source(url: str, where: str) -> Json:
    if url.startswith(("http://", "https://")):
        return {"type": "url", "url": url}
    kind, comma, content = url.removeprefix("data:").partition(";base64,")
    if not url.startswith("data:") or not comma:
        raise refusal(where, "is neither an http(s) URL nor a data: URL with base64.")
    return {"type": "base64", "media_type": kind, "data": content}


def _document(file: Json, where: str) -> Json:
    if "file_data" not in file:
        raise refusal(where, "a file's id means nothing to another provider.", "Send the file itself as file_data.")
    document: Json = {"type": "document", "source": _source(as_text(file["file_data"], f"{where}.file_data"), where)}
    if isinstance(file.get("filename"), str):
        document["title"] = file["filename"]
    return document


def _thoughts(message: Json, where: str) -> list[Json]:
    """Thoughts of an earlier reply, which only count with their signature."""
    thoughts = as_list(message.get("thinking_blocks") or [], f"{where}.thinking_blocks")
    blocks = [as_object(block, f"{where}.thinking_blocks") for block in thoughts]
    return [{name: value for name, value in block.items() if name != "index"} for block in blocks]


def _refused(message: Json) -> list[Json]:
    said = message.get("refusal")
    return _text(said) if isinstance(said, str) else []


def _calls(message: Json, where: str) -> list[Json]:
    if message.get("function_call"):
        raise refusal(f"{where}.function_call", "is OpenAI's old form.", "Use tool_calls.")
    calls = as_list(message.get("tool_calls") or [], f"{where}.tool_calls")
    return [_call(as_object(c, f"{where}.tool_calls"), f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)]


def _call(call: Json, where: str) -> Json:
    function = as_object(call.get("function"), f"{where}.function")
    return {
        "type": "tool_use",
        "id": as_text(call.get("id"), f"{where}.id"),
        "name": as_text(function.get("name"), f"{where}.function.name"),
        "input": read_arguments(as_text(function.get("arguments", ""), f"{where}.function.arguments")),
    }


def _result(message: Json, blocks: list[Json], where: str) -> Json:
    result: Json = {"type": "tool_result", "tool_use_id": as_text(message.get("tool_call_id"), f"{where}.tool_call_id")}
    if blocks:
        result["content"] = blocks
    return result


def _joined(blocks: list[Json]) -> str | list[Json]:
    """As one text, which every server understands, unless something in it is marked for caching."""
    if any(block["type"] != "text" for block in blocks):
        raise refusal("messages", "a system prompt can only have text.")
    return blocks if any("cache_control" in block for block in blocks) else "\n".join(b["text"] for b in blocks)


# --- tools, and what the answer is to look like


def _tools(chat: Json) -> Json:
    tools = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(as_list(chat.get("tools", []), "tools"))]
    if not tools:
        return {}
    choice, allowed = _choice(chat.get("tool_choice", "auto"))
    if chat.get("parallel_tool_calls") is False and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    found: Json = {"tools": [tool for tool in tools if allowed is None or tool["name"] in allowed]}
    if choice != {"type": "auto"}:
        found["tool_choice"] = choice
    return found


def _tool(item: object, where: str) -> Json:
    tool = as_object(item, where)
    if tool.get("type") != "function":
        raise refusal(f"{where}.type", f"Anthropic's API has no '{tool.get('type')}' tools.", "Use a function.")
    function = given(as_object(tool.get("function"), f"{where}.function"))
    found: Json = {"name": as_text(function.get("name"), f"{where}.function.name")}
    found |= {name: function[name] for name in ("description", "strict") if function.get(name)}
    found["input_schema"] = function.get("parameters") or {"type": "object", "properties": {}}
    if "cache_control" in tool:
        found["cache_control"] = tool["cache_control"]
    return found


def _choice(choice: object) -> tuple[Json, set[str] | None]:
    """And the names of the tools that may be used, None: all."""
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise refusal("tool_choice", f"'{choice}' is not one of auto, none, required.")
        return {"type": "any" if choice == "required" else choice}, None
    wanted = as_object(choice, "tool_choice")
    if wanted.get("type") == "function":
        return {"type": "tool", "name": _function_name(wanted, "tool_choice")}, None
    if wanted.get("type") == "allowed_tools":
        allowed = as_object(wanted.get("allowed_tools"), "tool_choice.allowed_tools")
        tools = as_list(allowed.get("tools"), "tool_choice.allowed_tools.tools")
        names = {_function_name(as_object(t, "tool_choice.allowed_tools.tools"), "tool_choice") for t in tools}
        return {"type": "any" if allowed.get("mode") == "required" else "auto"}, names
    raise refusal("tool_choice", f"Anthropic's API has no choice of the type '{wanted.get('type')}'.")


def _function_name(wanted: Json, where: str) -> str:
    return as_text(as_object(wanted.get("function"), f"{where}.function").get("name"), f"{where}.function.name")


def _output(chat: Json) -> Json:
    config: Json = {}
    wanted = as_object(chat.get("response_format", {"type": "text"}), "response_format")
    if wanted.get("type") == "json_schema":
        schema = as_object(wanted.get("json_schema"), "response_format.json_schema")
        config["format"] = {
            "type": "json_schema",
            "schema": as_object(schema.get("schema"), "response_format.json_schema.schema"),
        }
    elif wanted.get("type") != "text":
        why = f"Anthropic's API, which this model speaks, has no '{wanted.get('type')}'."
        raise refusal("response_format", why, "Use json_schema, with a schema.")
    effort = chat.get("reasoning_effort")
    if effort == "none":
        return {"thinking": {"type": "disabled"}} | ({"output_config": config} if config else {})
    if effort is not None:
        if effort not in _EFFORTS:
            raise refusal("reasoning_effort", f"'{effort}' is not one of none, {', '.join(_EFFORTS)}.")
        config["effort"] = _EFFORTS[effort]
    return {"output_config": config} if config else {}
