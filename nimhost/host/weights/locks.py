"""One downloader per file: among nimhosts, and between nimhost and Hugging Face's tools. The kernel ends every lock
with the process that holds it, so nothing is left to clean up after a crash."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nimhost.host.weights.cache import RepoCache, stat_of
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.meter import Meter

STALE_S = 120.0
"""Another tool that holds a file's lock without writing a byte for this long is not waited for any more."""


@contextmanager
def lease(cache: RepoCache, file: HubFile, meter: Meter) -> Iterator[None]:
    """Hold the lock that Hugging Face's tools take for this file, so that they and we do not fetch it both.

    A holder that lives and writes nothing is overruled after STALE_S: the lock only saves bytes, it does not keep the
    cache right.
    """
    path = cache.cache_dir / ".locks" / cache.folder / f"{file.digest}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        began = time.time()
        while not try_lock(fd):
            if time.time() - max(began, _last_sign_of_life(cache, file)) > STALE_S:
                break
            meter.note(file.path, f"{file.path} is being fetched by another process")
            time.sleep(0.2)
        meter.note(file.path)
        yield
    finally:
        os.close(fd)


def _last_sign_of_life(cache: RepoCache, file: HubFile) -> float:
    signs = (stat_of(path) for path in cache.blobs.glob(f"{file.digest}*"))
    return max((sign.st_mtime for sign in signs if sign), default=0.0)


@contextmanager
def locked_partial(path: Path, file: HubFile, meter: Meter) -> Iterator[int]:
    """The partial file, open and only ours: what we write to, nobody else does. The lock is held until the descriptor
    and all copies of it are closed."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while not try_lock(fd):
                meter.note(file.path, f"{file.path} is being fetched by another nimhost")
                time.sleep(0.2)
            if (there := stat_of(path)) and os.path.samestat(os.fstat(fd), there):
                yield fd
                return
        finally:
            os.close(fd)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
