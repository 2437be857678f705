"""Where the daemon is and how to speak to it: flags > environment > `client.toml` > defaults. Standard library only."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from nimhost.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8080"

VARIABLES = {
    "base_url": ("NIMHOST_BASE_URL", "NMP_BASE_URL"),
    "workspace": ("NIMHOST_WORKSPACE", "NMP_WORKSPACE"),
    "access_token": ("NIMHOST_ACCESS_TOKEN", "NMP_ACCESS_TOKEN"),
    "output_format": ("NIMHOST_OUTPUT_FORMAT",),
}
"""Environment variables per setting, the first one that is set wins."""


class ClientSettings(NamedTuple):
    base_url: str = DEFAULT_URL
    workspace: str = "default"
    access_token: str | None = None
    output_format: str | None = None


def settings_path(env: Mapping[str, str]) -> Path:
    return Path(
        env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "~")).expanduser() / ".config", "nimhost/client.toml"
    )


def load(flags: Mapping[str, str | None] | None = None, env: Mapping[str, str] | None = None) -> ClientSettings:
    """The settings in force. Raises ConfigError for a file that cannot be read and an address that is none."""
    env = os.environ if env is None else env
    return resolve(flags or {}, env, read_stored(settings_path(env)))


def resolve(flags: Mapping[str, str | None], env: Mapping[str, str], stored: Mapping[str, str]) -> ClientSettings:
    chosen = {}
    for name, variables in VARIABLES.items():
        candidates = (flags.get(name), *(env.get(variable) for variable in variables), stored.get(name))
        if value := next((candidate for candidate in candidates if candidate), None):
            chosen[name] = value
    settings = ClientSettings(**chosen)
    token = settings.access_token or ""
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(
            "The access token has characters that no token has.", "Copy it again: nimhost config set --access-token -"
        )
    return settings._replace(base_url=check_url(settings.base_url))


def check_url(text: str) -> str:
    """`text` without a trailing slash, or the `/v1` that OpenAI clients have there.

    Raises ConfigError if it is not an http(s) URL.
    """
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in text
    except ValueError:  # brackets that do not match, a port that is no number or too large
        good = False
    if not good:
        raise not_an_address(text)
    return text.rstrip("/").removesuffix("/v1")


def not_an_address(text: str) -> ConfigError:
    return ConfigError(f"'{text}' is not the address of a server.", f"Write it like this: {DEFAULT_URL}")


def is_loopback(url: str) -> bool:
    """Whether it is an address of this machine that no other reaches."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_stored(path: Path) -> dict[str, str]:
    """What `config set` wrote; empty if there is no such file. Raises ConfigError if it cannot be read."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the client's settings: {error}") from None
    import tomllib  # here, because most machines have no such file

    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", f"Correct it, or start afresh: rm {path}") from None
    return {name: str(value) for name, value in found.items()}


def write_stored(path: Path, changes: Mapping[str, str]) -> None:
    """Put `changes` into the file (an empty value removes a setting): whole or not at all, readable by its owner only.

    Raises ConfigError when it cannot be written.
    """
    stored = {name: value for name, value in {**read_stored(path), **changes}.items() if value}
    text = "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in stored.items())
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ConfigError(f"Cannot write the client's settings: {error}") from None
