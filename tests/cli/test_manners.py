"""What is told can be typed as it stands; what is asked is not shown; what is printed is what was wanted."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import Result

from nimhost.cli.requests import HEADERS, LEAST, fitting
from tests.cli.terminal import Terminal
from tests.cli.test_start import complete
from tests.cli.wire import FakeWire, Refusal, sse

Run = Callable[..., Result]
Open = Callable[..., Terminal]


# --- commands that are told ----------------------------------------------------------------------------------------


def test_told_commands_have_the_flags_of_this_one(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "q1", "team", config="c1")
    assert nimhost("stop", "q1", "-w", "team").stdout.endswith("with: nimhost --workspace team start q1\n")
    url = wire.url.replace("127.0.0.1", "localhost")
    done = nimhost("--base-url", url, "deploy", "a/bb", "--no-wait", "-w", "my team")
    assert done.stdout.endswith(f"nimhost --base-url {url} --workspace 'my team' wait a-bb\n")
    assert nimhost("-w", "team", "ps", "-a").exit_code == 0
    assert "Try: nimhost --workspace none deploy " in nimhost("-w", "none", "ps").stdout


def test_flags_are_not_told_to_commands_that_do_not_ask_a_daemon(nimhost: Run, wire: FakeWire) -> None:
    wire.close()
    done = nimhost("--base-url", wire.url, "ps")
    assert "Start it with: nimhost serve   or" in done.stderr


def test_settings_need_not_be_told_again(nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    wire.put("deployments", "q1", "team", config="c1")
    monkeypatch.setenv("NIMHOST_WORKSPACE", "team")
    assert nimhost("stop", "q1").stdout.endswith("with: nimhost start q1\n")


@pytest.mark.parametrize("command", ["deploy", "plan"])
def test_a_repository_that_wants_a_token_is_told_in_options(nimhost: Run, wire: FakeWire, command: str) -> None:
    hint = "Make a secret, and name it in the fileset: token_secret = hf-token"
    wire.refuse["POST", "/filesets"] = wire.refuse["POST", "/plan"] = Refusal(400, "BadRequest", "it is gated", hint)
    done = nimhost(command, "a/bb")
    assert done.stderr.endswith("Hint: Make a secret, then: nimhost deploy … --hf-token-secret hf-token\n")


def test_no_gpus_are_explained(nimhost: Run, wire: FakeWire) -> None:
    wire.said["/apis/nimhost/v1/gpus"] = {"data": []}
    wire.said["/status"] = {"services": {"not_ready": [{"name": "gpus", "message": "The driver does not answer."}]}}
    assert nimhost("gpus").stdout == "There are no GPUs: The driver does not answer. To deploy without one: --gpu 0\n"


def test_an_answer_that_breaks_off_says_what_to_do(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = [*sse("Once upon")[:2], None]
    done = nimhost("chat", "q1", "A story")
    assert (done.exit_code, done.stdout) == (1, "Once upon\n")
    assert done.stderr == (
        f"Error: The connection to {wire.url} broke off in the middle of an answer.\n"
        "Hint: If nimhost was stopped there: engines go on without it. Start it (nimhost serve), and try again.\n"
    )


# --- long work -----------------------------------------------------------------------------------------------------


def test_a_name_that_is_being_removed_is_waited_for_and_that_is_said(
    nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.put("deployments", "a-bb", config="a-bb", status="DELETING")
    monkeypatch.setattr("time.sleep", lambda _: wire.rows.pop(("deployments", "default", "a-bb"), None))
    done = nimhost("deploy", "a/bb", "--no-wait")
    assert (done.exit_code, done.stderr) == (0, "a-bb is being removed: waiting until it is gone.\n")


def test_create_that_waits_tells_what_happens_beside_its_result(nimhost: Run, wire: FakeWire) -> None:
    entry = {"timestamp": "2026-01-02T03:04:05Z", "status": "READY", "status_message": "Serving"}
    wire.put("deployments", "q1", config="c1", status="READY", status_history=[entry])
    done = nimhost("inference", "deployments", "create", "q1", "--config", "c1", "--wait", "--exist-ok")
    assert json.loads(done.stdout)["name"] == "q1"
    assert done.stderr == "03:04:05  READY     Serving\n"


@pytest.mark.parametrize(
    "words",
    [
        ("deploy", "a/bb"),
        ("wait", "q1"),
        ("wait", "inference", "provider", "q1"),
        ("inference", "deployments", "create", "q1", "--config", "c1", "--wait"),
    ],
)
def test_a_time_that_is_none_is_refused(nimhost: Run, wire: FakeWire, words: tuple[str, ...]) -> None:
    done = nimhost(*words, "--timeout", "-1")
    assert (done.exit_code, wire.asked) == (2, [])
    assert "--timeout" in done.stderr


# --- what is typed -------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_and_not_shown(terminal: Open, nimhost: Run) -> None:
    shown = terminal("config", "set", "--access-token", "-")
    shown.see("API token: ")
    shown.type("canary-0123456789\n")
    assert shown.exit_code() == 0
    assert "canary" not in shown.text
    assert "cana…" in nimhost("config", "view").stdout


def test_a_secret_is_asked_for_and_not_shown(terminal: Open, wire: FakeWire) -> None:
    shown = terminal("secrets", "create", "hf-token", "--from-file", "-")
    shown.see("Value: ")
    shown.type("canary-0123456789\n")
    assert shown.exit_code() == 0
    assert [body["value"] for body in wire.sent("POST", "/secrets")] == ["canary-0123456789"]
    assert shown.text.count("canary") == 1  # the stand-in's reply, which is no daemon's


def test_ctrl_c_at_a_question_is_an_interruption(terminal: Open) -> None:
    shown = terminal("config", "set", "--access-token", "-")
    shown.see("API token: ")
    shown.type("\x03")
    assert shown.exit_code() == 130
    assert "Traceback" not in shown.text


# --- what is printed -----------------------------------------------------------------------------------------------


def test_a_list_in_a_pipe_is_json_unless_something_else_was_asked_for(
    nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.put("deployments", "q1", config="c1")
    words = ("inference", "deployments", "list")
    assert json.loads(nimhost(*words).stdout)["data"][0]["name"] == "q1"
    assert nimhost(*words, "-f", "table").stdout.startswith("NAME  CONFIG")
    monkeypatch.setenv("NIMHOST_OUTPUT_FORMAT", "table")
    assert nimhost(*words).stdout.startswith("NAME  CONFIG")


def test_a_table_shows_the_first_sentence_of_a_message(nimhost: Run, wire: FakeWire) -> None:
    said = "It exited with code 1. See its logs.\n\nLast log lines:\nValueError: no such flag"
    wire.put("deployments", "q1", config="c1", status="ERROR", status_message=said)
    lines = nimhost("inference", "deployments", "list", "-f", "table").stdout.splitlines()
    assert [line.split()[-5:] for line in lines[1:]] == [["It", "exited", "with", "code", "1."]]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["wait", "inference", "provider", "q"], ["q-provider"]),
        (["wait", "inference", "deployment", ""], ["qwen"]),
        (["chat", "--provider", ""], ["q-provider"]),
        (["secrets", "access", ""], ["key"]),
        (["inference", "get-url", "--provider", ""], ["q-provider"]),
        (["inference", "gateway", "provider", "get", "v1/models", ""], ["q-provider"]),
        (["inference", "deployments", "versions", "get", "1", "--deployment", ""], ["qwen"]),
        (["models", "adapters", "update", ""], ["math"]),
        (["models", "adapters", "delete", "math", "--model-name", ""], ["q-model"]),
    ],
)
def test_names_are_completed_wherever_there_are_some(wire: FakeWire, words: list[str], names: list[str]) -> None:
    for kind, name in (
        ("deployments", "qwen"), ("models", "q-model"), ("providers", "q-provider"), ("secrets", "key"),
        ("adapters", "math"),
    ):  # fmt: skip
        wire.put(kind, name)
    assert complete(*words) == names


REQUEST = {
    "time": "2026-01-02T03:04:05+00:00", "status": 200, "path": "/v1/chat/completions", "model": "default/q1",
    "adapter": None, "provider": "default/q1", "total_ms": 126.0, "first_byte_ms": 96.0, "prompt_tokens": 31,
    "completion_tokens": 12, "id": "14473864b870-4", "error": None, "error_message": None,
}  # fmt: skip


def test_requests_fit_into_a_terminal(terminal: Open, nimhost: Run, wire: FakeWire) -> None:
    wire.said["/apis/nimhost/v1/requests"] = {"data": [REQUEST]}
    shown = terminal("requests", columns=80)
    assert shown.exit_code() == 0
    lines = shown.text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["TIME", "STATUS", "MODEL", "TOTAL", "FIRST", "BYTE", "TOKENS", "ID"], lines
    assert "14473864b870-4" in nimhost("requests").stdout


@pytest.mark.parametrize(
    ("room", "left_out"),
    [(1000, ()), (100, ("PROVIDER",)), (80, ("PROVIDER", "PATH", "ID")), (10, LEAST)],
)
def test_columns_that_tell_least_go_first(room: int, left_out: tuple[str, ...]) -> None:
    widths = [8] * len(HEADERS)
    assert [HEADERS[at] for at in fitting(widths, room)] == [name for name in HEADERS if name not in left_out]


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        (["-c", "name,executor_config.gpu"], ["NAME", "EXECUTOR_CONFIG.GPU", "q1", "2", "q2", "-"]),
        (["--output-columns", "all"], ["NAME", "WORKSPACE", "CREATED_AT", "UPDATED_AT", "ENGINE", "EXECUTOR_CONFIG"]),
        (["-c", "default"], ["NAME", "ENGINE", "GPUS", "AGE", "q1"]),
    ],
)
def test_a_table_has_the_columns_that_are_asked_for(
    nimhost: Run, wire: FakeWire, asked: list[str], lines: list[str]
) -> None:
    wire.put("deployment-configs", "q1", engine="nim", executor_config={"gpu": 2})
    wire.put("deployment-configs", "q2", engine="nim", executor_config={})
    done = nimhost("inference", "deployment-configs", "list", "-f", "table", *asked)
    assert done.stdout.split()[: len(lines)] == lines
    assert json.loads(nimhost("inference", "deployment-configs", "list", *asked).stdout)["data"][0]["engine"] == "nim"


def test_a_table_is_cut_at_the_edge_of_a_terminal_unless_it_is_wanted_whole(terminal: Open, wire: FakeWire) -> None:
    wire.put("models", "q1", description="文" * 200)
    for flag, count in (([], 36), (["--no-truncate"], 200)):
        for words in (("models", "list", *flag), (*flag, "models", "list")):  # the reference has it in both places
            shown = terminal(*words, "-c", "name,description", columns=80)
            assert shown.exit_code() == 0
            assert shown.text.count("文") == count


@pytest.mark.parametrize(("no_color", "coloured"), [("1", False), ("", True)])
def test_no_colour_is_none_where_none_is_wanted(
    terminal: Open, wire: FakeWire, monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    """https://no-color.org"""
    monkeypatch.setenv("NO_COLOR", no_color)
    wire.ready("q1", "default/q1")
    for words, said in ((("ps",), "READY"), (("models", "get", "nope"), "Error:"), (("wait", "q1"), "is READY")):
        shown = terminal(*words)
        shown.see(said)
        shown.exit_code()
        assert ("\x1b[3" in shown.raw) is coloured, shown.raw


def test_a_row_takes_two_lines_of_a_narrow_terminal_at_most(terminal: Open, wire: FakeWire) -> None:
    name = "meta-llama-3-2-1b-instruct"
    wire.ready(name, f"default/{name}")
    wire.rows["deployments", "default", name]["status_message"] = "waiting for this and that " * 20
    shown = terminal("ps", columns=80)
    assert shown.exit_code() == 0
    (row,) = [line for line in shown.text.splitlines() if "waiting" in line]
    assert len(row) == 160
    assert row.endswith("…")
