"""What is removed from the cache is ours and needed by nobody, whatever else happens there meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nimhost.errors import HostError
from nimhost.host.weights import Limits
from nimhost.host.weights import child as weights_child
from nimhost.host.weights import disk as weights_disk
from nimhost.host.weights import prune as weights_prune
from nimhost.host.weights.cache import RepoCache
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.disk import no_download, promised_bytes, reserved_space
from nimhost.host.weights.inventory import Held, scan
from nimhost.host.weights.prune import remove
from nimhost.host.weights.wire import Job
from tests.fakes.hub import FakeHub
from tests.host.weights_world import TINY, content, only

FILES = {"config.json": b'{"a": 1}', "sub/notes.txt": b"notes", "model.safetensors": bytes(range(256)) * 1024}
QUICK = Limits(stall_s=5, tries=2, backoff_s=0.05)
PUBLISHED = {"org/tiny": FILES}
FOLDER = "models--org--tiny"


@pytest.fixture
def snapshot(hub: FakeHub, cache: Path) -> Path:
    """Fetched by nimhost."""
    return fetch(hub, cache)


def fetch(hub: FakeHub, cache: Path) -> Path:
    commit = weights_child.download(Job(TINY, hub.url, str(cache), None, QUICK))
    return cache / FOLDER / "snapshots" / commit


def leave_something(cache: Path) -> Held:
    """Half a download beside the snapshot, which may go."""
    half = cache / FOLDER / "blobs" / f"{'e' * 64}.nimhost-partial"
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"half")
    return next(held for held in scan(cache) if not held.repo.revision)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("where", ["snapshots", "sub"])
def test_snapshots_that_cannot_be_read_for_a_moment_do_not_make_their_files_look_unused(
    cache: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    held, real = leave_something(cache), os.scandir

    def failing(path: str | Path) -> object:
        if Path(path).name == where:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", failing)
        with pytest.raises(HostError, match="cannot remove"):
            remove(cache, held)
        assert scan(cache) == [], "what cannot be read in full is not offered either"
    assert content(snapshot) == FILES


def test_a_file_that_cannot_be_looked_at_is_needed(
    cache: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, real, blob = leave_something(cache), os.stat, (snapshot / "model.safetensors").resolve()
    failures = 1

    def failing(path: str | Path, **rest: bool) -> os.stat_result:
        nonlocal failures
        if Path(path) == blob and failures:
            failures -= 1
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        with pytest.raises(HostError, match="cannot remove"):
            remove(cache, held)
    assert content(snapshot) == FILES


def test_what_another_tool_added_since_it_was_listed_keeps_the_snapshot(cache: Path, snapshot: Path) -> None:
    held = only(cache)
    theirs = cache / FOLDER / "blobs" / ("f" * 40)
    theirs.write_bytes(b"theirs")
    (snapshot / "vocab.txt").symlink_to(f"../../blobs/{theirs.name}")
    assert remove(cache, held) is None
    assert content(snapshot) == FILES | {"vocab.txt": b"theirs"}
    assert not only(cache).ours


def test_a_blob_that_another_snapshot_reaches_by_a_linked_folder_stays(
    cache: Path, snapshot: Path, tmp_path: Path
) -> None:
    held = only(cache)
    blob = (snapshot / "model.safetensors").resolve()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.safetensors").symlink_to(blob)
    other = snapshot.with_name("b" * 40)
    other.mkdir()
    (other / "folder").symlink_to(tmp_path / "elsewhere")
    assert remove(cache, held) is not None
    assert blob.read_bytes() == FILES["model.safetensors"]
    assert not (snapshot / "config.json").exists()


def test_a_repository_behind_a_link_is_whole_and_can_go(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir()
    cache.mkdir()
    (cache / FOLDER).symlink_to(tmp_path / "large-disk")
    fetch(hub, cache)
    assert (only(cache).state, only(cache).ours) == ("complete", True)
    assert remove(cache, only(cache)) is not None
    assert list((tmp_path / "large-disk").iterdir()) == []


def test_a_file_in_the_inode_of_one_of_ours_is_not_ours(cache: Path, snapshot: Path) -> None:
    """Where a file was deleted, the next one of another tool often gets its inode."""
    blob = (snapshot / "model.safetensors").resolve()
    inode = blob.stat().st_ino
    blob.write_bytes(FILES["model.safetensors"])
    assert blob.stat().st_ino == inode
    assert not only(cache).ours


def test_a_lock_that_another_tool_holds_stays(cache: Path, snapshot: Path) -> None:
    locks = cache / ".locks" / FOLDER
    held = locks / "theirs.lock"
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove(cache, only(cache))
        assert list(locks.iterdir()) == [held]
    remove(cache, leave_something(cache))
    assert not locks.exists()


def test_refs_that_are_no_text_do_not_stand_in_the_way(cache: Path, snapshot: Path) -> None:
    odd = cache / FOLDER / "refs" / "odd"
    odd.write_bytes(b"\xff\xfe")
    assert remove(cache, only(cache)) is not None
    assert not snapshot.exists()
    assert odd.exists(), "not of this snapshot"


@pytest.mark.fault(20)
def test_what_a_kill_9_left_half_written_goes_with_the_rest(cache: Path, snapshot: Path) -> None:
    notes = cache / ".nimhost" / FOLDER
    for unfinished in (notes / f"{'a' * 40}.json.4711.tmp", cache / FOLDER / "main.4711.tmp"):
        unfinished.write_bytes(b"half")
    assert remove(cache, only(cache)) is not None
    assert not notes.exists()
    assert not (cache / FOLDER).exists()


# --- while something is fetched ------------------------------------------------------------------------------------


def test_what_has_come_and_is_not_linked_yet_cannot_be_removed(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = RepoCache.link
    tried: list[object] = []

    def prune_first(self: RepoCache, *rest: Any) -> None:
        tried.extend(remove(cache, held) for held in scan(cache))
        link(self, *rest)

    monkeypatch.setattr(RepoCache, "link", prune_first)
    assert content(fetch(hub, cache)) == FILES
    assert tried == [None]


@pytest.mark.fault(17)
def test_a_download_that_begins_while_empty_folders_are_removed_has_its_own(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def after_a_prune(repo: RepoCache, files: list[HubFile]) -> Iterator[int]:
        weights_prune._remove_leftovers(repo)
        with reserved_space(repo, files) as promise:
            yield promise

    monkeypatch.setattr(weights_child, "reserved_space", after_a_prune)
    fetch(hub, cache)
    assert only(cache).state == "complete"


@pytest.mark.fault(17)
def test_what_is_promised_can_be_told_while_something_large_is_removed(cache: Path) -> None:
    """The supervisor looks at each tick. It changes nothing, so it need not wait; nor is it in anybody's way."""
    tiny, dead = RepoCache(cache, TINY), cache / ".nimhost" / "promised" / "1-dead"
    files = [HubFile("model.safetensors", 1000, "0" * 64)]
    told: list[dict[str, int]] = []
    with reserved_space(tiny, files), no_download(tiny):
        dead.write_bytes(b"%-20d%b" % (5, b"models--org--dead"))
        looking = threading.Thread(target=lambda: told.append(promised_bytes(cache)), daemon=True)
        looking.start()
        looking.join(5)
        assert told == [{tiny.folder: 1000}]
        assert dead.exists()
    with no_download(tiny) as nobody:
        assert nobody
    assert not dead.exists()


def test_a_promise_that_is_just_being_made_is_not_taken_for_a_dead_one(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = RepoCache(cache, TINY)
    tiny.make_dirs()
    real, folder = fcntl.flock, cache / ".nimhost" / "promised"

    class Fcntl:
        LOCK_EX, LOCK_UN = fcntl.LOCK_EX, fcntl.LOCK_UN

        @staticmethod
        def flock(fd: int, how: int) -> None:
            """Somebody else had the gate right before, and cleaned up."""
            monkeypatch.setattr(weights_disk, "fcntl", fcntl)
            weights_disk._promised(folder)
            real(fd, how)

    monkeypatch.setattr(weights_disk, "fcntl", Fcntl)
    with reserved_space(tiny, []), no_download(tiny) as nobody:
        assert not nobody
