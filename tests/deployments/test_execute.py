"""Directories that are made for engines: with their rights from the first moment on, whoever is killed when."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nimhost.deployments.execute import _make_directories
from nimhost.engines.spec import ADAPTERS_DIR, ContainerSpec, Mount, Probe
from nimhost.errors import HostError


def spec(*mounts: Mount) -> ContainerSpec:
    return ContainerSpec(image="x", probe=Probe(health_path="/h"), mounts=mounts)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_engine_may_write_into_its_cache_and_only_read_adapters(tmp_path: Path) -> None:
    cache, adapters, weights = tmp_path / "nim" / "image", tmp_path / "loras" / "m", tmp_path / "weights"
    made = spec(
        Mount(str(cache), "/opt/nim/.cache", read_only=False), Mount(str(adapters), ADAPTERS_DIR),
        Mount(str(weights), "/model-store"),
    )  # fmt: skip
    _make_directories(made)
    assert (mode(cache), mode(adapters), weights.exists()) == (0o777, 0o755, False)
    cache.chmod(0o700)
    _make_directories(made)
    assert mode(cache) == 0o700  # somebody's choice


@pytest.mark.fault(20)
def test_a_kill_before_the_rights_are_set_leaves_no_cache_that_nim_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "nim" / "image"
    made = spec(Mount(str(cache), "/opt/nim/.cache", read_only=False))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(os, "chmod", killed)
        dying.setattr(Path, "chmod", killed)
        with pytest.raises(KeyboardInterrupt):
            _make_directories(made)
    assert not cache.exists()
    _make_directories(made)
    assert mode(cache) == 0o777
    assert [path.name for path in cache.parent.iterdir()] == ["image"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="Cannot make the directory"):
        _make_directories(spec(Mount(str(tmp_path / "file" / "x"), "/opt/nim/.cache", read_only=False)))
