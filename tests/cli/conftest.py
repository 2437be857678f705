from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nimhost.cli.main import cli
from tests.cli.terminal import Terminal
from tests.cli.wire import FakeWire


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the person's who runs the tests."""
    for name in [name for name in os.environ if name.startswith(("NIMHOST_", "NMP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def wire(_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWire]:
    """A daemon's stand-in, which clients find without being told."""
    server = FakeWire()
    monkeypatch.setenv("NIMHOST_BASE_URL", server.url)
    yield server
    server.close()


@pytest.fixture
def nimhost() -> Callable[..., Result]:
    """Run a command as if it were piped: `nimhost("ps", "-f", "json").stdout`."""

    def run(*args: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(cli, args, input=stdin, prog_name="nimhost", catch_exceptions=False)

    return run


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Run a command in a terminal of its own."""
    opened: list[Terminal] = []

    def run(*args: str, columns: int = 100) -> Terminal:
        opened.append(Terminal([sys.executable, "-m", "nimhost", *args], columns))
        return opened[-1]

    yield run
    for one in opened:
        one.close()
