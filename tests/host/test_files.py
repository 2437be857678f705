"""File storage: whole files or none, readable by containers, and never outside of the root."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import nimhost.host.files as files_module
from nimhost.errors import BadRequest, Conflict, DiskFull, NotFound
from nimhost.host.files import FileStorage, StoredFile


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[FileStorage]:
    opened = FileStorage(tmp_path / "filesets")
    await opened.open()
    yield opened
    opened.close()


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def read(storage: FileStorage, base: Path, path: str) -> bytes:
    file = await storage.open_file(base, path)
    try:
        return b"".join([chunk async for chunk in file.read(0, file.file.size_bytes)])
    finally:
        file.close()


async def test_what_is_written_is_read_listed_and_deleted(storage: FileStorage) -> None:
    base = storage.directory("default", "fs")
    assert await storage.list_files(base) == []
    assert await storage.write(base, "a/b/c.txt", chunks(b"one", b"two")) == StoredFile("a/b/c.txt", 6)
    await storage.write(base, "a/d.txt", chunks())
    await storage.write(base, "abc", chunks(b"x"))
    assert await read(storage, base, "a/b/c.txt") == b"onetwo"
    assert [f.path for f in await storage.list_files(base)] == ["a/b/c.txt", "a/d.txt", "abc"]
    assert [f.path for f in await storage.list_files(base, "a/")] == ["a/b/c.txt", "a/d.txt"]
    assert await storage.delete_file(base, "a/b/c.txt") == StoredFile("a/b/c.txt", 6)
    assert not (base / "a" / "b").exists()
    assert (base / "a" / "d.txt").exists()
    with pytest.raises(NotFound):
        await storage.delete_file(base, "a/b/c.txt")
    await storage.delete_all(base)
    await storage.delete_all(base)
    assert await storage.list_files(base) == []


async def test_a_container_that_is_not_root_can_read_it_whatever_the_umask(storage: FileStorage) -> None:
    base = storage.directory("default", "fs")
    before = os.umask(0o077)
    try:
        await storage.write(base, "sub/model.safetensors", chunks(b"x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((base / "sub" / "model.safetensors").stat().st_mode) == 0o644
    assert stat.S_IMODE((base / "sub").stat().st_mode) == 0o755
    assert stat.S_IMODE(base.stat().st_mode) == 0o755


async def test_a_large_file_arrives_byte_for_byte(storage: FileStorage) -> None:
    data = os.urandom(5 * files_module.CHUNK_BYTES + 17)
    base = storage.directory("default", "fs")
    await storage.write(base, "w", chunks(*(data[i : i + 70_000] for i in range(0, len(data), 70_000))))
    assert await read(storage, base, "w") == data
    file = await storage.open_file(base, "w")
    assert b"".join([c async for c in file.read(1_000_001, 3_000_000)]) == data[1_000_001:3_000_000]
    file.close()


async def test_an_upload_that_breaks_off_leaves_the_old_file_and_no_rest(storage: FileStorage) -> None:
    base = storage.directory("default", "fs")
    await storage.write(base, "w", chunks(b"old"))

    async def breaks() -> AsyncIterator[bytes]:
        yield b"n" * (2 * files_module.CHUNK_BYTES)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await storage.write(base, "w", breaks())
    assert await read(storage, base, "w") == b"old"
    assert list((storage.root / ".incoming").iterdir()) == []


async def test_an_upload_under_way_is_not_visible_and_goes_when_it_is_cancelled(storage: FileStorage) -> None:
    base = storage.directory("default", "fs")
    begun = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"n" * (2 * files_module.CHUNK_BYTES)
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(storage.write(base, "w", slow()))
    await begun.wait()
    assert await storage.list_files(base) == []
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((storage.root / ".incoming").iterdir()) == []


async def test_what_a_killed_process_left_half_written_is_gone_after_the_next_start(storage: FileStorage) -> None:
    (storage.root / ".incoming" / "draft").write_bytes(b"half")
    again = FileStorage(storage.root)
    await again.open()
    again.close()
    assert list((storage.root / ".incoming").iterdir()) == []


async def test_a_reader_keeps_the_file_it_opened_while_it_is_replaced(storage: FileStorage) -> None:
    base = storage.directory("default", "fs")
    await storage.write(base, "w", chunks(b"old"))
    file = await storage.open_file(base, "w")
    await storage.write(base, "w", chunks(b"newer"))
    assert b"".join([c async for c in file.read(0, file.file.size_bytes)]) == b"old"
    file.close()


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    "path",
    [
        "../secret", "a/../../secret", "/etc/passwd", "", ".", "..", "a//b", "a/", "./a", "a\\..\\b", "a\0b", "a\nb",
        "%2e%2e/secret", "..%2fsecret", "a/%2E%2E/b", "x" * 256, "a/" * 2500 + "a",
    ],
)  # fmt: skip
async def test_a_path_that_leaves_the_fileset_is_refused(storage: FileStorage, path: str) -> None:
    base = storage.directory("default", "fs")
    secret = storage.root / "default" / "secret"
    await storage.write(base, "a/ok", chunks(b"ok"))
    secret.write_bytes(b"canary")
    with pytest.raises(BadRequest):
        await storage.open_file(base, path)
    with pytest.raises(BadRequest):
        await storage.write(base, path, chunks(b"evil"))
    with pytest.raises(BadRequest):
        await storage.delete_file(base, path)
    assert secret.read_bytes() == b"canary"
    assert [f.path for f in await storage.list_files(base)] == ["a/ok"]


@pytest.mark.fault(37)
async def test_links_are_neither_listed_nor_followed(storage: FileStorage, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"canary")
    base = storage.directory("default", "fs")
    base.mkdir(parents=True)
    (base / "folder").symlink_to(outside)
    (base / "file").symlink_to(outside / "secret")
    assert await storage.list_files(base) == []
    for path in ("folder/secret", "file"):
        with pytest.raises(BadRequest, match="symbolic link"):
            await storage.open_file(base, path)
    with pytest.raises(BadRequest, match="symbolic link"):
        await storage.write(base, "folder/new", chunks(b"evil"))
    with pytest.raises((BadRequest, NotFound)):
        await storage.delete_file(base, "folder/secret")
    assert [p.name for p in outside.iterdir()] == ["secret"]
    await storage.write(base, "file", chunks(b"own"))
    assert (outside / "secret").read_bytes() == b"canary"
    assert (base / "file").read_bytes() == b"own"
    await storage.delete_all(base)
    assert (outside / "secret").read_bytes() == b"canary"


async def test_what_is_not_a_plain_file_cannot_be_opened(storage: FileStorage) -> None:
    base = storage.directory("default", "fs")
    base.mkdir(parents=True)
    os.mkfifo(base / "pipe")
    (base / "folder").mkdir()
    for path in ("pipe", "folder", "nothing"):
        with pytest.raises(NotFound):
            await storage.open_file(base, path)


async def test_a_file_where_a_directory_is_needed_is_a_conflict(storage: FileStorage) -> None:
    base = storage.directory("default", "fs")
    await storage.write(base, "a", chunks(b"x"))
    await storage.write(base, "d/x", chunks(b"x"))
    with pytest.raises(Conflict):
        await storage.write(base, "a/b", chunks(b"x"))
    with pytest.raises(Conflict):
        await storage.write(base, "d", chunks(b"x"))
    assert [f.path for f in await storage.list_files(base)] == ["a", "d/x"]


@pytest.mark.fault(17)
async def test_a_full_disk_says_so_and_leaves_nothing(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    base = storage.directory("default", "fs")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(DiskFull):
            await storage.write(base, "w", chunks(b"x"))
    assert list((storage.root / ".incoming").iterdir()) == []
    await storage.write(base, "w", chunks(b"x"))
