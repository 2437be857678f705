"""One file from the hub into the cache: resumed by range, verified by hash, moved into place in one step.

Only the download process uses this: it blocks, one thread per file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nimhost.errors import DiskFull, WeightsCorrupt, WeightsMissing
from nimhost.host.weights_cache import OURS, RepoCache
from nimhost.host.weights_choice import HubFile
from nimhost.host.weights_hub import NETWORK, Hub, Interrupted, Patience, reason
from nimhost.host.weights_wire import WeightsProgress

CHUNK_BYTES = 1 << 20
STALE_S = 120.0
"""Another tool that holds a file's lock without writing a byte for this long is not waited for any more."""
_QUIET_S = 5.0
_RATE_WINDOW_S = 5.0


class NoPlainUrl(Exception):
    """The hub has the file in Xet storage only."""


class Meter:
    """How far all files together are, and what each one waits for. Shared by the threads."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._received = 0
        self._last_byte = time.monotonic()
        self._notes: dict[str, str] = {}
        self._samples: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def have(self, size_bytes: int) -> None:
        """Bytes that are on disk (negative: bytes that turned out worthless)."""
        with self._lock:
            self.done_bytes += size_bytes

    def receive(self, size_bytes: int) -> None:
        with self._lock:
            self.done_bytes += size_bytes
            self._received += size_bytes
            self._last_byte = time.monotonic()

    def note(self, path: str, text: str = "") -> None:
        with self._lock:
            self._notes.pop(path, None)
            if text:
                self._notes[path] = text

    def read(self) -> WeightsProgress:
        with self._lock:
            now = time.monotonic()
            self._samples.append((now, self._received))
            while now - self._samples[0][0] > _RATE_WINDOW_S:
                self._samples.popleft()
            since, before = self._samples[0]
            rate = (self._received - before) / (now - since) if now > since else 0.0
            quiet = now - self._last_byte
            message = next(iter(self._notes.values()), "")
            if not message and quiet > _QUIET_S and self.done_bytes < self.total_bytes:
                message = f"no data from the hub for {quiet:.0f} s"
            return WeightsProgress(self.done_bytes, self.total_bytes, rate, message)


class FileTransfer:
    """Brings one file into the cache. `run` raises NimhostErrors, NoPlainUrl, and OSErrors of the disk."""

    def __init__(self, hub: Hub, cache: RepoCache, commit: str, file: HubFile, meter: Meter) -> None:
        self._hub = hub
        self._cache = cache
        self._file = file
        self._meter = meter
        self._url = hub.file_url(commit, file.path)
        self._blob = cache.blob(file)
        self._partial = cache.partial(file)

    def run(self) -> None:
        try:
            with _lease(self._cache, self._file, self._meter):
                if not self._is_there():
                    self._fetch()
        finally:
            self._say("")

    def _is_there(self) -> bool:
        """Whether the blob is there and right, whoever fetched it."""
        if not self._blob.is_file() or self._blob.stat().st_size != self._file.size_bytes:
            return False
        self._say(f"verifying {self._file.path}")
        digest = _Digest(self._file)
        with self._blob.open("rb") as blob:
            while chunk := blob.read(CHUNK_BYTES):
                digest.update(chunk)
        if digest.matches():
            self._partial.unlink(missing_ok=True)
            self._meter.have(self._file.size_bytes)
            return True
        return False

    def _fetch(self) -> None:
        with _locked_partial(self._partial, self._file, self._meter) as fd:
            if self._blob.is_file() and self._is_there():  # the one we waited for has fetched it
                return
            for last in (False, True):
                if self._complete(fd):
                    break
                self._meter.have(-self._file.size_bytes)
                os.ftruncate(fd, 0)
                if last:
                    raise WeightsCorrupt(
                        f"{self._file.path} of {self._hub.repo} has not the hash that the hub promises, twice",
                        "A proxy or mirror in between may change it. Try again, or set [weights] endpoint.",
                    )
                self._say(f"{self._file.path} arrived damaged, fetching it again")
            os.fsync(fd)
            os.fchmod(fd, 0o644)
            self._partial.replace(self._blob)
            _sync_dir(self._blob.parent)

    def _complete(self, fd: int) -> bool:
        """Fill the file, from where it is, to its size. False: it is full, and its hash is wrong."""
        digest = self._resume(fd)
        patience = Patience(self._hub, self._say)
        while digest.length < self._file.size_bytes:
            before = digest.length
            try:
                self._stream(fd, digest)
            except Interrupted as failure:
                if digest.length > before:
                    patience.progressed()
                patience.wait(failure)
            except WeightsMissing as error:
                raise (NoPlainUrl() if self._file.xet else error) from None
        return digest.matches()

    def _resume(self, fd: int) -> _Digest:
        """Hash what an earlier process left; the file's size is how far it came."""
        digest = _Digest(self._file)
        if os.fstat(fd).st_size > self._file.size_bytes:
            os.ftruncate(fd, 0)
        if os.fstat(fd).st_size:
            self._say(f"verifying what is there of {self._file.path}")
        while chunk := os.pread(fd, CHUNK_BYTES, digest.length):
            digest.update(chunk)
        self._meter.have(digest.length)
        self._say("")
        return digest

    def _stream(self, fd: int, digest: _Digest) -> None:
        """Append what one request brings. Raises Interrupted when it ends early."""
        with self._hub.open(self._url, digest.length) as response:
            if digest.length and not _continues(response.headers.get("Content-Range"), digest.length):
                self._meter.have(-digest.length)  # the hub sends it all again: so be it
                os.ftruncate(fd, 0)
                digest.restart()
            while left := self._file.size_bytes - digest.length:
                try:
                    chunk = response.read1(min(CHUNK_BYTES, left))
                except NETWORK as error:
                    raise Interrupted(reason(error, self._hub.limits.stall_s)) from error
                if not chunk:
                    raise Interrupted("connection closed early")
                _append(fd, chunk)
                digest.update(chunk)
                self._meter.receive(len(chunk))
                self._say("")

    def _say(self, text: str) -> None:
        self._meter.note(self._file.path, text)


class _Digest:
    """The hash that the hub promises for a file: SHA-256 for LFS files, git's SHA-1 of a blob for the others."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self.restart()

    def restart(self) -> None:
        self.length = 0
        if len(self._file.digest) == 64:
            self._hash = hashlib.sha256()
        else:
            self._hash = hashlib.sha1(b"blob %d\0" % self._file.size_bytes, usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.length += len(chunk)

    def matches(self) -> bool:
        return self.length == self._file.size_bytes and self._hash.hexdigest() == self._file.digest


# --- one downloader per file ---------------------------------------------------------------------------------------


@contextmanager
def _lease(cache: RepoCache, file: HubFile, meter: Meter) -> Iterator[None]:
    """Hold the lock that Hugging Face's tools take for this file, so that they and we do not fetch it both.

    The kernel frees it when its holder dies. A holder that lives and writes nothing is overruled after STALE_S: the
    lock only saves bytes, it does not keep the cache right.
    """
    path = cache.cache_dir / ".locks" / cache.folder / f"{file.digest}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        began = time.time()
        while not _try_lock(fd):
            if time.time() - max(began, _last_sign_of_life(cache, file)) > STALE_S:
                break
            meter.note(file.path, f"{file.path} is being fetched by another process")
            time.sleep(0.2)
        meter.note(file.path)
        yield
    finally:
        os.close(fd)


def _last_sign_of_life(cache: RepoCache, file: HubFile) -> float:
    return max((p.stat().st_mtime for p in cache.blobs.glob(f"{file.digest}*") if p.exists()), default=0.0)


@contextmanager
def _locked_partial(path: Path, file: HubFile, meter: Meter) -> Iterator[int]:
    """The partial file, open for appending, and only ours: what we append to, nobody else does."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while not _try_lock(fd):
                meter.note(file.path, f"{file.path} is being fetched by another nimhost")
                time.sleep(0.2)
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                yield fd
                return
        finally:
            os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- the disk ------------------------------------------------------------------------------------------------------


@contextmanager
def reserved_space(cache: RepoCache, files: list[HubFile]) -> Iterator[int]:
    """Make sure that what is still to come fits, next to what other downloads have been promised.

    A promise is a file that says how much, locked by its process for as long as it lives: nothing is left to clean up
    after a crash. Yields the file descriptor for `keep_promise`. Raises DiskFull.
    """
    folder = cache.cache_dir / OURS / "promised"
    folder.mkdir(parents=True, exist_ok=True)
    gate = os.open(folder / ".gate", os.O_RDWR | os.O_CREAT, 0o644)
    fd = os.open(folder / str(os.getpid()), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(fd, fcntl.LOCK_EX)
        needed = missing_bytes(cache, files)
        promised = sum(_promise(path) for path in folder.iterdir() if path.name not in (".gate", str(os.getpid())))
        free = shutil.disk_usage(cache.cache_dir).free
        if needed > free - promised:
            raise DiskFull(*_sum(cache, needed, free, promised))
        keep_promise(fd, needed)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield fd
    finally:
        (folder / str(os.getpid())).unlink(missing_ok=True)
        os.close(fd)
        os.close(gate)


def keep_promise(fd: int, needed_bytes: int) -> None:
    """Note how much is still to come: what has arrived is not free any more, it must not count twice."""
    os.pwrite(fd, b"%-20d" % needed_bytes, 0)


def missing_bytes(cache: RepoCache, files: list[HubFile]) -> int:
    missing = 0
    for file in {f.digest: f for f in files}.values():
        if not cache.blob(file).exists():
            partial = cache.partial(file)
            missing += max(0, file.size_bytes - (partial.stat().st_size if partial.exists() else 0))
    return missing


def disk_full(cache_dir: Path) -> DiskFull:
    """The error for a write that failed because the disk is full (or the quota used up)."""
    return DiskFull(
        f"no space left on the filesystem of {cache_dir}",
        "Free some space: the download continues by itself where it stopped. Or set [weights] cache_dir.",
    )


def _promise(path: Path) -> int:
    """What a living process has been promised; the file of a dead one goes away."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return 0
    try:
        if not _try_lock(fd):
            return int(os.pread(fd, 20, 0) or b"0")
        path.unlink(missing_ok=True)
        return 0
    finally:
        os.close(fd)


def _sum(cache: RepoCache, needed: int, free: int, promised: int) -> tuple[str, str]:
    others = f", of which {_gib(promised)} are promised to other downloads" if promised else ""
    return (
        f"{cache.repo} needs {_gib(needed)} in {cache.cache_dir}, {_gib(free)} are free{others}",
        f"Free {_gib(needed - free + promised)}, or set [weights] cache_dir to a larger filesystem.",
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def _append(fd: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(fd, view) :]


def _continues(content_range: str | None, start: int) -> bool:
    return (content_range or "").startswith(f"bytes {start}-")


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
