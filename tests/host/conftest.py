from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.hub import FakeHub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[FakeHub]:
    """With what the module has `PUBLISHED`: repository -> files. Its listings come in pages of `PAGE_SIZE`."""
    with FakeHub(page_size=getattr(request.module, "PAGE_SIZE", 1000)) as fake:
        for name, files in request.module.PUBLISHED.items():
            fake.add(name, files)
        yield fake


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 16 MiB. Mounting takes root, which the tests of tiers 3 and 4 need anyway."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
