"""Takes weights out of the cache again: only files that nimhost fetched, and none that another snapshot needs.

Blocking: for a thread. What names a snapshot goes first and its files last, so that one that is half gone, after a
`kill -9`, is never taken for a whole one, and is found again by the next prune.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from nimhost.errors import HostError
from nimhost.host.weights.cache import PARTIAL, RepoCache
from nimhost.host.weights.disk import no_download
from nimhost.host.weights.inventory import Held, are_ours, blobs_of, cache_of, leftovers, linked_blobs, stages
from nimhost.host.weights.locks import try_lock


def remove(cache_dir: Path, held: Held) -> int | None:
    """Bytes freed; None where it is being fetched right now, or not all ours any more, and nothing was touched.

    Raises HostError.
    """
    cache = cache_of(cache_dir, held.repo)
    try:
        with no_download(cache) as nobody:
            if not nobody:
                return None
            return _remove_snapshot(cache, held.repo.revision) if held.repo.revision else _remove_leftovers(cache)
    except OSError as error:
        raise HostError(
            f"cannot remove {held.repo} from {cache_dir}: {error.strerror}",
            "The user that runs nimhost has to own the files in it.",
        ) from error


def _remove_snapshot(cache: RepoCache, commit: str) -> int | None:
    """Whose it is is looked at anew: since it was listed, another tool may have brought something for it."""
    blobs = blobs_of(cache.snapshot_dir(commit)).keys()
    if not are_ours(cache, blobs, cache.fetched_digests()):
        return None
    lonely = blobs - linked_blobs(cache, besides=commit)
    cache.manifest_path(commit).unlink(missing_ok=True)
    for path in [path for path in (cache.dir / "refs").rglob("*") if path.is_file()]:
        if path.read_bytes().strip() == commit.encode():
            path.unlink(missing_ok=True)
    shutil.rmtree(cache.snapshot_dir(commit))
    freed = sum(_unlink(cache, Path(blob)) for blob in lonely)
    return freed + _remove_leftovers(cache)


def _remove_leftovers(cache: RepoCache) -> int:
    freed = sum(_unlink(cache, path) for path in leftovers(cache, linked_blobs(cache), cache.fetched_digests()))
    for stage in stages(cache):
        shutil.rmtree(stage, ignore_errors=True)
    _remove_stray_notes(cache)
    if not linked_blobs(cache):
        _remove_empty(cache)
    return freed


def _remove_stray_notes(cache: RepoCache) -> None:
    """Of files that are not there any more, or not ours."""
    for path in {*cache.fetched.glob("*")} - {cache.fetched / name for name in cache.fetched_digests()}:
        path.unlink(missing_ok=True)


def _unlink(cache: RepoCache, blob: Path) -> int:
    """The file, then the note that it was ours."""
    freed = 0
    with suppress(FileNotFoundError):
        freed = blob.stat().st_blocks * 512
        blob.unlink()
    (cache.fetched / blob.name.removesuffix(PARTIAL)).unlink(missing_ok=True)
    return freed


def _remove_empty(cache: RepoCache) -> None:
    """Folders that hold nothing any more. Whatever another tool keeps there stays."""
    locks = cache.cache_dir / ".locks" / cache.folder
    for unfinished in (*cache.notes.glob("*.tmp"), *cache.dir.glob("*.tmp")):
        unfinished.unlink(missing_ok=True)
    for lock in locks.glob("*.lock"):
        _unlink_unheld(lock)
    roots = (cache.dir, cache.notes, locks)
    below = [path for root in roots for path in root.rglob("*") if path.is_dir()]
    for path in [*sorted(below, reverse=True), *roots]:
        with suppress(OSError):  # not empty, or not there
            path.rmdir()


def _unlink_unheld(lock: Path) -> None:
    """Another tool that fetches a file holds its lock; without it, a third would fetch it as well."""
    with suppress(FileNotFoundError):
        fd = os.open(lock, os.O_RDWR)
        try:
            if try_lock(fd):
                lock.unlink()
        finally:
            os.close(fd)
