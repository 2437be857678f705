"""Reads weights in the cache anew and compares them with what was promised: a disk or another tool may have changed
them since. What is found damaged is noted, so that it is not served any more and the next fetch brings it again.

Blocking: for a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from nimhost.errors import WeightsMissing
from nimhost.host.weights.cache import Manifest, ManifestFile, RepoCache
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.digest import Digest
from nimhost.host.weights.parts import CHUNK_BYTES
from nimhost.host.weights.wire import Repo

OnBytes = Callable[[int, int], None]
"""(bytes read, bytes to be read); may raise, and so end it."""


class FileVerdict(Struct, frozen=True):
    path: str
    verdict: Literal["ok", "missing", "size", "hash", "unknown"]
    """`unknown`: there is no hash to compare with; its size is right."""


class Verdict(Struct, frozen=True):
    commit: str
    files: list[FileVerdict]

    @property
    def damaged(self) -> list[str]:
        return [file.path for file in self.files if file.verdict in ("missing", "size", "hash")]


def verify(cache_dir: Path, repo: Repo, on_bytes: OnBytes) -> Verdict:
    """Raises WeightsMissing where nothing of it is in the cache, and OSErrors of the disk."""
    cache = RepoCache(cache_dir, repo)
    commit = cache.commit()
    if commit is None or not cache.snapshot_dir(commit).is_dir():
        raise WeightsMissing(f"{repo} is not in {cache_dir}", "See what is: nimhost weights list")
    known = cache.manifest(commit) or _of_others(cache, commit)
    total, done = known.size_bytes, 0
    verdicts = []
    for file in known.files:
        verdicts.append(_compare(cache.snapshot_dir(commit), file, partial(_tell, on_bytes, done, total)))
        done += file.size_bytes
    found = Verdict(commit, verdicts)
    _note(cache, known, set(found.damaged))
    return found


def _tell(on_bytes: OnBytes, before: int, total: int, read: int) -> None:
    on_bytes(before + read, total)


def _of_others(cache: RepoCache, commit: str) -> Manifest:
    """Another tool's snapshot: its blobs are named by their hashes."""
    files = [ManifestFile(f.path, f.size_bytes, f.digest, False) for f in cache.files_there(commit)]
    return Manifest(cache.repo.repo_id, commit, files)


def _compare(root: Path, file: ManifestFile, on_read: Callable[[int], None]) -> FileVerdict:
    path = root / file.path
    if not path.is_file():
        return FileVerdict(file.path, "missing")
    if path.stat().st_size != file.size_bytes:
        return FileVerdict(file.path, "size")
    promised = HubFile(file.path, file.size_bytes, file.recorded or file.digest)
    digest = Digest(promised)
    with path.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
            on_read(digest.length)
    if not promised.hashed:
        return FileVerdict(file.path, "unknown")
    return FileVerdict(file.path, "ok" if digest.matches() else "hash")


def _note(cache: RepoCache, known: Manifest, damaged: set[str]) -> None:
    """In the manifest, where that is news; not in one that a download has written since: what was read is no more."""
    files = [replace(file, damaged=file.path in damaged) for file in known.files]
    if files != known.files and cache.manifest(known.commit) in (known, None):
        cache.replace_manifest(replace(known, files=files))
