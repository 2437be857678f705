"""Input that is no text, names that are none, streams that are closed: an answer, and never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import Result

from tests.cli.wire import FakeWire, Refusal, sse

Run = Callable[..., Result]
BROKEN = b"a\xffb"
"""No UTF-8."""


def program(
    args: Sequence[str | bytes], stdin: bytes = b"", script: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """The command as a process of its own; `script`: what a shell does with it as `"$@"`."""
    command: list[str | bytes] = [sys.executable, "-m", "nimhost", *args]
    if script:
        command = ["sh", "-c", script, "sh", *command]
    return subprocess.run(command, input=stdin, capture_output=True, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize(
    "args",
    [
        ("secrets", "get", BROKEN),
        ("secrets", "create", "key", "--value", "x", "--description", BROKEN),
        ("secrets", "create", "key", "--value", BROKEN),
        ("models", "list", "--filter", b"description=" + BROKEN),
        ("inference", "gateway", "provider", "get", b"v1/" + BROKEN, "prov"),
        ("chat", "model", BROKEN),
    ],
)
def test_an_argument_that_is_no_text_is_refused(wire: FakeWire, args: Sequence[str | bytes]) -> None:
    done = program(args)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("Error: ")
    assert "UTF-8" in done.stderr.decode()
    assert not [asked for asked in wire.asked if asked.method != "GET"]


@pytest.mark.parametrize("how", ["utf-8:strict", "utf-8:surrogateescape"])
@pytest.mark.parametrize(
    "args",
    [
        ("chat", "model"),
        ("secrets", "create", "key", "--from-file", "-"),
        ("models", "create", "model", "--input-file", "-"),
        ("config", "set", "--access-token", "-"),
    ],
)
def test_a_pipe_that_is_no_text_is_refused(wire: FakeWire, args: Sequence[str], how: str) -> None:
    done = program(args, BROKEN, PYTHONIOENCODING=how)
    assert (done.returncode, wire.sent("POST", "")) == (2, [])
    assert done.stderr.decode().splitlines()[-1] == "Error: Standard input is not text in UTF-8."


def test_a_file_whose_name_is_no_text_is_not_uploaded(wire: FakeWire, tmp_path: Path) -> None:
    wire.put("filesets", "files")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + BROKEN)).write_text("x")
    done = program(["files", "upload", f"{tmp_path}/", "files"])
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: 'a?b' ")


@pytest.mark.parametrize("text", ["NaN", '{"a": -Infinity}'])
def test_numbers_that_json_has_not_are_refused(nimhost: Run, wire: FakeWire, text: str) -> None:
    done = nimhost("models", "create", "model", "--custom-fields", text)
    assert (done.exit_code, wire.asked) == (2, [])


@pytest.mark.parametrize("script", ['"$@" <&-', '"$@" >&-', '"$@" 2>&-', '"$@" <&- >&- 2>&-'])
@pytest.mark.parametrize(
    ("args", "code"),
    [(("models", "list"), 0), (("models", "get", "nope"), 1), (("chat", "q1", "Hello!"), 0), (("chat", "q1"), 2)],
)
def test_streams_that_are_closed_are_empty(wire: FakeWire, args: Sequence[str], code: int, script: str) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = [*sse("Hello!")]
    done = program(args, script=script)
    assert (done.returncode, b"Traceback" in done.stderr) == (code, False)


def test_half_a_character_of_an_engine_s_is_shown_as_a_question_mark(wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = [b'data: {"choices": [{"delta": {"content": "\\ud83d!"}}]}\n\n', b"data: [DONE]\n\n"]
    done = program(["chat", "q1", "Hello!"], PYTHONIOENCODING="utf-8:strict")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"?!\n", b"")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("rm", ""), "'' names no deployment."),
        (("stop", "default/"), "'default/' names no deployment."),
        (("logs", "/q1"), "'/q1' names no deployment."),
        (("secrets", "get", ""), "'' names no secret."),
        (("files", "list", ""), "'' names no fileset."),
        (("models", "get", "a/b/c"), "'a/b/c' names no model."),
        (("workspaces", "delete", "team/prod"), "'team/prod' names no workspace."),
    ],
)
def test_what_names_nothing_reaches_nobody(nimhost: Run, wire: FakeWire, args: Sequence[str], told: str) -> None:
    wire.put("workspaces", "prod", "")
    done = nimhost(*args)
    assert (done.exit_code, wire.asked) == (1, [])
    assert done.stderr.splitlines()[0] == f"Error: {told}"


@pytest.mark.parametrize(
    "url",
    ["http://localhost:abc", "http://[::1", "http://127.0.0.1:99999", "http://a b", "http://a..b", "http://xn--zz--"],
)
def test_an_address_that_is_none_is_refused(nimhost: Run, url: str) -> None:
    done = nimhost("--base-url", url, "ps")
    assert (done.exit_code, done.stderr.splitlines()[0]) == (2, f"Error: '{url}' is not the address of a server.")


# --- files ---------------------------------------------------------------------------------------------------------


def test_what_is_no_ordinary_file_is_not_uploaded(nimhost: Run, wire: FakeWire, tmp_path: Path) -> None:
    wire.put("filesets", "files")
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    done = nimhost("files", "upload", f"{tmp_path}/", "files")
    assert done.exit_code == 1
    assert done.stderr == f"Error: {tmp_path}/pipe is not an ordinary file: how long it is cannot be told.\n"
    assert wire.sent("PUT", "") == []  # nor half of the directory


def test_a_link_that_leads_nowhere_is_not_uploaded(nimhost: Run, wire: FakeWire, tmp_path: Path) -> None:
    wire.put("filesets", "files")
    (tmp_path / "weights").symlink_to("nowhere")
    done = nimhost("files", "upload", f"{tmp_path}/", "files")
    assert (done.exit_code, done.stderr) == (
        1, f"Error: Cannot read {tmp_path}/weights: No such file or directory\n"
    )  # fmt: skip


def test_a_directory_that_cannot_be_read_is_not_left_out_in_silence(
    nimhost: Run, wire: FakeWire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.put("filesets", "files")
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("x")
    scandir = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", closed)
    done = nimhost("files", "upload", f"{tmp_path}/", "files")
    assert (done.exit_code, done.stderr) == (1, f"Error: Cannot read {tmp_path}/closed: Permission denied\n")


def test_a_link_to_a_directory_is_left_out_and_that_is_said(nimhost: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    done = nimhost("files", "upload", f"{tmp_path}/", "files")
    assert done.stderr.startswith(f"Left out, as a link to a directory: {tmp_path}/elsewhere\n")


# --- what is there already -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("models", "create", "q1"), "Change it: nimhost models update q1 …   Show it: nimhost models get q1"),
        (
            ("secrets", "create", "q1", "--value", "x", "-w", "team"),
            "Change it: nimhost --workspace team secrets update q1 …   "
            "Show it: nimhost --workspace team secrets get q1",
        ),
        (("files", "upload", __file__), "To copy into it: nimhost files upload {} test-odd-input-py"),
    ],
)
def test_a_name_that_is_taken_says_what_to_do(nimhost: Run, wire: FakeWire, args: Sequence[str], hint: str) -> None:
    wire.refuse_if = lambda asked: Refusal(409, "AlreadyExists", "It exists.") if asked.method == "POST" else None
    done = nimhost(*args)
    assert (done.exit_code, done.stderr) == (1, f"Error: It exists.\nHint: {hint.format(__file__)}\n")
