"""What a person at a terminal sees, and what Ctrl-C and Ctrl-D do."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tests.cli.terminal import Terminal
from tests.cli.test_deploy import QWEN
from tests.cli.wire import FakeWire, snapshot, sse
from tests.support import wait_until

Open = Callable[..., Terminal]


def test_progress_is_live_on_a_terminal(terminal: Open, wire: FakeWire) -> None:
    gates = [threading.Event(), threading.Event()]
    wire.provider(QWEN, f"default/{QWEN}", f"default/{QWEN}")
    weights = {"done_bytes": 1_500_000_000, "total_bytes": 3_000_000_000, "rate_bytes_s": 50_000_000, "message": ""}
    wire.script = [
        snapshot("PENDING", "Downloading weights", weights=weights), gates[0],
        snapshot("PENDING", "Starting", engine={"message": "loading"}), gates[1], snapshot("READY"),
    ]  # fmt: skip
    shown = terminal("deploy", "Qwen/Qwen3-1.7B")
    shown.see("1.5 of 3.0 GB · 50 MB/s · 0:30 left")
    gates[0].set()
    shown.see("✓ weights  done · 3.0 GB")
    shown.see("engine   loading · 0:0")
    gates[1].set()
    shown.see(f"{QWEN} is READY after 0:0")
    assert shown.exit_code() == 0
    assert "\x1b[?25h" in shown.raw  # the cursor is back
    assert shown.raw.count("\x1b[?25h") >= shown.raw.count("\x1b[?25l")


def test_ctrl_c_leaves_the_deployment_going(terminal: Open, wire: FakeWire) -> None:
    wire.script = [snapshot("PENDING", "Loading", engine={"message": "loading"})]
    shown = terminal("deploy", "Qwen/Qwen3-1.7B")
    shown.see("engine   loading")
    shown.type("\x03")
    assert shown.exit_code() == 130
    for command in ("wait", "logs -f", "rm"):
        assert f"nimhost {command} {QWEN}" in shown.text
    assert "Traceback" not in shown.text
    assert wire.names("deployments") == [QWEN]
    assert "DELETE" not in {asked.method for asked in wire.asked}


def test_ctrl_c_ends_a_one_shot_answer_and_hangs_up(terminal: Open, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = [*sse("Once upon")[:2], threading.Event()]
    shown = terminal("chat", "q1", "Tell me a story")
    shown.see("Once upon")
    shown.type("\x03")
    assert shown.exit_code() == 130
    wait_until(lambda: wire.left)
    assert "Traceback" not in shown.text


def test_conversation(terminal: Open, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = sse("<think>hmm</think>", "Hi ", "there\x1b[31m")
    shown = terminal("chat", "q1", "-s", "Be kind.")
    shown.see("> ")
    shown.type("Hello\n")
    shown.see("Hi there\n")
    assert "\x1b[31m" not in shown.raw
    shown.type("/thinking\n")
    shown.see("Thinking is shown.")
    wire.answer = sse("<think>deep</think>", "Bye")
    shown.type("More\n")
    shown.see("deep\n\nBye\n")
    assert [m["content"] for m in wire.asked[-1].body["messages"]] == ["Be kind.", "Hello", "Hi there\x1b[31m", "More"]
    shown.type("/clear\n")
    shown.see("Forgotten.")
    shown.type("/nonsense\n")
    shown.see("There is no /nonsense.")
    shown.see_prompt(6)
    shown.type("\x04")
    assert shown.exit_code() == 0


def test_ctrl_c_stops_an_answer_and_not_the_conversation(terminal: Open, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = [*sse("Once upon")[:2], threading.Event()]
    shown = terminal("chat", "q1")
    shown.see("> ")
    shown.type("A story\n")
    shown.see("Once upon")
    shown.type("\x03")
    shown.see("(stopped)")
    wait_until(lambda: wire.left)
    wire.answer = sse("a time")
    shown.type("Go on\n")
    shown.see("a time\n")
    assert [m["content"] for m in wire.asked[-1].body["messages"]] == ["A story", "Once upon", "Go on"]
    shown.type("half a li")
    shown.see("> half a li")
    shown.type("\x03")
    shown.see_prompt(4)
    shown.type("/exit\n")
    assert shown.exit_code() == 0


def test_an_error_does_not_end_the_conversation(terminal: Open, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = [b'event: error\ndata: {"message": "out of memory"}\n\n']
    shown = terminal("chat", "q1")
    shown.see("> ")
    shown.type("Hello\n")
    shown.see("Error: out of memory")
    wire.answer = sse("Better now")
    shown.type("Again\n")
    shown.see("Better now")
    assert [m["content"] for m in wire.asked[-1].body["messages"]] == ["Again"]
    shown.see_prompt(3)
    shown.type("\x04")
    assert shown.exit_code() == 0


def test_ctrl_c_ends_logs_quietly(terminal: Open, wire: FakeWire) -> None:
    wire.put("deployments", "q1", config="q1")
    wire.logs = b"line\n"
    wire.log_end = threading.Event()
    shown = terminal("logs", "q1", "-f")
    shown.see("line")
    shown.type("\x03")
    assert shown.exit_code() == 130
    assert "Error" not in shown.text
