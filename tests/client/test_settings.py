"""Where the client finds the daemon."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from nimhost.client import Client
from nimhost.client.settings import (
    DEFAULT_URL,
    check_url,
    is_loopback,
    load,
    read_stored,
    resolve,
    settings_path,
    write_stored,
)
from nimhost.errors import ConfigError

ALL = {"NIMHOST_BASE_URL": "http://env", "NMP_BASE_URL": "http://reference"}


@pytest.mark.parametrize(
    ("flags", "env", "stored", "found"),
    [
        ({}, {}, {}, DEFAULT_URL),
        ({}, {}, {"base_url": "http://file/"}, "http://file"),
        ({}, {"NMP_BASE_URL": "http://reference"}, {"base_url": "http://file"}, "http://reference"),
        ({}, ALL, {"base_url": "http://file"}, "http://env"),
        ({"base_url": "https://flag"}, ALL, {"base_url": "http://file"}, "https://flag"),
        ({"base_url": None}, {"NIMHOST_BASE_URL": ""}, {}, DEFAULT_URL),
    ],
)
def test_flags_win_over_environment_over_file(
    flags: dict[str, str | None], env: dict[str, str], stored: dict[str, str], found: str
) -> None:
    assert resolve(flags, env, stored).base_url == found


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("workspace", ("NIMHOST_WORKSPACE", "NMP_WORKSPACE")),
        ("access_token", ("NIMHOST_ACCESS_TOKEN", "NMP_ACCESS_TOKEN")),
    ],
)
def test_our_variables_win_over_the_reference_s(name: str, variables: tuple[str, str]) -> None:
    ours, theirs = variables
    assert getattr(resolve({}, {theirs: "b1"}, {}), name) == "b1"
    assert getattr(resolve({}, {ours: "a1", theirs: "b1"}, {}), name) == "a1"


@pytest.mark.parametrize("text", ["localhost:8080", "ftp://x", "http://", "x"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not the address") as caught:
        check_url(text)
    assert DEFAULT_URL in (caught.value.hint or "")


def test_the_file_is_the_owner_s_alone_and_keeps_what_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "a" / "client.toml"
    write_stored(path, {"access_token": 'se"cr\\et\n', "workspace": "größe"})
    write_stored(path, {"workspace": "", "base_url": "http://x"})
    assert read_stored(path) == {"access_token": 'se"cr\\et\n', "base_url": "http://x"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["client.toml"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "client.toml"
    write_stored(path, {"workspace": "old"})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_stored(path, {"workspace": "new"})
    assert read_stored(path) == {"workspace": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["client.toml"]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    settings_path(env).parent.mkdir()
    settings_path(env).write_text("base_url = ")
    with pytest.raises(ConfigError, match=r"client\.toml is not valid TOML"):
        load({}, env)


@pytest.mark.parametrize("token", ["tökén", "a\nb", "a\x00"])
def test_a_token_that_no_header_can_carry_is_a_wrong_setting(token: str) -> None:
    with pytest.raises(ConfigError, match="access token") as caught:
        resolve({}, {"NIMHOST_ACCESS_TOKEN": token}, {})
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:8080", True),
        ("http://127.8.9.10", True),
        ("http://[::1]:8080", True),
        ("http://localhost:8080", True),
        ("http://localhost.example.com", False),
        ("http://127.example.com", False),
        ("http://10.0.0.1:8080", False),
        ("https://gpu-box", False),
    ],
)
def test_what_only_this_machine_reaches(url: str, loopback: bool) -> None:
    assert is_loopback(url) is loopback


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", "socks5://127.0.0.1:9", "http://a:no-port"])
def test_a_proxy_that_cannot_be_used_is_a_wrong_setting(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Desktops set such for every program."""
    monkeypatch.setenv("ALL_PROXY", proxy)
    Client("http://127.0.0.1:8080").close()  # it is for the world outside
    with pytest.raises(ConfigError, match="proxy") as caught:
        Client("http://gpu-box:8080")
    assert "ALL_PROXY" in (caught.value.hint or "")
