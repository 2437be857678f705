"""Settings of the daemon: defaults < `nimhost.toml` < environment < flags. Decoded once, passed explicitly.

`nimhost.toml.example` lists every setting with its meaning; a test keeps the two equal.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import msgspec
from msgspec import Meta, Struct, field

from nimhost.errors import ConfigError
from nimhost.tokens import hash_entry

Json = dict[str, Any]
ALL = "See nimhost.toml.example for every setting."
Size = Annotated[float, Meta(ge=0)]
"""Of memory, or of time: never less than nothing."""
Finite = Annotated[float, Meta(ge=0, le=1e9)]


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[table]` of the settings file."""


class Server(Table, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    data_dir: str = ""
    allowed_hosts: list[str] = []
    allowed_origins: list[str] = []
    api_tokens: list[str] = []
    drain_timeout_s: Finite = 30.0


class Docker(Table, frozen=True, kw_only=True):
    host: str = ""
    shm_gib: Finite = 16.0
    ulimits: dict[str, int] = {}
    stop_timeout_s: Annotated[int, Meta(ge=0)] = 10
    pull_stall_timeout_s: Size = 120.0


class SimulatedGpu(Table, frozen=True, kw_only=True):
    name: str
    memory_gib: Annotated[float, Meta(gt=0, le=1e9)]
    uuid: str = ""
    driver: str = ""
    cuda: str = ""
    used_gib: Finite = 0.0
    processes: list[Json] = []
    links: dict[str, str] = {}


class Gpus(Table, frozen=True, kw_only=True):
    devices: list[Annotated[str, Meta(pattern=r"\S")]] = []
    simulated: list[SimulatedGpu] = []


class Image(Table, frozen=True, kw_only=True):
    image: Annotated[str, Meta(pattern=r"\S")]


class Engines(Table, frozen=True, kw_only=True):
    nim: Image = Image(image="nvcr.io/nim/nvidia/llm-nim:1.13.1")
    vllm: Image = Image(image="vllm/vllm-openai:v0.33.0")


class Weights(Table, frozen=True, kw_only=True):
    cache_dir: str = ""
    endpoint: str = "https://huggingface.co"
    offline: bool = False


class Deployments(Table, frozen=True, kw_only=True):
    start_timeout_s: Size = 7200.0
    start_limit: Annotated[int, Meta(ge=0)] = 3
    restart_limit: Annotated[int, Meta(ge=0)] = 5
    restart_backoff_s: Size = 2.0
    unhealthy_restart_s: Size = 120.0
    drain_timeout_s: Size = 60.0


class Gateway(Table, frozen=True, kw_only=True):
    connect_timeout_s: Size = 5.0
    first_byte_timeout_s: Size = 600.0
    idle_timeout_s: Size = 300.0
    keepalive_comments: bool = False
    log_bodies: bool = False


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
    path = find_file(config_file, env)
    tree = _read(path) if path is not None else {}
    given = _from_env(env)
    for name, value in (overrides or {}).items():
        if value is not None:
            given.append((f"--{name.rpartition('.')[2].replace('_', '-')}", name.split("."), value))
    for source, keys, value in given:
        _put(tree, keys, value, source)
    try:
        return msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise _explain(str(error), {".".join(keys): source for source, keys, _ in given}, path) from None


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


def _from_env(env: Mapping[str, str]) -> list[tuple[str, list[str], object]]:
    """`NIMHOST_GATEWAY__IDLE_TIMEOUT_S=60`: a TOML value, or a raw string where a string is wanted.

    Raises ConfigError for the name of a setting that is spelt with single underscores.
    """
    found = []
    flat = {name.replace("__", "_"): name for name in map(_variable, _all_settings(Settings))}
    for name, text in sorted(env.items()):
        if (meant := flat.get(name, name)) != name:
            raise ConfigError(f"The environment variable {name} is not a setting.", f"Did you mean {meant}?")
        if name.startswith("NIMHOST_") and "__" in name:  # the client's own have none
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
    return get_args(current)[0] if get_origin(current) is Annotated else current


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


def _put(tree: Json, keys: list[str], value: object, source: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{source}: '{key}' is a value, not a table.")
    tree[keys[-1]] = value


def _explain(message: str, sources: Mapping[str, str], path: Path | None) -> ConfigError:
    """What msgspec says about the settings, with where that was set and the nearest name for one that does not exist.

    `sources`: `table.key` -> the variable or flag that set it; everything else is from the file.
    """
    text, _, place = message.partition(" - at `$")
    keys = [key.partition("[")[0] for key in place.removesuffix("`").split(".") if key]
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", text)
    if unknown:
        keys.append(unknown[1])
    where = ".".join(keys)
    setting, source = next((item for item in sources.items() if _is_about(item[0], where)), ("", ""))
    hint = None
    if unknown:
        table = f" in [{'.'.join(keys[:-1])}]" if keys[:-1] else ""
        text = f"there is no setting `{keys[-1]}`{table}"
        meant = _nearest(keys)
        hint = f"Did you mean {_in_source(meant, setting, source, where)}?" if meant else ALL
    elif keys:
        text = f"{text} - at `{where}`"
    return ConfigError(f"Settings are wrong: {text} (from {source or path or 'the environment or flags'})", hint)


def _in_source(meant: str, setting: str, source: str, where: str) -> str:
    """The name that was meant for `where`, as it is written there: `setting` is what `source` sets, and may hold it."""
    if not source.startswith("NIMHOST_"):
        return repr(meant)
    if where.startswith(f"{setting}."):
        return f"{meant.removeprefix(f'{setting}.')!r} in {source}"
    return _variable(setting.replace(where, meant, 1))


def _is_about(setting: str, where: str) -> bool:
    """One of the two is the other, or holds it."""
    return f"{where}.".startswith(f"{setting}.") or f"{setting}.".startswith(f"{where}.")


def _nearest(keys: list[str]) -> str | None:
    """The setting or table that a misspelt one could be: of its own table, else of all."""
    *table, wrong = keys
    known = [name.split(".") for name in _all_settings(Settings)]
    depth = len(keys)
    siblings = {name[depth - 1]: name[:depth] for name in known if name[: depth - 1] == table and len(name) >= depth}
    anywhere = {name[-1]: name for name in known}
    for names in (siblings, anywhere):
        if near := difflib.get_close_matches(wrong, names, n=1):
            return ".".join(names[near[0]])
    return None


def _variable(name: str) -> str:
    """`server.port` as a variable of the environment."""
    return f"NIMHOST_{name.replace('.', '__').upper()}"


def _all_settings(cls: type[Struct], table: str = "") -> list[str]:
    """`table.key` of every setting, and of what stands in a list of tables."""
    names = []
    for f in msgspec.structs.fields(cls):
        inner = next((t for t in (f.type, *get_args(f.type)) if isinstance(t, type) and issubclass(t, Struct)), None)
        if inner is None or inner is not f.type:
            names.append(f"{table}{f.name}")
        if inner is not None:
            names += _all_settings(inner, f"{table}{f.name}.")
    return names
