"""Copies of adapters on disk: whole or not there, readable by engines, and never at the cost of what they are from."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from nimhost.errors import DiskFull, WeightsMissing
from nimhost.host.adapter_files import AdapterFiles
from nimhost.refs import Ref
from tests.tiny import tiny_lora

MODEL, NAME = Ref("default", "base"), "default--math"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_lora(tmp_path / "source", base="org/model")


@pytest.fixture
def files(tmp_path: Path) -> AdapterFiles:
    return AdapterFiles(tmp_path / "loras")


def copy(files: AdapterFiles, source: Path, *, link: bool = False, name: str = NAME) -> str:
    return files.make(MODEL, name, files.identity(source), source, "/model-store", link=link)


def home(files: AdapterFiles) -> Path:
    return files._root / "default--base"


def test_a_copy_is_found_by_what_it_was_made_of(files: AdapterFiles, source: Path) -> None:
    identity = files.identity(source)
    assert files.find(MODEL, NAME, identity) is None
    directory = copy(files, source)
    assert files.find(MODEL, NAME, identity) == directory == f"{NAME}@{identity}"
    assert files.identity(source) == identity
    os.utime(source / "adapter_config.json", (1, 1))
    assert files.find(MODEL, NAME, files.identity(source)) is None


@pytest.mark.parametrize("link", [True, False])
def test_what_it_is_made_of_stays_as_it_is(files: AdapterFiles, source: Path, link: bool) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mode) for path in source.iterdir()}
    made = home(files) / copy(files, source, link=link)
    assert {path.name: (path.read_bytes(), path.stat().st_mode) for path in source.iterdir()} == before
    config = json.loads((made / "adapter_config.json").read_bytes())
    assert config == json.loads((source / "adapter_config.json").read_bytes()) | {
        "base_model_name_or_path": "/model-store"
    }
    shared = (made / "adapter_model.safetensors").samefile(source / "adapter_model.safetensors")
    assert shared is link


def test_files_that_others_may_not_read_are_copied_rather_than_opened(files: AdapterFiles, source: Path) -> None:
    weights = source / "adapter_model.safetensors"
    weights.chmod(0o600)
    made = home(files) / copy(files, source, link=True)
    assert (made / weights.name).stat().st_mode & 0o777 == 0o644
    assert weights.stat().st_mode & 0o777 == 0o600


def test_links_of_a_cache_are_followed(files: AdapterFiles, source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    made = home(files) / copy(files, snapshot, link=True)
    assert not (made / "adapter_model.safetensors").is_symlink()
    assert (made / "adapter_model.safetensors").samefile(source / "adapter_model.safetensors")


def test_engines_may_read_it_whatever_the_umask_says(files: AdapterFiles, source: Path) -> None:
    before = os.umask(0o077)
    try:
        made = home(files) / copy(files, source)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (home(files), made)] == [0o755, 0o755]
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o644}


def test_a_full_disk_leaves_nothing_behind(files: AdapterFiles, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(DiskFull):
        copy(files, source)
    assert list(home(files).iterdir()) == []


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_adapter_is_said(files: AdapterFiles, source: Path, missing: str) -> None:
    (source / missing).unlink()
    with pytest.raises(WeightsMissing, match="holds no adapter"):
        files.identity(source)
    with pytest.raises(WeightsMissing, match="Cannot read"):
        files.identity(source / "nowhere")


def test_only_what_nobody_needs_is_pruned(files: AdapterFiles, source: Path) -> None:
    names = ("default--kept", "default--loaded", "default--spared", "default--old")
    made = {name: copy(files, source, name=name) for name in names}
    (home(files) / ".incoming-0123456789abcdef").mkdir()
    files.show(MODEL, "default--kept", made["default--kept"])
    files.prune({MODEL: {made["default--kept"]}}, {made["default--loaded"]}, {"default--spared"})
    assert {path.name for path in home(files).iterdir()} == {made[name] for name in names[:3]}
    assert files.shown() == {MODEL: {"default--kept": made["default--kept"]}}
    files.prune({}, (), ())
    assert list(home(files).iterdir()) == []


def test_what_nims_see_is_named_after_the_adapter_and_holds_nothing_else(files: AdapterFiles, source: Path) -> None:
    directory = copy(files, source)
    files.show(MODEL, NAME, directory)
    seen = files._root / "nim" / "default--base"
    assert [path.name for path in seen.iterdir()] == [NAME]
    assert (seen / NAME / "adapter_config.json").samefile(home(files) / directory / "adapter_config.json")
    assert files.shown() == {MODEL: {NAME: directory}}
    files.hide(MODEL, NAME)
    files.hide(MODEL, NAME)
    assert (list(seen.iterdir()), files.shown()) == ([], {MODEL: {}})
