"""One daemon per data directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from nimhost.errors import StartError


def lock_directory(directory: Path) -> int:
    """Makes `directory` (0700) where it is missing and takes its lock, held until this process ends.

    Returns the open file descriptor. Raises StartError, naming the pid of the daemon that has it.
    """
    path = directory / "lock"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(directory, error) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pid = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StartError(
            f"Another nimhost (pid {pid}) uses the data directory {directory}.",
            f"Stop it with: kill {pid}   or choose another directory with --data-dir.",
        ) from None
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        os.close(fd)
        raise _unusable(directory, error) from None
    return fd


def _unusable(directory: Path, error: OSError) -> StartError:
    return StartError(
        f"Cannot use the data directory {directory}: {error.strerror}.", "Choose another one with --data-dir."
    )
