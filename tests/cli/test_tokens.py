"""`nimhost tokens` where no daemon answers: the first token. With one: tests/e2e/test_access_e2e.py."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from nimhost.cli.config import mask
from nimhost.host.lock import lock_directory
from nimhost.store import Store
from nimhost.store.tokens import stored_tokens
from nimhost.tokens import Token, digest

Run = Callable[..., Result]
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    return tmp_path / "share" / "nimhost"


async def kept(directory: Path) -> list[Token]:
    store = await Store.open(directory / "nimhost.db")
    try:
        return await stored_tokens(store)
    finally:
        await store.close()


async def test_the_first_token_is_written_into_the_data_directory(nimhost: Run, directory: Path) -> None:
    made = await asyncio.to_thread(nimhost, "--base-url", NOWHERE, "tokens", "create", "me", "--scope", "admin")
    assert made.exit_code == 0, made.stderr
    text = made.stdout.strip()
    assert str(directory) in made.stderr
    (token,) = await kept(directory)
    assert (token.name, token.scopes, token.sha256) == ("me", ("admin",), digest(text.encode()).hex())
    assert not any(text.encode() in file.read_bytes() for file in directory.rglob("*") if file.is_file())
    assert directory.stat().st_mode & 0o777 == 0o700
    again = await asyncio.to_thread(nimhost, "--base-url", NOWHERE, "tokens", "create", "me", "--scope", "read")
    assert (again.exit_code, "already" in again.stderr) == (1, True)


def test_several_scopes_as_json(nimhost: Run, directory: Path) -> None:
    scopes = ("--scope", "read", "--scope", "inference")
    made = nimhost("--base-url", NOWHERE, "tokens", "create", "me", *scopes, "-f", "json")
    assert json.loads(made.stdout)["scopes"] == ["inference", "read"]


def test_for_another_machine_nothing_is_written_here(nimhost: Run, directory: Path) -> None:
    made = nimhost("--base-url", "http://nowhere.invalid:1", "tokens", "create", "me", "--scope", "read")
    assert (made.exit_code, made.stdout, directory.exists()) == (1, "", False)


def test_while_a_daemon_has_the_data_directory_nothing_is_written(nimhost: Run, directory: Path) -> None:
    lock = lock_directory(directory)
    try:
        made = nimhost("--base-url", NOWHERE, "tokens", "create", "me", "--scope", "read")
    finally:
        os.close(lock)
    assert (made.exit_code, made.stdout) == (1, "")
    assert f"pid {os.getpid()}" in made.stderr


@pytest.mark.parametrize("scopes", [(), ("--scope", "root")])
def test_a_scope_is_needed_that_there_is(nimhost: Run, directory: Path, scopes: tuple[str, ...]) -> None:
    assert nimhost("tokens", "create", "me", *scopes).exit_code == 2


def test_masked_tokens_can_be_told_apart() -> None:
    assert mask("nimhost_abcdefghijklmnop") == "nimhost_abcd…"
    assert mask("sk-0123456789abcdef") == "sk-0…"
    assert mask("short") == "…"
    assert mask(None) is None
