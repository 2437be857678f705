"""An Anthropic messages request as an OpenAI chat request. Pure.

Carried over: the conversation with its tools, images and documents; limits, stops, sampling, streaming (with usage,
which Anthropic's streams always have); structured output and effort. Refused: tools that run at Anthropic, files that
lie there. Left out: earlier thoughts, which OpenAI's format has no place for, and marks for caching; left out and
named: the rest (`thinking`, `top_k`, `metadata`, …).
"""

from __future__ import annotations

from nimhost.gateway.translate.fields import Asked, Json, as_list, as_object, as_text, given, refusal, write_arguments

TO_MODEL_OF_ANTHROPIC = "Use a model of a provider that speaks Anthropic's API for that."
_CARRIED = frozenset([
    "model", "messages", "system", "max_tokens", "stop_sequences", "stream", "temperature", "top_p", "tools",
    "tool_choice", "output_config", "cache_control",
])  # fmt: skip
_AS_THEY_ARE = ("model", "temperature", "top_p")
_CHOICES = {"any": "required", "none": "none"}


def to_chat(messages: Json, limit_name: str = "max_tokens") -> Asked:
    """`limit_name`: what the upstream calls the limit of tokens. Raises BadRequest."""
    request = given(messages)
    if request.get("mcp_servers"):
        raise refusal("mcp_servers", "only Anthropic connects to those itself.", TO_MODEL_OF_ANTHROPIC)
    chat = {name: request[name] for name in _AS_THEY_ARE if name in request}
    chat["messages"] = _conversation(request)
    if "max_tokens" in request:
        chat[limit_name] = request["max_tokens"]
    if stops := request.get("stop_sequences"):
        chat["stop"] = stops
    if request.get("stream"):
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    chat |= _tools(request) | _output(as_object(request.get("output_config", {}), "output_config"))
    return Asked(chat, tuple(sorted(request.keys() - _CARRIED)))


def to_tokenize(messages: Json) -> Json:
    """A request to count tokens, for vLLM's `/tokenize`. Raises BadRequest."""
    chat = to_chat(messages).body
    return {name: chat[name] for name in ("model", "messages", "tools") if name in chat}


# --- the conversation


def _conversation(request: Json) -> list[Json]:
    found: list[Json] = []
    if system := request.get("system"):
        found.append({"role": "system", "content": _plain(system, "system", "\n\n")})
    for number, item in enumerate(as_list(request.get("messages"), "messages")):
        where = f"messages[{number}]"
        message = as_object(item, where)
        role, content = message.get("role"), message.get("content")
        if role == "system":
            found.append({"role": "system", "content": _plain(content, f"{where}.content", "\n\n")})
        elif role == "user":
            found += _of_user(content, f"{where}.content")
        elif role == "assistant":
            found.append(_of_assistant(content, f"{where}.content"))
        else:
            raise refusal(f"{where}.role", f"'{role}' is not one of user, assistant, system.")
    return found


def _blocks(content: object, where: str) -> list[tuple[Json, str]]:
    """Each with where it stands."""
    if isinstance(content, str):
        return [({"type": "text", "text": content}, where)]
    return [(as_object(b, f"{where}[{i}]"), f"{where}[{i}]") for i, b in enumerate(as_list(content, where))]


def _plain(content: object, where: str, between: str) -> str:
    found = []
    for block, place in _blocks(content, where):
        if block.get("type") != "text":
            raise refusal(place, "only text can stand here.")
        found.append(as_text(block.get("text"), f"{place}.text"))
    return between.join(found)


def _of_user(content: object, where: str) -> list[Json]:
    """Results of tools come first, each as a message; then the rest as one."""
    results: list[Json] = []
    parts: list[Json] = []
    for block, place in _blocks(content, where):
        if block.get("type") == "tool_result":
            result, pictures = _result(block, place)
            results.append(result)
            parts += pictures
        else:
            parts.append(_part(block, place))
    if len(parts) > 1 or (parts and parts[0]["type"] != "text"):
        return [*results, {"role": "user", "content": parts}]
    rest = [{"role": "user", "content": part["text"]} for part in parts]
    return [*results, *rest] or [{"role": "user", "content": ""}]


def _result(block: Json, where: str) -> tuple[Json, list[Json]]:
    """As a message, and its pictures, for which such a message has no place."""
    texts, pictures = [], []
    for inner, place in _blocks(block.get("content") or [], f"{where}.content"):
        part = _part(inner, place)
        if part["type"] == "text":
            texts.append(part["text"])
        else:
            pictures.append(part)
    if block.get("is_error"):
        texts.insert(0, "Error:")
    call_id = as_text(block.get("tool_use_id"), f"{where}.tool_use_id")
    return {"role": "tool", "tool_call_id": call_id, "content": "\n".join(texts)}, pictures


def _part(block: Json, where: str) -> Json:
    kind = block.get("type")
    if kind == "text":
        return {"type": "text", "text": as_text(block.get("text"), f"{where}.text")}
    source = as_object(block.get("source"), f"{where}.source") if kind in ("image", "document") else {}
    if kind == "image" and source.get("type") in ("base64", "url"):
        return {"type": "image_url", "image_url": {"url": _url(source, f"{where}.source")}}
    if kind == "document" and source.get("type") == "text":
        return {"type": "text", "text": as_text(source.get("data"), f"{where}.source.data")}
    if kind == "document" and source.get("type") == "base64":
        name = block.get("title") or "document.pdf"
        return {"type": "file", "file": {"filename": name, "file_data": _url(source, f"{where}.source")}}
    what = f"a '{kind}' from a '{source.get('type')}'" if source else f"a '{kind}'"
    raise refusal(where, f"OpenAI's API, which this model speaks, has no place for {what}.", TO_MODEL_OF_ANTHROPIC)


def _url(source: Json, where: str) -> str:
    if source["type"] == "url":
        return as_text(source.get("url"), f"{where}.url")
    kind = as_text(source.get("media_type"), f"{where}.media_type")
    return f"data:{kind};base64,{as_text(source.get('data'), f'{where}.data')}"


def _of_assistant(content: object, where: str) -> Json:
    texts, calls = [], []
    for block, place in _blocks(content, where):
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(_call(block, place))
        elif kind not in ("thinking", "redacted_thinking"):
            part = _part(block, place)
            if part["type"] != "text":
                raise refusal(place, "an assistant's message can only have text and tool calls here.")
            texts.append(part["text"])
    message: Json = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Json, where: str) -> Json:
    function = {
        "name": as_text(block.get("name"), f"{where}.name"),
        "arguments": write_arguments(as_object(block.get("input", {}), f"{where}.input")),
    }
    return {"id": as_text(block.get("id"), f"{where}.id"), "type": "function", "function": function}


# --- tools, and what the answer is to look like


def _tools(request: Json) -> Json:
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(as_list(request.get("tools", []), "tools"))]
    if not tools:
        return {}
    choice = as_object(request.get("tool_choice", {"type": "auto"}), "tool_choice")
    found: Json = {"tools": tools}
    if choice.get("type") == "tool":
        name = as_text(choice.get("name"), "tool_choice.name")
        found["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif choice.get("type") in _CHOICES:
        found["tool_choice"] = _CHOICES[choice["type"]]
    elif choice.get("type") != "auto":
        raise refusal("tool_choice", f"'{choice.get('type')}' is not one of auto, any, tool, none.")
    if choice.get("disable_parallel_tool_use"):
        found["parallel_tool_calls"] = False
    return found


def _tool(item: object, where: str) -> Json:
    tool = given(as_object(item, where))
    if tool.get("type", "custom") != "custom":
        raise refusal(f"{where}.type", f"'{tool['type']}' is a tool of Anthropic's.", TO_MODEL_OF_ANTHROPIC)
    function: Json = {"name": as_text(tool.get("name"), f"{where}.name")}
    function |= {name: tool[name] for name in ("description", "strict") if tool.get(name)}
    function["parameters"] = tool.get("input_schema") or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _output(config: Json) -> Json:
    found: Json = {}
    if wanted := config.get("format"):
        schema = as_object(as_object(wanted, "output_config.format").get("schema"), "output_config.format.schema")
        json_schema = {"name": "answer", "schema": schema, "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    if effort := config.get("effort"):
        found["reasoning_effort"] = effort
    return found
