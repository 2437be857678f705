from __future__ import annotations

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


def test_a_misspelt_setting_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"there is no setting `prt`") as caught:
        load(env={"NIMHOST_SERVER__PRT": "1"})
    assert caught.value.hint == "Did you mean 'port'?"


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
