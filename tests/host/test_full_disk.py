"""A start on a disk that has no room left, at whichever step it shows: one sentence that names the place."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from nimhost.store import Store


@pytest.mark.fault(17)
@pytest.mark.parametrize("free_kib", [0, 8, 60])
def test_a_start_on_a_full_disk_says_where_it_is_full(small_disk: Path, free_kib: int) -> None:
    directory = small_disk / "data"
    directory.mkdir()
    said = start_on_a_full_disk(small_disk, directory, free_kib)
    assert "full" in said or "No space left" in said
    assert str(directory) in said


@pytest.mark.fault(17)
async def test_a_start_with_all_its_wishes_on_a_full_disk_says_where_it_is_full(small_disk: Path) -> None:
    directory = small_disk / "data"
    await (await Store.open(directory / "nimhost.db")).close()
    said = start_on_a_full_disk(small_disk, directory, 8)
    assert f"The disk that holds {directory}/nimhost.db is full" in said


def start_on_a_full_disk(disk: Path, directory: Path, free_kib: int) -> str:
    """What `nimhost serve` says of it."""
    with suppress(OSError), (disk / "filled").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    os.truncate(disk / "filled", (disk / "filled").stat().st_size - free_kib * 1024)
    command = (sys.executable, "-m", "nimhost", "serve", "--port", "0", "--data-dir", str(directory))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False), ended.stderr
    return ended.stderr
