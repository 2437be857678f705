"""What a newcomer is told: what happens, what was meant, and what to type next."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

from nimhost.cli.examples import leaves
from nimhost.cli.main import COMMANDS, cli
from nimhost.cli.missing import find_missing
from nimhost.cli.model_options import in_flags
from nimhost.cli.target import parse_target
from nimhost.errors import BadRequest, NotReady
from nimhost.kinds import KINDS
from tests.cli.test_start import complete
from tests.cli.wire import FakeWire, Refusal, snapshot, sse

Run = Callable[..., Result]
LOADING = {"image": None, "weights": None, "engine": {"message": "/health answers 503"}}


# --- what is not there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_a_404_says_is_missing_can_be_read_out_of_it(kind: Any) -> None:
    workspace = "team" if kind.in_workspace else ""
    assert find_missing(kind.not_found("team", "x.y-1").message) == (kind, workspace, "x.y-1")


@pytest.mark.parametrize("message", ["Not Found", "There is no API token 'x'.", "Deployment 'a' not found"])
def test_other_words_are_left_alone(message: str) -> None:
    assert find_missing(message) is None


def test_a_misspelt_name_is_answered_with_the_nearest_ones(nimhost: Run, wire: FakeWire) -> None:
    for name in ("qwen3", "qwen2", "llama"):
        wire.put("deployments", name, config="c1")
    done = nimhost("logs", "qwen")
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: Deployment 'default/qwen' not found\n"
        "Hint: Did you mean qwen3 or qwen2? See which there are: nimhost ps\n"
    )
    assert (
        "nimhost inference deployment-configs list" in nimhost("inference", "deployment-configs", "get", "nope").stderr
    )


def test_the_next_step_names_the_workspace_that_was_asked(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "qwen3", config="c1", workspace="team")
    said = nimhost("stop", "team/qwen").stderr
    assert "Did you mean qwen3? See which there are: nimhost ps --workspace team\n" in said
    assert nimhost("stop", "qwen", "-w", "team").stderr.endswith("See which there are: nimhost --workspace team ps\n")


def test_a_hint_of_the_daemon_s_own_is_the_one_that_is_shown(nimhost: Run, wire: FakeWire) -> None:
    wire.refuse["GET", "/deployments/q1"] = Refusal(404, "NotFound", "Deployment 'default/q1' not found", "Look there.")
    assert nimhost("inference", "deployments", "get", "q1").stderr.endswith("\nHint: Look there.\n")


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("File 'a b.txt' not found in fileset 'default/fs'", "nimhost files list fs"),
        ("Deployment config 'default/c1' has no version 7", "nimhost inference deployment-configs versions list c1"),
    ],
)
def test_what_is_in_something_is_listed_there(nimhost: Run, wire: FakeWire, message: str, hint: str) -> None:
    wire.refuse["GET", "/deployments"] = Refusal(404, "NotFound", message)
    assert nimhost("ps").stderr == f"Error: {message}\nHint: See which there are: {hint}\n"


def test_an_upload_into_nothing_says_how_to_make_it_and_sends_nothing(
    nimhost: Run, wire: FakeWire, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("x")
    done = nimhost("files", "upload", str(tmp_path / "a.txt"), "team/my-lora")
    assert done.exit_code == 1
    assert "Make it first: nimhost files filesets create my-lora --workspace team\n" in done.stderr
    assert [asked.method for asked in wire.asked] == ["GET"]


# --- while an engine starts ----------------------------------------------------------------------------------------


def test_ps_shows_the_last_probe_of_an_engine_that_loads(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "q1", config="c1", status="PENDING", status_message="Loading.", progress=LOADING)
    assert "Loading. Last probe: /health answers 503.\n" in nimhost("ps").stdout


def test_wait_prints_what_the_probe_finds_once(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "q1", config="c1", status="PENDING", status_message="Loading.", progress=LOADING)
    done = nimhost("wait", "inference", "deployment", "q1", "--timeout", "1.2")
    assert done.exit_code == 1
    assert len([a for a in wire.asked if a.path.endswith("/deployments/q1")]) > 1
    assert done.stdout.count("last probe: /health answers 503\n") == 1
    assert "PENDING: Loading. Last probe: /health answers 503." in done.stderr
    done = nimhost("wait", "q1", "--timeout", "0.2")
    assert done.exit_code == 1
    assert done.stdout.count("engine    /health answers 503") == 1
    assert "q1 is not ready after 0.2 s." in done.stderr


def test_start_says_what_it_did_without_waiting(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("on", "default/on")
    wire.put("deployments", "off", config="c1", desired="stopped", status="PENDING", status_message="Stopped.")
    wire.put("deployments", "loading", config="c1", status="PENDING", status_message="Loading.")
    assert nimhost("start", "off", "on", "loading", "--no-wait").stdout == (
        "Starting off. Follow it with: nimhost wait off\n"
        "on is running already.\n"
        "loading is starting already. Follow it with: nimhost wait loading\n"
    )
    assert [a.path.rpartition("/")[0].rpartition("/")[2] for a in wire.asked if a.method == "POST"] == ["off"]


def test_start_without_waiting_gives_programs_the_deployment(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("on", "default/on")
    assert json.loads(nimhost("start", "on", "--no-wait", "-f", "json").stdout)["name"] == "on"


def test_start_of_a_running_one_says_so(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.script = [{"status": "READY", "status_message": "Serving", "progress": None, "desired": "running"}]
    assert nimhost("start", "q1").stdout.startswith("q1 is READY already.\n")


def test_one_that_cannot_be_started_does_not_keep_the_others_waiting(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.script = [{"status": "READY", "status_message": "Serving", "progress": None, "desired": "running"}]
    done = nimhost("start", "nope", "q1")
    assert done.exit_code == 1
    assert "q1 is READY already." in done.stdout
    assert "'default/nope' not found" in done.stderr


# --- providers without a key ---------------------------------------------------------------------------------------


def test_a_provider_without_a_key_is_no_failure(nimhost: Run, wire: FakeWire) -> None:
    said = "No key yet: set it with: nimhost secrets create ngc-api-key --from-file - --workspace system"
    wire.put("providers", "nvidia-build", workspace="system", host_url="http://x", status="ERROR", status_message=said,
             served_models=[])  # fmt: skip
    shown = nimhost("ps", "-a").stdout
    assert "NO KEY" in shown
    assert "ERROR" not in shown
    assert said in shown


# --- chat ----------------------------------------------------------------------------------------------------------


def test_every_answer_is_asked_for_with_its_usage(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = sse("ok", usage={"total_tokens": 7})
    assert json.loads(nimhost("chat", "q1", "Hello!", "-f", "json").stdout)["usage"] == {"total_tokens": 7}
    assert wire.asked[-1].body["stream_options"] == {"include_usage": True}
    assert nimhost("chat", "q1", "Hello!").stdout == "ok\n"
    assert wire.asked[-1].body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("status", [400, 422])
def test_an_engine_that_does_not_know_about_usage_answers_without(nimhost: Run, wire: FakeWire, status: int) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = sse("ok")
    wire.refuse_if = lambda asked: (
        Refusal(status, "", "Unrecognized request argument: stream_options")
        if asked.body and "stream_options" in asked.body
        else None
    )
    done = nimhost("chat", "q1", "Hello!", "-f", "json")
    assert (done.exit_code, json.loads(done.stdout)["content"]) == (0, "ok")
    assert json.loads(done.stdout)["usage"] is None


def test_one_argument_with_a_blank_is_the_prompt(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = sse("ok")
    assert nimhost("chat", "Why is it so?").stdout == "ok\n"
    assert wire.asked[-1].body["messages"] == [{"role": "user", "content": "Why is it so?"}]


@pytest.mark.parametrize(("piped", "told"), [(b"a diff", True), (b"", False)])
def test_input_beside_a_prompt_is_not_read_and_that_is_said(wire: FakeWire, piped: bytes, told: bool) -> None:
    wire.ready("q1", "default/q1")
    wire.answer = sse("ok")
    read, write = os.pipe()
    os.write(write, piped)
    try:  # the pipe stays open: who would read it to its end would wait for ever
        command = [sys.executable, "-m", "nimhost", "chat", "q1", "Hello!"]
        done = subprocess.run(command, stdin=read, capture_output=True, text=True, timeout=60, check=True)
    finally:
        os.close(read)
        os.close(write)
    assert done.stdout == "ok\n"
    assert ("standard input was not read" in done.stderr) == told


# --- what was meant ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "folder"), [("./w/model.safetensors", "./w"), ("model.gguf", "."), ("/m/x", "/m")])
def test_a_file_is_not_deployed_but_its_directory(text: str, folder: str) -> None:
    with pytest.raises(BadRequest, match=r"is a file: the weights of a model are a directory") as caught:
        parse_target(text, is_dir=False, is_file=True)
    assert caught.value.hint == f"Name its directory: nimhost deploy {folder}"


def test_deploy_of_a_file_sends_nothing(nimhost: Run, wire: FakeWire, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("x")
    done = nimhost("deploy", str(file))
    assert (done.exit_code, wire.asked) == (1, [])
    assert f"{file} is a file" in done.stderr


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("executor_config.gpu: config 'meta-x' asks for 3, this machine has 2 GPUs.",
         "--gpu asks for 3, this machine has 2 GPUs."),
        ("executor_config.gpu_memory_gib: 90 GiB are asked for", "--gpu-memory: 90 GiB are asked for"),
        ("executor_config.additional_envs.A+B: 'A+B' cannot be a name", "--env: 'A+B' cannot be a name"),
        ("storage.repo_id: 'a/b--c' is not the id of a repository", "MODEL: 'a/b--c' is not the id of a repository"),
        ("Not enough of gpu", "Not enough of gpu"),
    ],
)  # fmt: skip
def test_fields_of_the_wire_are_told_as_what_was_typed(said: str, told: str) -> None:
    assert in_flags(said) == told


def test_deploy_speaks_of_its_options(nimhost: Run, wire: FakeWire) -> None:
    said = "executor_config.gpu: config 'm' asks for 3, this machine has 2 GPUs."
    wire.refuse["POST", "/deployments"] = Refusal(400, "BadRequest", said, "See: nimhost gpus")
    done = nimhost("deploy", "owner/m1", "--gpu", "3")
    assert done.stderr == "Error: --gpu asks for 3, this machine has 2 GPUs.\nHint: See: nimhost gpus\n"


def test_an_output_format_that_is_none_is_refused(
    nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIMHOST_OUTPUT_FORMAT", "jsn")
    done = nimhost("ps")
    assert (done.exit_code, done.stdout, wire.asked) == (2, "", [])
    assert "'jsn' is not an output format: there are table, json, yaml, raw." in done.stderr
    assert "NIMHOST_OUTPUT_FORMAT" in done.stderr
    monkeypatch.setenv("NIMHOST_OUTPUT_FORMAT", "json")
    assert nimhost("ps").stdout == "[]\n"


def test_help_of_serve_says_where_settings_are_looked_for(nimhost: Run) -> None:
    shown = " ".join(nimhost("serve", "--help").stdout.split())
    assert "[default: ./nimhost.toml, else ~/.config/nimhost/nimhost.toml]" in shown


def test_help_says_what_exit_codes_mean_and_how_to_get_completion(nimhost: Run) -> None:
    shown = nimhost("--help").stdout
    assert "Exit codes:  0 done, 1 failed or refused, 2 wrong usage or settings, 130 interrupted" in shown
    assert "nimhost completion --help" in shown


# --- examples ------------------------------------------------------------------------------------------------------


def _leaves() -> list[tuple[tuple[str, ...], click.Command]]:
    found = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        found += list(leaves(command, (name,)))
    return found


LEAVES = _leaves()


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_every_command_has_an_example(path: tuple[str, ...], command: click.Command) -> None:
    said = (command.help or "").partition("Example")[2]
    assert f"nimhost {' '.join(path)}" in said


GENERATED = [leaf for leaf in LEAVES if len(leaf[0]) > 1 and leaf[0][0] not in ("tokens", "config", "requests")]


@pytest.mark.parametrize("path", [p for p, _ in GENERATED], ids=[" ".join(p) for p, _ in GENERATED])
def test_every_example_of_a_resource_gets_as_far_as_the_daemon(
    nimhost: Run, monkeypatch: pytest.MonkeyPatch, path: tuple[str, ...]
) -> None:
    class Reached:
        def __init__(self, *_: object, **__: object) -> None:
            raise NotReady("reached")

    monkeypatch.setattr("nimhost.client.Client", Reached, raising=False)
    command = dict(LEAVES)[path]
    (line,) = [line.strip() for line in (command.help or "").splitlines() if line.strip().startswith("nimhost ")][:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parent)
        here = {"key.txt": __file__, "./my-lora/": f"{Path(__file__).parent}/"}
        words = [here.get(word, word) for word in shlex.split(line)[1:]]
        assert nimhost(*words).stderr == "Error: reached\n"


README = (Path(__file__).parents[2] / "README.md").read_text()
GROUPS = sorted({tuple(kind.cli.split()[:n]) for kind in KINDS.values() for n in (1, 2)})
POINTED_TO = [command.split() for command in re.findall(r"`nimhost ([a-z ]+) --help`", README)]


@pytest.mark.parametrize("path", POINTED_TO, ids=" ".join)
def test_where_the_readme_points_to_there_are_examples(nimhost: Run, path: list[str]) -> None:
    assert "Example" in nimhost(*path, "--help").stdout


@pytest.mark.parametrize("path", GROUPS, ids=" ".join)
def test_every_example_of_a_group_gets_as_far_as_the_daemon(
    nimhost: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: tuple[str, ...]
) -> None:
    def reached(*_: object, **__: object) -> None:
        raise NotReady("reached")

    shown = nimhost(*path, "--help").stdout.replace("\\\n", "")
    monkeypatch.setattr("nimhost.client.Client", reached, raising=False)
    monkeypatch.chdir(tmp_path)
    for directory in re.findall(r"\./[a-z-]+/", shown):
        Path(directory).mkdir()
        Path(directory, "file").touch()
    lines = [line.strip() for line in shown.partition("Example")[2].splitlines() if line.startswith("    nimhost ")]
    for line in lines:
        assert nimhost(*shlex.split(line)[1:], stdin="key").stderr == "Error: reached\n", line


def test_json_that_is_none_is_shown_as_it_came(nimhost: Run, wire: FakeWire) -> None:
    wire.answer, wire.answer_type = [b'{"half": '], "application/json"
    done = nimhost("inference", "gateway", "provider", "post", "v1/chat/completions", "up", "--body", "{}")
    assert (done.exit_code, done.stdout) == (0, '{"half": ')


def test_one_that_is_going_away_is_not_started(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "q1", config="c1", status="DELETING", status_message="Going.")
    wire.refuse["POST", "/start"] = Refusal(409, "Conflict", "Deployment 'default/q1' is being deleted.")
    done = nimhost("start", "q1", "--no-wait")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is being deleted" in done.stderr


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["chat", "q"], ["qwen", "q-model"]),
        (["models", "get", "q"], ["q-model"]),
        (["inference", "deployments", "delete", ""], ["qwen"]),
        (["adapters", "create", "math", "--model", "q"], ["q-model"]),
        (["adapters", "create", "math", "--fileset", ""], ["lora"]),
        (["files", "list", "l"], ["lora"]),
        (["requests", "--model", "q"], ["q-model"]),
    ],
)
def test_names_of_what_there_is_are_completed(wire: FakeWire, words: list[str], names: list[str]) -> None:
    wire.put("deployments", "qwen", config="c1")
    wire.put("models", "q-model")
    wire.put("filesets", "lora")
    assert complete(*words) == names


def test_a_time_limit_holds_while_there_is_news_all_the_time(nimhost: Run, wire: FakeWire) -> None:
    class Download:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for done_bytes in range(100):
                wire.closing.wait(0.05)
                yield snapshot("PENDING", "Downloading", weights={"done_bytes": done_bytes, "total_bytes": 10**9})
            yield snapshot("READY", "Serving")  # for a command that would watch it to its end

    wire.script = Download()  # type: ignore[assignment]
    done = nimhost("deploy", "owner/q1", "--name", "q1", "--timeout", "0.5")
    assert done.exit_code == 1
    assert "q1 is not ready after 0.5 s." in done.stderr


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_every_option_says_what_it_is(path: tuple[str, ...], command: click.Command) -> None:
    options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    assert [option.opts[-1] for option in options if not option.help] == []
