"""Room for what is to come: downloads promise each other that they will all fit.

A promise is a file that says how much is still to come and for which repository, locked by its process for as long as
it lives: nothing is left to clean up after a crash.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nimhost.errors import DiskFull
from nimhost.host.weights.cache import OURS, RepoCache, stat_of
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.locks import try_lock
from nimhost.host.weights.parts import arrived_bytes

_GATE = ".gate"
_WIDTH = 20


@contextmanager
def reserved_space(cache: RepoCache, files: list[HubFile]) -> Iterator[int]:
    """Make sure that what is still to come fits, next to what other downloads have been promised.

    Yields the file descriptor for `keep_promise`. Raises DiskFull.
    """
    folder = cache.cache_dir / OURS / "promised"
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"{os.getpid()}-{uuid.uuid4().hex}"  # another container's process may have the same number
    gate = os.open(folder / _GATE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)  # before there is a file: one that nobody has locked is taken for a dead one's
        fd = os.open(own, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.pwrite(fd, b"%-*d%b" % (_WIDTH, 0, cache.folder.encode()), 0)
            keep_promise(fd, _needed(cache, files, _promised(folder)))
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield fd
        finally:
            own.unlink(missing_ok=True)
            os.close(fd)
    finally:
        os.close(gate)


def _needed(cache: RepoCache, files: list[HubFile], others: dict[str, int]) -> int:
    """Bytes still to come. Raises DiskFull where they do not fit beside what others were promised."""
    needed = missing_bytes(cache, files)
    promised = sum(size for repo, size in others.items() if repo != cache.folder)  # of the same, the bytes come once
    free = shutil.disk_usage(cache.cache_dir).free
    if needed > free - promised:
        raise DiskFull(*_sum(cache, needed, free, promised))
    return needed


def keep_promise(fd: int, needed_bytes: int) -> None:
    """Note how much is still to come: what has arrived is not free any more, it must not count twice."""
    os.pwrite(fd, b"%-*d" % (_WIDTH, needed_bytes), 0)


def promised_bytes(cache_dir: Path) -> dict[str, int]:
    """Folder of a repository -> what downloads of it that are in flight will still write into this cache.

    Waits for nobody, however long the gate is closed, and so leaves the files of dead processes alone.
    """
    try:
        return _promised(cache_dir / OURS / "promised", tidy=False)
    except OSError:
        return {}  # nobody has ever fetched anything here, or we may not look: then it is not ours to count


@contextmanager
def no_download(cache: RepoCache) -> Iterator[bool]:
    """Whether nobody fetches that repository; none begins to, here, until the end."""
    folder = cache.cache_dir / OURS / "promised"
    folder.mkdir(parents=True, exist_ok=True)
    gate = os.open(folder / _GATE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield cache.folder not in _promised(folder)
    finally:
        os.close(gate)


def _promised(folder: Path, *, tidy: bool = True) -> dict[str, int]:
    """By repository: several downloads of one wait for each other's files, so the largest promise is that of all.

    `tidy`: files of dead processes go away; only for who holds the gate.
    """
    found: dict[str, int] = {}
    for path in folder.iterdir():
        size, repo = _promise(path, tidy) if path.name != _GATE else (0, "")
        if repo:
            found[repo] = max(size, found.get(repo, 0))
    return found


def _promise(path: Path, tidy: bool) -> tuple[int, str]:
    """(what a living process has been promised, for which repository)."""
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDWR)
        try:
            if not try_lock(fd, shared=True):  # who only looks must not look like a living process to another
                said = os.pread(fd, 4096, 0)
                return int(said[:_WIDTH] or b"0"), said[_WIDTH:].decode()
            if tidy:
                path.unlink(missing_ok=True)
        finally:
            os.close(fd)
    return 0, ""


def missing_bytes(cache: RepoCache, files: list[HubFile]) -> int:
    missing = 0
    for file in {f.digest: f for f in files}.values():
        if not cache.blob(file).exists():
            there = arrived_bytes(cache.partial(file), file.size_bytes) + _written_below(cache.stage(file))
            missing += max(0, file.size_bytes - there)
    return missing


def _written_below(directory: Path) -> int:
    """On disk, by files that come and go meanwhile."""
    files = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return sum(stat.st_blocks * 512 for file in files if (stat := stat_of(file)))


def disk_full(cache_dir: Path) -> DiskFull:
    """The error for a write that failed because the disk is full (or the quota used up)."""
    return DiskFull(
        f"no space left on the filesystem of {cache_dir}",
        "Free some space (nimhost weights prune): the download continues by itself where it stopped. "
        "Or set [weights] cache_dir.",
    )


def _sum(cache: RepoCache, needed: int, free: int, promised: int) -> tuple[str, str]:
    others = f", of which {_gib(promised)} are promised to other downloads" if promised else ""
    return (
        f"{cache.repo} needs {_gib(needed)} in {cache.cache_dir}, {_gib(free)} are free{others}",
        f"Free {_gib(needed - free + promised)} (nimhost weights prune), "
        "or set [weights] cache_dir to a larger filesystem.",
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
