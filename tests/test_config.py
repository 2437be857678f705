from __future__ import annotations

import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nimhost.config import Settings, data_dir, load
from nimhost.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "nimhost.toml.example"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no nimhost.toml of somebody's here


def paths(tree: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        found |= paths(value, f"{prefix}{key}.") if nested else {prefix + key}
    return found


def test_the_example_lists_every_setting_with_its_default() -> None:
    example = tomllib.loads(EXAMPLE.read_text())
    assert load(str(EXAMPLE), env={}) == Settings()
    assert paths(example) == paths(msgspec.to_builtins(Settings()))


def test_every_setting_of_the_example_is_explained() -> None:
    lines = EXAMPLE.read_text().splitlines()
    bare = [line for before, line in pairwise(lines) if " = " in line and not before.startswith("#")
            and not line.startswith("#")]  # fmt: skip
    assert bare == []


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_text('[server]\nport = 1\nhost = "a"\ndata_dir = "/x"\n')
    env = {"NIMHOST_SERVER__PORT": "2", "NIMHOST_SERVER__HOST": "b"}
    server = load(str(file), {"server.port": 3, "server.host": None}, env).server
    assert (server.port, server.host, server.data_dir) == (3, "b", "/x")


def test_the_environment_takes_toml_values_and_raw_strings() -> None:
    settings = load(
        env={
            "NIMHOST_MODELS__TOOL_CALL_PLUGIN__ENABLED": "true",
            "NIMHOST_GPUS__SIMULATED": '[{ name = "SIM-80G", memory_gib = 80 }]',
            "NIMHOST_WEIGHTS__ENDPOINT": "http://127.0.0.1:1",
            "NIMHOST_BASE_URL": "ignored: it is the client's",
        }
    )
    assert settings.models.tool_call_plugin.enabled is True
    assert settings.gpus.simulated[0].memory_gib == 80
    assert settings.weights.endpoint == "http://127.0.0.1:1"


def test_a_wrong_key_inside_a_variable_is_named_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="NIMHOST_GPUS__SIMULATED") as caught:
        load(env={"NIMHOST_GPUS__SIMULATED": "[{nam='x', memory_gib=1}]"})
    assert "there is no setting `nam` in [gpus.simulated]" in caught.value.message
    assert caught.value.hint == "Did you mean 'name' in NIMHOST_GPUS__SIMULATED?"


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("NIMHOST_SERVER__PROT", "Did you mean NIMHOST_SERVER__PORT?"),
        ("NIMHOST_SERVER_PORT", "Did you mean NIMHOST_SERVER__PORT?"),
        ("NIMHOST_SEVER__PORT", "Did you mean NIMHOST_SERVER__PORT?"),
        ("NIMHOST_WEIGHTS__OFLINE", "Did you mean NIMHOST_WEIGHTS__OFFLINE?"),
        ("NIMHOST_MODELS__TOOL_CALL_PLUGIN__ENABLE", "Did you mean NIMHOST_MODELS__TOOL_CALL_PLUGIN__ENABLED?"),
        ("NIMHOST_SERVER__LOG_BODYS", "Did you mean NIMHOST_GATEWAY__LOG_BODIES?"),
        ("NIMHOST_SERVER__ZZZZ", "See nimhost.toml.example for every setting."),
    ],
)
def test_a_variable_that_is_no_setting_is_named_with_the_nearest_one(variable: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=variable) as caught:
        load(env={variable: "1"})
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("[server]\nprot = 1\n", "there is no setting `prot` in [server]", "Did you mean 'server.port'?"),
        ("[sever]\nport = 1\n", "there is no setting `sever`", "Did you mean 'server'?"),
        ("port = 1\n", "there is no setting `port`", "Did you mean 'server.port'?"),
        ("[gpus]\nsimulated = [{ name = 'x', memory_gb = 1 }]\n", "no setting `memory_gb` in [gpus.simulated]",
         "Did you mean 'gpus.simulated.memory_gib'?"),
    ],
)  # fmt: skip
def test_a_misspelt_setting_in_a_file_is_named_with_the_nearest_one(
    tmp_path: Path, text: str, said: str, hint: str
) -> None:
    file = tmp_path / "n.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        load(str(file), env={"NIMHOST_SERVER__HOST": "x"})
    assert f"(from {file})" in caught.value.message
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("env", "overrides", "source"),
    [
        ({"NIMHOST_SERVER__PORT": "abc"}, {}, "NIMHOST_SERVER__PORT"),
        ({"NIMHOST_SERVER__PORT__X": "1"}, {}, "NIMHOST_SERVER__PORT__X"),
        ({"NIMHOST_SERVER__PORT": "1"}, {"server.port": "abc"}, "--port"),
    ],
)
def test_a_wrong_value_is_named_with_where_it_was_said(
    tmp_path: Path, env: dict[str, str], overrides: dict[str, object], source: str
) -> None:
    file = tmp_path / "n.toml"
    file.write_text("[server]\ndrain_timeout_s = 1.0\n")
    with pytest.raises(ConfigError, match=rf"at `server\.port` \(from {source}\)"):
        load(str(file), overrides, env)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[docker]\nshm_gib = -1\n", "docker.shm_gib"),
        ("[server]\ndrain_timeout_s = -4\n", "server.drain_timeout_s"),
        ("[deployments]\ndrain_timeout_s = -4\n", "deployments.drain_timeout_s"),
        ("[engines.vllm]\nimage = ''\n", "engines.vllm.image"),
        ("[engines.nim]\nimage = ' '\n", "engines.nim.image"),
        ("[[gpus.simulated]]\nname = 'x'\nmemory_gib = -5\n", "gpus.simulated"),
        ("[[gpus.simulated]]\nname = 'x'\nmemory_gib = inf\n", "gpus.simulated"),
        ("[docker]\nshm_gib = inf\n", "docker.shm_gib"),
        ("[server]\ndrain_timeout_s = inf\n", "server.drain_timeout_s"),
        ("[gpus]\ndevices = ['']\n", "gpus.devices"),
    ],
)
def test_a_value_that_can_never_work_is_refused_at_the_start(tmp_path: Path, text: str, where: str) -> None:
    file = tmp_path / "n.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"Settings are wrong: .* at `{where}"):
        load(str(file), env={})


def test_an_image_is_said_by_the_environment_without_quotes() -> None:
    assert load(env={"NIMHOST_ENGINES__VLLM__IMAGE": "my/vllm:1"}).engines.vllm.image == "my/vllm:1"


@pytest.mark.parametrize("text", ["[server\n", "[server]\nport = 'x'\n", "server = 1\n"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load(str(file), env={})


def test_a_file_that_was_asked_for_must_exist() -> None:
    with pytest.raises(ConfigError, match="no settings file at /nowhere"):
        load("/nowhere", env={})


def test_the_file_in_the_current_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "nimhost.toml").write_text("[server]\nport = 7\n")
    assert load(env={"HOME": "/h"}).server.port == 7


def test_the_data_directory_follows_xdg() -> None:
    assert data_dir(Settings(), {"XDG_DATA_HOME": "/d"}) == Path("/d/nimhost")
    assert data_dir(Settings(), {"HOME": "/h"}) == Path("/h/.local/share/nimhost")
