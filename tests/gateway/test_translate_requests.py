"""Requests in the other format: hand-written exchanges, what is refused, and there and back again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from nimhost.errors import BadRequest
from nimhost.gateway.translate.to_chat import to_chat, to_tokenize
from nimhost.gateway.translate.to_messages import to_messages

Json = dict[str, Any]
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PNG = "iVBORw0KGgo="
WEATHER_CHAT = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA},
}
WEATHER = {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}


def text(words: str) -> Json:
    return {"type": "text", "text": words}


def call(call_id: str, arguments: str) -> Json:
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


CONVERSATIONS = {
    "plain": (HI, [{"role": "user", "content": [text("Hi")]}], None),
    "system and developer prompts come first, wherever they stood": (
        [{"role": "system", "content": "A."}, *HI, {"role": "developer", "content": [text("B.")]}],
        [{"role": "user", "content": [text("Hi")]}],
        "A.\nB.",
    ),
    "a system prompt marked for caching stays in blocks": (
        [{"role": "system", "content": [text("A.") | {"cache_control": {"type": "ephemeral"}}]}, *HI],
        [{"role": "user", "content": [text("Hi")]}],
        [text("A.") | {"cache_control": {"type": "ephemeral"}}],
    ),
    "messages of one side are one turn, empty ones are none": (
        [*HI, {"role": "user", "content": "there"}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": [text("Hi"), text("there")]}],
        None,
    ),
    "images as data and as an address": (
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}},
                    text("What is it?"),
                ],
            }
        ],
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
                    {"type": "image", "source": {"type": "url", "url": "https://x.org/a.png"}},
                    text("What is it?"),
                ],
            }
        ],
        None,
    ),
    "a file": (
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "file",
                        "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"},
                    }
                ],
            }
        ],
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "document",
                        "title": "a.pdf",
                        "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"},
                    }
                ],
            }
        ],
        None,
    ),
    "parallel tool calls, their results, and what the user says then": (
        [
            *HI,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call("c1", '{"city": "Paris"}'), call("c2", "")],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            {"role": "tool", "tool_call_id": "c2", "content": [text("rain")]},
            {"role": "user", "content": "And now?"},
        ],
        [
            {"role": "user", "content": [text("Hi")]},
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}},
                    {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [text("sunny")]},
                    {"type": "tool_result", "tool_use_id": "c2", "content": [text("rain")]},
                    text("And now?"),
                ],
            },
        ],
        None,
    ),
    "arguments that a model wrote wrongly are kept, in Anthropic's way": (
        [*HI, {"role": "assistant", "content": "", "tool_calls": [call("c", '{"city": ')]}],
        [
            {"role": "user", "content": [text("Hi")]},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "c", "name": "weather", "input": {"INVALID_JSON": '{"city": '}}],
            },
        ],
        None,
    ),
    "signed thoughts go back, unsigned ones do not": (
        [
            *HI,
            {
                "role": "assistant",
                "content": "Yes",
                "reasoning_content": "Hm.",
                "thinking_blocks": [{"index": 0, "type": "thinking", "thinking": "Hm.", "signature": "s"}],
            },
            *HI,
        ],
        [
            {"role": "user", "content": [text("Hi")]},
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, text("Yes")],
            },
            {"role": "user", "content": [text("Hi")]},
        ],
        None,
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_chat_becomes_messages(name: str) -> None:
    chat, turns, system = CONVERSATIONS[name]
    wanted = {"model": "m", "messages": turns} | ({} if system is None else {"system": system})
    assert to_messages({"model": "m", "messages": chat}).body == wanted


@pytest.mark.parametrize(
    ("chat", "messages"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6, "max_tokens": 5}, {"max_tokens": 6}),
        ({"max_tokens": None, "n": None, "stream": True}, {"stream": True}),
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["A", "B"], "top_p": 0.5}, {"stop_sequences": ["A", "B"], "top_p": 0.5}),
        ({"temperature": 1.7}, {"temperature": 1}),
        ({"temperature": 0.3, "n": 1}, {"temperature": 0.3}),
        ({"user": "u1"}, {"metadata": {"user_id": "u1"}}),
        ({"reasoning_effort": "minimal"}, {"output_config": {"effort": "low"}}),
        ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}),
        ({"thinking": {"type": "adaptive"}, "top_k": 4}, {"thinking": {"type": "adaptive"}, "top_k": 4}),
        ({"response_format": {"type": "text"}}, {}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        ),
        ({"tools": [WEATHER_CHAT]}, {"tools": [WEATHER]}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        (
            {"tools": [WEATHER_CHAT], "tool_choice": "required", "parallel_tool_calls": False},
            {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        ),
        (
            {"tools": [WEATHER_CHAT], "tool_choice": "none", "parallel_tool_calls": False},
            {"tools": [WEATHER], "tool_choice": {"type": "none"}},
        ),
        (
            {"tools": [WEATHER_CHAT], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}},
        ),
        (
            {
                "tools": [WEATHER_CHAT, {"type": "function", "function": {"name": "other"}}],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "other"}}],
                    },
                },
            },
            {
                "tools": [{"name": "other", "input_schema": {"type": "object", "properties": {}}}],
                "tool_choice": {"type": "any"},
            },
        ),
    ],
)
def test_settings_of_a_chat(chat: Json, messages: Json) -> None:
    found = to_messages({"model": "m", "messages": HI} | chat)
    assert found.body == {"model": "m", "messages": [{"role": "user", "content": [text("Hi")]}]} | messages
    assert found.ignored == ()


def test_what_only_tunes_or_labels_a_chat_is_left_out_and_named() -> None:
    found = to_messages({"model": "m", "messages": HI, "seed": 1, "logit_bias": {}, "store": True, "x_new": 1})
    assert found.ignored == ("logit_bias", "seed", "store", "x_new")


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ({"n": 2}, "n: this model gives one answer"),
        ({"logprobs": True}, "logprobs: Anthropic's API"),
        ({"modalities": ["text", "audio"]}, "modalities: this model answers with text"),
        ({"functions": [{}]}, "functions: "),
        ({"response_format": {"type": "json_object"}}, "response_format: .*'json_object'"),
        ({"response_format": "json"}, "response_format: is not an object"),
        ({"reasoning_effort": "huge"}, "reasoning_effort: 'huge'"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, r"tools\[0\].type: .*'custom'"),
        ({"tools": [WEATHER_CHAT], "tool_choice": "maybe"}, "tool_choice: 'maybe'"),
        ({"tools": [WEATHER_CHAT], "tool_choice": {"type": "function"}}, "tool_choice.function: is missing"),
        ({"messages": None}, "messages: is missing"),
        ({"messages": "Hi"}, "messages: is not a list"),
        ({"messages": [1]}, r"messages\[0\]: is not an object"),
        ({"messages": [{"role": "robot", "content": ""}]}, r"messages\[0\].role: 'robot'"),
        ({"messages": [{"role": "function", "name": "x", "content": ""}]}, r"messages\[0\].role: 'function'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "no 'input_audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}, "a file's id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "ftp://x"}}]}]},
            r"messages\[0\].content\[0\]: is neither",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].tool_call_id: is missing"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, r"tool_calls\[0\].function: is missing"),
    ],
)
def test_what_a_chat_cannot_have_there_is_refused_by_name(chat: Json, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        to_messages({"model": "m", "messages": HI} | chat)


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([], "nothing to answer"),
        ([{"role": "system", "content": "Be brief."}], "nothing to answer"),
        ([{"role": "user", "content": ""}], r"messages\[0\].content: is empty"),
        ([{"role": "user", "content": None}], r"messages\[0\].content: is empty"),
        ([{"role": "user", "content": [{"type": "text", "text": ""}]}], r"messages\[0\].content: is empty"),
        ([*HI, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": ""}], r"messages\[2\].content"),
    ],
)
def test_a_chat_in_which_the_user_says_nothing_is_refused_before_it_is_sent(turns: list[Json], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        to_messages({"model": "m", "messages": turns})


def test_an_answer_without_text_is_left_out_as_it_says_nothing() -> None:
    turns = [*HI, {"role": "assistant", "content": ""}, {"role": "user", "content": "Well?"}]
    (turn,) = to_messages({"model": "m", "messages": turns}).body["messages"]
    assert [block["text"] for block in turn["content"]] == [HI[0]["content"], "Well?"]


# --- the other way

USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}


@pytest.mark.parametrize(
    ("turns", "chat"),
    [
        (HI, HI),
        ([{"role": "user", "content": [text("Hi")]}], HI),
        (
            [{"role": "user", "content": [text("Hi"), text("there")]}],
            [{"role": "user", "content": [text("Hi"), text("there")]}],
        ),
        ([{"role": "system", "content": [text("A."), text("B.")]}], [{"role": "system", "content": "A.\n\nB."}]),
        (
            [
                {"role": "assistant", "content": [text("I "), text("look."), USE]},
                {
                    "role": "user",
                    "content": [
                        text("Here:"),
                        {"type": "tool_result", "tool_use_id": "t1", "content": [text("sun"), text("ny")]},
                    ],
                },
            ],
            [
                {"role": "assistant", "content": "I look.", "tool_calls": [call("t1", '{"city":"Paris"}')]},
                {"role": "tool", "tool_call_id": "t1", "content": "sun\nny"},
                {"role": "user", "content": "Here:"},
            ],
        ),
        (
            [{"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": "s"}, USE]}],
            [{"role": "assistant", "content": None, "tool_calls": [call("t1", '{"city":"Paris"}')]}],
        ),
        (
            [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "is_error": True}]}],
            [{"role": "tool", "tool_call_id": "t1", "content": "Error:"}],
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t1",
                            "content": [
                                text("shot"),
                                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
                            ],
                        }
                    ],
                }
            ],
            [
                {"role": "tool", "tool_call_id": "t1", "content": "shot"},
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}],
                },
            ],
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "url", "url": "https://x.org/a.png"}},
                        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "doc"}},
                    ],
                }
            ],
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}},
                        text("doc"),
                    ],
                }
            ],
        ),
    ],
)
def test_messages_become_a_chat(turns: list[Json], chat: list[Json]) -> None:
    assert to_chat({"model": "m", "messages": turns}).body == {"model": "m", "messages": chat}


@pytest.mark.parametrize(
    ("messages", "chat"),
    [
        ({"max_tokens": 5, "temperature": 0.5}, {"max_tokens": 5, "temperature": 0.5}),
        ({"stream": False, "stop_sequences": []}, {}),
        ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
        ({"stop_sequences": ["A"], "top_p": 1}, {"stop": ["A"], "top_p": 1}),
        ({"tools": [WEATHER]}, {"tools": [WEATHER_CHAT]}),
        ({"tools": [WEATHER | {"type": "custom", "cache_control": {}}]}, {"tools": [WEATHER_CHAT]}),
        ({"tool_choice": {"type": "any"}}, {}),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            {"tools": [WEATHER_CHAT], "tool_choice": "required", "parallel_tool_calls": False},
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "none"}}, {"tools": [WEATHER_CHAT], "tool_choice": "none"}),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}},
            {"tools": [WEATHER_CHAT], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        ),
        ({"output_config": {"effort": "high"}}, {"reasoning_effort": "high"}),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
                }
            },
        ),
    ],
)
def test_settings_of_messages(messages: Json, chat: Json) -> None:
    found = to_chat({"model": "m", "messages": HI} | messages)
    assert found.body == {"model": "m", "messages": HI} | chat
    assert found.ignored == ()


def test_a_system_prompt_is_the_first_message() -> None:
    found = to_chat({"model": "m", "system": [text("A."), text("B.")], "messages": HI}).body
    assert found["messages"] == [{"role": "system", "content": "A.\n\nB."}, *HI]


def test_what_only_tunes_or_labels_messages_is_left_out_and_named() -> None:
    extras = {"top_k": 1, "metadata": {"user_id": "u"}, "thinking": {"type": "adaptive"}}
    assert to_chat({"model": "m", "messages": HI} | extras).ignored == ("metadata", "thinking", "top_k")


def test_openais_own_limit_has_another_name() -> None:
    found = to_chat({"model": "m", "messages": HI, "max_tokens": 5}, "max_completion_tokens").body
    assert found == {"model": "m", "messages": HI, "max_completion_tokens": 5}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ({"messages": None}, "messages: is missing"),
        ({"messages": [{"role": "tool", "content": ""}]}, r"messages\[0\].role: 'tool'"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\].content: is not a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]},
            "no place for a 'server_tool_use'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, "from a 'file'"),
        ({"messages": [{"role": "assistant", "content": [USE | {"input": "x"}]}]}, "input: is not an object"),
        ({"tools": [{"type": "web_search_20260318", "name": "web_search"}]}, r"tools\[0\].type: 'web_search_20260318'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "odd"}}, "tool_choice: 'odd'"),
        ({"mcp_servers": [{}]}, "mcp_servers: "),
        ({"output_config": {"format": 1}}, "output_config.format: is not an object"),
    ],
)
def test_what_messages_cannot_have_there_is_refused_by_name(messages: Json, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        to_chat({"model": "m", "messages": HI} | messages)


def test_tokens_are_counted_in_what_would_be_sent() -> None:
    asked = {"model": "m", "system": "A.", "messages": HI, "tools": [WEATHER], "thinking": {"type": "adaptive"}}
    assert to_tokenize(asked) == {
        "model": "m",
        "messages": [{"role": "system", "content": "A."}, *HI],
        "tools": [WEATHER_CHAT],
    }


# --- there and back


def random_chat(rng: random.Random) -> Json:
    """A conversation as OpenAI's clients have it, in the form that translating back gives it."""
    messages: list[Json] = [{"role": "system", "content": words(rng)}] if rng.random() < 0.5 else []
    for number in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": rng.choice([words(rng), random_parts(rng)])})
        calls = [
            call(f"c{number}-{i}", json.dumps({"city": rng.random()}, separators=(",", ":")))
            for i in range(rng.randint(0, 3))
        ]
        said = words(rng)
        if not calls:
            messages.append({"role": "assistant", "content": said})
            continue
        messages.append({"role": "assistant", "content": rng.choice([None, said]), "tool_calls": calls})
        messages += [{"role": "tool", "tool_call_id": c["id"], "content": words(rng)} for c in calls]
        messages.append({"role": "assistant", "content": said})
    chat: Json = {"model": "m", "messages": messages}
    settings = {
        "max_tokens": rng.randint(1, 9),
        "temperature": rng.random(),
        "top_p": rng.random(),
        "stop": [words(rng)],
        "reasoning_effort": rng.choice(["low", "medium", "high", "xhigh", "max"]),
    }
    chat |= {name: value for name, value in settings.items() if rng.random() < 0.5}
    if rng.random() < 0.5:
        named = {"type": "function", "function": {"name": "weather"}}
        chat |= {"tools": [WEATHER_CHAT], "tool_choice": rng.choice(["required", "none", named])}
        if chat["tool_choice"] != "none" and rng.random() < 0.5:
            chat["parallel_tool_calls"] = False
    return chat


def random_parts(rng: random.Random) -> list[Json]:
    makers: list[Callable[[], Json]] = [
        lambda: text(words(rng)),
        lambda: {"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{PNG}"}},
        lambda: {"type": "image_url", "image_url": {"url": f"https://x.org/{rng.random()}"}},
        lambda: {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JV"}},
    ]
    return [rng.choice(makers)() for _ in range(rng.randint(2, 4))]


def words(rng: random.Random) -> str:
    return "".join(rng.choice("abc äß漢🦜 \n'<") for _ in range(rng.randint(1, 8)))


@pytest.mark.parametrize("seed", range(300))
def test_there_and_back_a_chat_means_the_same(seed: int) -> None:
    chat = random_chat(random.Random(seed))
    assert to_chat(to_messages(chat).body).body == chat


def random_json(rng: random.Random, depth: int = 0) -> Any:
    """Nonsense that looks like a request."""
    keys = ["model", "messages", "role", "content", "type", "text", "tools", "tool_calls", "function", "name", "source",
            "tool_choice", "system", "input", "image_url", "url", "thinking_blocks", "response_format", "stop",
            "output_config", "format", "schema", "file", "temperature", "arguments", "id"]  # fmt: skip
    values = ["user", "assistant", "tool", "system", "text", "image", "image_url", "tool_use", "tool_result",
              "function", "json_schema", "thinking", "document", "", 0, 2.5, True, None, "auto", {}, []]  # fmt: skip
    kind = rng.random()
    if depth > 5 or kind < 0.4:
        return rng.choice(values)
    if kind < 0.6:
        return [random_json(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice(keys): random_json(rng, depth + 1) for _ in range(rng.randint(1, 6))}


@pytest.mark.parametrize("translate", [to_messages, to_chat])
def test_nonsense_is_refused_not_stumbled_over(translate: Any) -> None:
    rng, refused = random.Random(7), 0
    for _ in range(4_000):
        body = random_json(rng)
        body = (body if isinstance(body, dict) else {}) | {"messages": [random_json(rng, 2) for _ in range(2)]}
        try:
            translate(body)
        except BadRequest:
            refused += 1
    assert refused > 1_000
