"""Settings of the daemon: defaults < `nimhost.toml` < environment < flags. Decoded once, passed explicitly.

`nimhost.toml.example` lists every setting with its meaning; a test keeps the two equal.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field

from nimhost.errors import ConfigError
from nimhost.tokens import hash_entry

Json = dict[str, Any]


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[table]` of the settings file."""


class Server(Table, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: int = 8080
    data_dir: str = ""
    allowed_hosts: list[str] = []
    allowed_origins: list[str] = []
    api_tokens: list[str] = []
    drain_timeout_s: float = 30.0


class Docker(Table, frozen=True, kw_only=True):
    host: str = ""
    shm_gib: float = 16.0
    ulimits: dict[str, int] = {}
    stop_timeout_s: int = 10
    pull_stall_timeout_s: float = 120.0


class SimulatedGpu(Table, frozen=True, kw_only=True):
    name: str
    memory_gib: float
    uuid: str = ""
    driver: str = ""
    cuda: str = ""
    used_gib: float = 0.0
    processes: list[Json] = []
    links: dict[str, str] = {}


class Gpus(Table, frozen=True, kw_only=True):
    devices: list[str] = []
    simulated: list[SimulatedGpu] = []


class Image(Table, frozen=True, kw_only=True):
    image: str


class Engines(Table, frozen=True, kw_only=True):
    nim: Image = Image(image="nvcr.io/nim/nvidia/llm-nim:1.13.1")
    vllm: Image = Image(image="vllm/vllm-openai:v0.33.0")


class Weights(Table, frozen=True, kw_only=True):
    cache_dir: str = ""
    endpoint: str = "https://huggingface.co"
    offline: bool = False


class Deployments(Table, frozen=True, kw_only=True):
    start_timeout_s: float = 7200.0
    start_limit: int = 3
    restart_limit: int = 5
    restart_backoff_s: float = 2.0
    unhealthy_restart_s: float = 120.0


class Gateway(Table, frozen=True, kw_only=True):
    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 600.0
    idle_timeout_s: float = 300.0
    keepalive_comments: bool = False


class ToolCallPlugin(Table, frozen=True, kw_only=True):
    enabled: bool = False


class TrustRemoteCode(Table, frozen=True, kw_only=True):
    allow: list[str] = field(default_factory=lambda: ["nvidia/.*"])


class Models(Table, frozen=True, kw_only=True):
    tool_call_plugin: ToolCallPlugin = ToolCallPlugin()
    trust_remote_code: TrustRemoteCode = TrustRemoteCode()


class Files(Table, frozen=True, kw_only=True):
    allow_local_paths: bool = True


class Settings(Table, frozen=True, kw_only=True):
    server: Server = Server()
    docker: Docker = Docker()
    gpus: Gpus = Gpus()
    engines: Engines = Engines()
    weights: Weights = Weights()
    deployments: Deployments = Deployments()
    gateway: Gateway = Gateway()
    models: Models = Models()
    files: Files = Files()


def load(
    config_file: str | None = None, overrides: Mapping[str, object] | None = None, env: Mapping[str, str] | None = None
) -> Settings:
    """The settings in force. `overrides` are flags: `{"server.port": 9000}`; None values are flags not given.

    Raises ConfigError, which names the file or variable at fault.
    """
    env = os.environ if env is None else env
    tree: Json = {}
    path = find_file(config_file, env)
    if path is not None:
        _merge(tree, _read(path), str(path))
    for source, keys, value in _from_env(env):
        _put(tree, keys, value, source)
    for name, value in (overrides or {}).items():
        if value is not None:
            _put(tree, name.split("."), value, f"--{name.rpartition('.')[2].replace('_', '-')}")
    try:
        return msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        origin = str(path) if path else "the environment or flags"
        raise ConfigError(f"Settings are wrong: {_plain(error)} (from {origin})", _nearest(str(error))) from None


def find_file(config_file: str | None, env: Mapping[str, str]) -> Path | None:
    """`--config`, else `./nimhost.toml`, else `$XDG_CONFIG_HOME/nimhost/nimhost.toml`, else none."""
    if config_file is not None:
        if not Path(config_file).is_file():
            raise ConfigError(f"There is no settings file at {config_file}.")
        return Path(config_file)
    candidates = (Path("nimhost.toml"), config_dir(env) / "nimhost.toml")
    return next((path for path in candidates if path.is_file()), None)


def config_dir(env: Mapping[str, str]) -> Path:
    return Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "~")).expanduser() / ".config") / "nimhost"


def data_dir(settings: Settings, env: Mapping[str, str] | None = None) -> Path:
    env = os.environ if env is None else env
    if settings.server.data_dir:
        return Path(settings.server.data_dir).expanduser().absolute()
    share = env.get("XDG_DATA_HOME") or Path(env.get("HOME", "~")).expanduser() / ".local" / "share"
    return Path(share) / "nimhost"


def ngc_api_key(env: Mapping[str, str] | None = None) -> str | None:
    """The key for NVIDIA's registry and hosted models that the environment has, if any."""
    return (os.environ if env is None else env).get("NGC_API_KEY") or None


CLIENT_VARIABLES = frozenset({"NIMHOST_BASE_URL", "NIMHOST_WORKSPACE", "NIMHOST_ACCESS_TOKEN", "NIMHOST_OUTPUT_FORMAT"})


def _from_env(env: Mapping[str, str]) -> list[tuple[str, list[str], object]]:
    """`NIMHOST_GATEWAY__IDLE_TIMEOUT_S=60`: a TOML value, or a raw string where a string is wanted."""
    found = []
    for name, text in sorted(env.items()):
        if name.startswith("NIMHOST_") and "__" in name and name not in CLIENT_VARIABLES:
            keys = name.removeprefix("NIMHOST_").lower().split("__")
            value = text if _type_at(keys) is str else _toml_value(text)
            if keys == ["server", "api_tokens"] and isinstance(value, list):
                value = [hash_entry(entry) if isinstance(entry, str) else entry for entry in value]
            found.append((name, keys, value))
    return found


def _type_at(keys: list[str]) -> object:
    """The declared type of a setting; None where there is no such setting (decoding will say so)."""
    current: object = Settings
    for key in keys:
        if not (isinstance(current, type) and issubclass(current, Struct)):
            return None
        current = {f.name: f.type for f in msgspec.structs.fields(current)}.get(key)
    return current


def _toml_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read(path: Path) -> Json:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read settings from {path}: {error}") from None


def _merge(tree: Json, more: Json, source: str) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value, source)
        else:
            tree[key] = value


def _put(tree: Json, keys: list[str], value: object, source: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{source}: '{key}' is a value, not a table.")
    tree[keys[-1]] = value


def _plain(error: msgspec.ValidationError) -> str:
    return str(error).replace("`$.", "`").replace("Object contains unknown field", "there is no setting")


def _nearest(message: str) -> str | None:
    """A hint for a misspelt setting."""
    if "unknown field" not in message:
        return None
    wrong = message.split("`")[1]
    near = difflib.get_close_matches(wrong, _all_keys(Settings), n=1)
    return f"Did you mean '{near[0]}'?" if near else "See nimhost.toml.example for every setting."


def _all_keys(cls: type[Struct]) -> list[str]:
    keys = []
    for f in msgspec.structs.fields(cls):
        keys.append(f.name)
        if isinstance(f.type, type) and issubclass(f.type, Struct):
            keys += _all_keys(f.type)
    return keys
