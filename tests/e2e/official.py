"""The reference platform's own CLI and SDK, from PyPI, in a virtual environment of their own that is made once."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import venv
from pathlib import Path

from tests.images import cache_dir

PACKAGE = "nemo-platform==0.3.0"


def official_venv() -> Path:
    """Its directory. The first call installs half a gigabyte, which takes minutes; later ones cost nothing."""
    name = f"{PACKAGE.replace('==', '-')}-py{sys.version_info.major}.{sys.version_info.minor}"
    directory, done = cache_dir() / name, cache_dir() / name / "installed"
    with (cache_dir() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            venv.create(directory, clear=True, with_pip=True)
            pip = [str(directory / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, PACKAGE], check=True)
            done.touch()
    return directory
