"""File systems of this machine: how much room there is, and how much something takes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def free_bytes(path: Path) -> int | None:
    """Free for nimhost on the file system that `path` is on, or will be on; None when it cannot be read."""
    try:
        return shutil.disk_usage(_nearest(path)).free
    except OSError:
        return None


def same_file_system(one: Path, other: Path) -> bool:
    try:
        return os.stat(_nearest(one)).st_dev == os.stat(_nearest(other)).st_dev
    except OSError:
        return False


def occupied_bytes(directory: Path) -> int:
    """On disk, by the files in it: less than their sizes while they are being written; 0 when there is none."""
    try:
        return sum(os.stat(entry.path).st_blocks * 512 for entry in os.scandir(directory) if entry.is_file())
    except OSError:
        return 0


def _nearest(path: Path) -> Path:
    """The first folder on the way up that exists."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
