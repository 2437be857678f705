"""`chat` as seen by who pipes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from nimhost.cli.answers import Answer, Splitter
from nimhost.cli.chat_target import ChatTarget, choose
from nimhost.errors import BadRequest, NimhostError, NotReady
from tests.cli.wire import FakeWire, Refusal, sse

Run = Callable[..., Result]


def test_an_answer_is_printed_and_nothing_else(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = sse("Hello ", "from ", "the stub.")
    done = nimhost("chat", "q1", "Hello!", "--temperature", "0", "--max-tokens", "9", "-s", "Be brief.")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "Hello from the stub.\n", "")
    asked = wire.asked[-1]
    assert asked.path.endswith("/workspaces/default/provider/q1/-/v1/chat/completions")
    assert asked.body == {
        "model": "default/q1",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "max_tokens": 9,
    }


def test_the_prompt_may_be_piped(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = sse("ok")
    assert nimhost("chat", stdin="a\nlong question\n").stdout == "ok\n"
    assert wire.asked[-1].body["messages"] == [{"role": "user", "content": "a\nlong question"}]
    assert nimhost("chat", "q1", stdin=" \n").exit_code == 2


def test_a_provider_is_asked_verbatim(nimhost: Run, wire: FakeWire) -> None:
    wire.answer = sse("ok")
    assert nimhost("chat", "meta/llama-3.1-8b-instruct", "Hello!", "--provider", "up").exit_code == 0
    assert [repr(a) for a in wire.asked] == [
        "POST /apis/inference-gateway/v2/workspaces/default/provider/up/-/v1/chat/completions"
    ]
    assert wire.asked[-1].body["model"] == "meta/llama-3.1-8b-instruct"


def test_another_workspace_is_asked_where_it_is(nimhost: Run, wire: FakeWire) -> None:
    wire.answer = sse("ok")
    assert nimhost("chat", "team/m1", "Hello!").exit_code == 0
    assert wire.asked[-1].path.endswith("/workspaces/team/openai/-/v1/chat/completions")
    assert wire.asked[-1].body["model"] == "team/m1"
    assert nimhost("chat", "team/m1", "Hello!", "-w", "other").exit_code == 2
    assert nimhost("chat", "m1", "Hello!", "--provider", "a/b").exit_code == 2


THOUGHTS = ["<thi", "nk>hmm\n</th", "ink>\n\nYes."]


@pytest.mark.parametrize(
    ("options", "stdout"),
    [([], "Yes.\n"), (["--thinking"], "hmm\n\nYes.\n"), (["-f", "raw"], "hmm\n\nYes.\n")],
)
def test_thinking_is_shown_when_asked(nimhost: Run, wire: FakeWire, options: list[str], stdout: str) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = sse(*THOUGHTS)
    assert nimhost("chat", "q1", "Is it?", *options).stdout == stdout


def test_json_is_one_object(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = sse(*THOUGHTS, model="default/q1", usage={"total_tokens": 7})
    assert json.loads(nimhost("chat", "q1", "Is it?", "-f", "json").stdout) == {
        "content": "Yes.", "thinking": "hmm\n", "model": "default/q1", "usage": {"total_tokens": 7},
    }  # fmt: skip


def test_an_upstream_that_dies_is_said_after_what_came(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = [*sse("Hel")[:2], None]
    done = nimhost("chat", "q1", "Hello!")
    assert (done.exit_code, done.stdout) == (1, "Hel\n")
    assert "broke off" in done.stderr


def test_an_unknown_model_is_the_daemon_s_answer(nimhost: Run, wire: FakeWire) -> None:
    wire.refuse["POST", "/chat/completions"] = Refusal(404, "NotFound", "No model 'default/nope'", "nimhost ps")
    done = nimhost("chat", "nope", "Hello!")
    assert (done.exit_code, done.stderr) == (1, "Error: No model 'default/nope'\nHint: nimhost ps\n")


def test_an_adapter_that_nothing_serves_is_asked_for_by_the_name_that_the_daemon_knows_why_of(
    nimhost: Run, wire: FakeWire
) -> None:
    wire.put("adapters", "math", model="team/base")
    wire.refuse["POST", "/chat/completions"] = Refusal(503, "NotReady", "Adapter default--math is not ready: Stopped.")
    done = nimhost("chat", "math", "Hello!")
    assert (done.exit_code, done.stderr) == (1, "Error: Adapter default--math is not ready: Stopped.\n")
    assert wire.asked[-1].path.endswith("/workspaces/team/openai/-/v1/chat/completions")
    assert wire.asked[-1].body["model"] == "team/default--math"


# --- which model is meant ------------------------------------------------------------------------------------------


def deployment(name: str, status: str = "READY", **fields: Any) -> dict[str, Any]:
    return {"name": name, "workspace": "w", "status": status, "status_message": "because", **fields}


def provider(name: str, *served: str, **fields: Any) -> dict[str, Any]:
    models = [{"served_model_name": s, "model_entity_id": f"w/{s.replace('/', '-')}"} for s in served]
    return {"name": name, "workspace": "w", "status": "READY", "served_models": models, **fields}


QWEN = (deployment("qwen-qwen3"), provider("qwen-qwen3", "w--lora", "w/qwen-qwen3", model_deployment_id="w/qwen-qwen3"))
NIM = (deployment("llama"), provider("llama", "meta/llama", model_deployment_id="w/llama"))
CLOUD = provider("cloud", "gpt-4")
D = [QWEN[0], NIM[0], deployment("slow", "PENDING"), deployment("off", "PENDING", desired="stopped")]
P = [QWEN[1], NIM[1], CLOUD]
A = [
    {"name": "lora", "workspace": "w", "model": "w/qwen-qwen3"},
    {"name": "idle", "workspace": "w", "model": "w/slow"},
    {"name": "far", "workspace": "w", "model": "team/base"},
]


@pytest.mark.parametrize(
    ("text", "name", "target"),
    [
        ("gpt-4", "cloud", ChatTarget("gpt-4", "cloud", "w")),  # 2
        ("qwen-qwen3", None, ChatTarget("w/qwen-qwen3", "qwen-qwen3", "w")),  # 3
        ("w/llama", None, ChatTarget("meta/llama", "llama", "w")),  # 3
        ("meta-llama", None, ChatTarget("meta-llama", None, "w")),  # 4
        ("w/meta-llama", None, ChatTarget("meta-llama", None, "w")),  # 4
        ("meta/llama", None, ChatTarget("meta/llama", "llama", "w")),  # 5
        ("w--lora", None, ChatTarget("w--lora", None, "w")),  # 4
        ("lora", None, ChatTarget("w--lora", None, "w")),  # 6
        ("w/lora", None, ChatTarget("w--lora", None, "w")),  # 6
        ("qwen-qwen3--lora", None, ChatTarget("w--lora", None, "w")),  # 6
        ("idle", None, ChatTarget("w--idle", None, "w")),  # 6
        ("w--idle", None, ChatTarget("w--idle", None, "w")),  # 6
        ("slow--idle", None, ChatTarget("w--idle", None, "w")),  # 6
        ("far", None, ChatTarget("w--far", None, "team")),  # 6
        ("other--idle", None, ChatTarget("other--idle", None, "w")),  # 8
        ("w--not-yet", None, ChatTarget("w--not-yet", None, "w")),  # 8
        ("Qwen/Qwen3", None, ChatTarget("w/qwen-qwen3", "qwen-qwen3", "w")),  # 7
        ("other", None, ChatTarget("other", None, "w")),  # 8
        (None, "cloud", ChatTarget("gpt-4", "cloud", "w")),  # 1
    ],
)
def test_which_model_is_meant(text: str | None, name: str | None, target: ChatTarget) -> None:
    assert choose(text, name, "w", D, P, A) == target


@pytest.mark.parametrize(
    ("text", "cls", "hint"),
    [("slow", NotReady, "nimhost wait slow"), ("off", NotReady, "nimhost start off"), (None, BadRequest, "")],
)
def test_what_cannot_be_meant_says_what_to_do(text: str | None, cls: type[NimhostError], hint: str) -> None:
    with pytest.raises(cls) as caught:
        choose(text, None, "w", D, P)
    assert hint in (caught.value.hint or "")


def test_without_a_name_the_only_ready_one_is_meant() -> None:
    assert choose(None, None, "w", [NIM[0], D[2]], [NIM[1]]).provider == "llama"
    assert choose(None, None, "w", [D[2]], [CLOUD]).model == "gpt-4"
    with pytest.raises(BadRequest, match="No model is ready"):
        choose(None, None, "w", [D[2]], [])
    with pytest.raises(BadRequest, match=r"w/qwen-qwen3 .*meta/llama"):
        choose(None, None, "w", D, P)


# --- thinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content", "thinking"),
    [
        ("<think>a</think>\n\nb", "b", "a"),
        ("\n<think>\na\n</think>b", "b", "\na\n"),
        ("a <think>b</think>", "a <think>b</think>", ""),
        ("<thin", "<thin", ""),
        ("<think>a</thin", "", "a</thin"),
        ("<think></think>x", "x", ""),
        ("plain < text", "plain < text", ""),
        ("", "", ""),
    ],
)
def test_thinking_is_told_apart_wherever_the_text_is_cut(text: str, content: str, thinking: str) -> None:
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            splitter = Splitter()
            pieces = [p for part in (text[:first], text[first:second], text[second:]) for p in splitter.feed(part)]
            pieces += splitter.end()
            assert "".join(p.text for p in pieces if p.kind == "content") == content
            assert "".join(p.text for p in pieces if p.kind == "thinking") == thinking


def test_thinking_that_comes_apart_already() -> None:
    answer = Answer()
    for delta in ({"reasoning_content": "h"}, {"reasoning": "m"}, {"content": "Yes"}, {"content": None}):
        answer.feed({"choices": [{"delta": delta}]})
    answer.feed({"choices": []})
    assert (answer.thinking, answer.content) == ("hm", "Yes")
