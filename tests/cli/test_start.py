"""How the command starts: quickly, helpfully, and with the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from nimhost import __version__
from nimhost.cli.main import COMMANDS, cli
from tests.cli.wire import FakeWire, Refusal

Run = Callable[..., Result]
HEAVY = {
    "httpx",
    "rich",
    "msgspec",
    "asyncio",
    "docker",
    "starlette",
    "uvicorn",
    "json",
    "tomllib",
    "readline",
}


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from nimhost.cli.main import cli; cli(['--help'], standalone_mode=False); "
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(eval(done.stderr))
    assert not (loaded & (HEAVY - {"json"}))
    assert "Run models" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(nimhost: Run, name: str) -> None:
    shown = nimhost(name, "--help")
    assert shown.exit_code == 0
    if name not in ("config", "version"):
        assert f"nimhost {name}" in shown.stdout.split("Example")[1]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.short_help == COMMANDS[name].sentence


def test_version(nimhost: Run) -> None:
    assert nimhost("--version").stdout == nimhost("version").stdout == f"nimhost {__version__}\n"


def test_python_m_nimhost_is_nimhost() -> None:
    done = subprocess.run([sys.executable, "-m", "nimhost", "version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"nimhost {__version__}\n"


def test_unknown_command_is_a_usage_error(nimhost: Run) -> None:
    assert nimhost("deplyo").exit_code == 2


def test_nobody_listening_says_how_to_start(nimhost: Run, wire: FakeWire) -> None:
    wire.close()
    done = nimhost("ps")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: No nimhost at {wire.url} (")
    assert done.stderr.endswith(
        "Hint: Start it with: nimhost serve   or say where it listens: --base-url URL, NIMHOST_BASE_URL\n"
    )


def test_an_error_of_the_daemon_is_shown_with_its_hint(nimhost: Run, wire: FakeWire) -> None:
    wire.refuse["GET", "/deployments"] = Refusal(507, "DiskFull", "No space left in /var", "Free 12 GB.")
    done = nimhost("ps")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "Error: No space left in /var\nHint: Free 12 GB.\n"


def test_an_address_that_is_none_is_a_usage_error(nimhost: Run) -> None:
    done = nimhost("--base-url", "localhost:8080", "ps")
    assert done.exit_code == 2
    assert "Hint: Write it like this: http://127.0.0.1:8080" in done.stderr


@pytest.mark.parametrize("before", [True, False])
def test_options_mean_the_same_before_and_after_the_command(
    nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    monkeypatch.setenv("NIMHOST_BASE_URL", "http://127.0.0.1:1")
    options = ["--base-url", wire.url, "-w", "team", "-f", "json"]
    done = nimhost(*options, "ps") if before else nimhost("ps", *options)
    assert done.stdout == "[]\n", done.stderr
    assert "/workspaces/team/" in wire.asked[0].path


def test_config_set_is_what_later_commands_use(
    nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NIMHOST_BASE_URL")
    assert nimhost("config", "set", "--base-url", wire.url, "-w", "team").exit_code == 0
    assert nimhost("config", "set", "--access-token", "-", stdin="canary-0123456789\n").exit_code == 0
    assert nimhost("ps").exit_code == 0
    assert wire.asked[-1].headers["authorization"] == "Bearer canary-0123456789"
    assert "/workspaces/team/" in wire.asked[-1].path
    shown = nimhost("config", "view").stdout
    assert "cana…" in shown
    assert "0123456789" not in shown
    assert "0123456789" not in nimhost("config", "view", "-f", "yaml").stdout


def test_config_set_of_nothing_is_a_usage_error(nimhost: Run) -> None:
    assert nimhost("config", "set").exit_code == 2


def test_serve_hands_its_flags_to_the_daemon(nimhost: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Daemon:
        @staticmethod
        def run(config_file: str | None, overrides: dict[str, object]) -> int:
            asked.append((config_file, overrides))
            return 3

    monkeypatch.setitem(sys.modules, "nimhost.daemon", Daemon)
    assert nimhost("serve", "--port", "9000", "--config", "x.toml").exit_code == 3
    assert asked == [("x.toml", {"server.host": None, "server.port": 9000, "server.data_dir": None})]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_scripts_are_printed(nimhost: Run, shell: str) -> None:
    assert "_NIMHOST_COMPLETE" in nimhost("completion", shell).stdout


def complete(*words: str) -> list[str]:
    env = {
        "COMP_WORDS": " ".join(["nimhost", *words]),
        "COMP_CWORD": str(len(words)),
        "_NIMHOST_COMPLETE": "zsh_complete",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from nimhost.cli.main import main; main()"],
        env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.splitlines()[1::3]


def test_names_of_deployments_are_completed(wire: FakeWire) -> None:
    wire.put("deployments", "alpha", config="c1")
    wire.put("deployments", "beta", config="c1")
    assert complete("rm", "al") == ["alpha"]
    assert complete("logs", "") == ["alpha", "beta"]
    assert "deploy" in complete("de")


def test_completion_is_silent_without_a_daemon(wire: FakeWire) -> None:
    wire.close()
    assert complete("rm", "al") == []


def test_a_misspelt_command_is_answered_with_the_nearest_one(nimhost: Run) -> None:
    done = nimhost("depoly", "x")
    assert done.exit_code == 2
    assert "No such command 'depoly'. Did you mean deploy?" in done.stderr
