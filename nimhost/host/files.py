"""Local fileset storage: files under one root, written whole or not at all, never outside of it.

A fileset's directory is `<root>/<workspace>/<name>` and can be mounted into a container as it is: what is written is
world-readable, and a file appears under its name only when all of it is on the disk.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from nimhost.entities import Entity
from nimhost.errors import BadRequest, Conflict, DiskFull, HostError, NotFound

T = TypeVar("T")
CHUNK_BYTES = 1 << 20
_DRAFTS = ".incoming"
"""Uploads under way and directories on their way out; emptied at the start. No workspace can have this name."""
_ENCODED = re.compile(r"%(2e|2f|5c|00)", re.IGNORECASE)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoredFile(Struct, frozen=True):
    path: str
    size_bytes: int


class OpenFile:
    """A file held open: its size does not change under a reader, even when it is replaced meanwhile."""

    def __init__(self, storage: FileStorage, fd: int, file: StoredFile) -> None:
        self.file = file
        self._storage = storage
        self._fd = fd

    async def read(self, start: int, stop: int) -> AsyncIterator[bytes]:
        """The bytes from `start` up to, not including, `stop`."""
        while start < stop:
            chunk = await self._storage.run(os.pread, self._fd, min(CHUNK_BYTES, stop - start), start)
            if not chunk:
                raise HostError(f"'{self.file.path}' became shorter while it was read.")
            start += len(chunk)
            yield chunk

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class FileStorage:
    """Files below `root`. Its blocking calls run in threads of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="files")

    async def open(self) -> None:
        """Makes the root and removes what a killed process left half-done."""
        await self.run(self._prepare)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def directory(self, workspace: str, name: str) -> Path:
        """Where the files of a fileset are, whether or not there are any yet."""
        return self.root / workspace / name

    def base(self, fileset: Entity) -> Path:
        """The directory that a local fileset's files are in: its own, or the user's."""
        path = fileset.wish.storage.path
        return Path(path) if path else self.directory(fileset.workspace, fileset.name)

    async def filesets(self) -> list[tuple[str, str]]:
        """Workspace and name of every directory there is."""
        return await self.run(_filesets, self.root)

    async def list_files(self, base: Path, prefix: str = "") -> list[StoredFile]:
        """Every regular file below `base` whose path is `prefix` or lies in it, by path. Links are left out."""
        return await self.run(_list_files, base, prefix)

    async def open_file(self, base: Path, path: str) -> OpenFile:
        """Raises NotFound; BadRequest for a path that leaves `base`."""
        parts = split_path(path)
        return await self.run(self._open_file, base, parts)

    async def open_path(self, path: Path) -> OpenFile:
        """A file that nimhost itself put where it is. Raises NotFound."""
        return await self.run(self._open_path, path)

    async def write(
        self,
        base: Path,
        path: str,
        chunks: AsyncIterator[bytes],
        placing: AbstractAsyncContextManager[None] | None = None,
    ) -> StoredFile:
        """Stores `chunks` under `path`, replacing what was there only when all of it has come and is on the disk.
        `placing` is entered for the moment in which it gets its place: what that raises keeps it from getting it.

        Raises BadRequest for a path that leaves `base`, Conflict where a directory or a file is in the way, DiskFull.
        """
        parts = split_path(path)
        draft = self.root / _DRAFTS / secrets.token_hex(16)
        fd = await self.run(_create_draft, draft)
        try:
            size_bytes = await self._copy(chunks, fd)
            await self.run(os.fsync, fd)
            async with placing or nullcontext():
                await self.run(_publish, draft, base, parts)
        except BaseException:
            # On the loop on purpose: two short calls, and a cancelled upload must not await anything.
            os.close(fd)
            draft.unlink(missing_ok=True)
            raise
        os.close(fd)
        return StoredFile("/".join(parts), size_bytes)

    async def delete_file(self, base: Path, path: str) -> StoredFile:
        """Removes a file, and the directories that are empty without it. Raises NotFound, BadRequest."""
        return await self.run(_delete_file, base, split_path(path))

    async def delete_all(self, base: Path) -> None:
        """Removes a whole fileset directory; nothing there is no error."""
        await self.run(self._delete_all, base)

    async def run(self, work: Callable[..., T], *args: object) -> T:
        def call() -> T:
            with _translated(self.root):
                return work(*args)

        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def _copy(self, chunks: AsyncIterator[bytes], fd: int) -> int:
        size_bytes, buffer = 0, bytearray()
        async for chunk in chunks:
            size_bytes += len(chunk)
            buffer += chunk
            if len(buffer) >= CHUNK_BYTES:
                await self.run(_write_all, fd, bytes(buffer))
                buffer.clear()
        await self.run(_write_all, fd, bytes(buffer))
        return size_bytes

    def _prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o755)
        shutil.rmtree(self.root / _DRAFTS, ignore_errors=True)
        (self.root / _DRAFTS).mkdir(mode=0o700, exist_ok=True)

    def _open_file(self, base: Path, parts: list[str]) -> OpenFile:
        with _directory(base, parts[:-1]) as directory:
            fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise FileNotFoundError
        return OpenFile(self, fd, StoredFile("/".join(parts), found.st_size))

    def _open_path(self, path: Path) -> OpenFile:
        fd = os.open(path, os.O_RDONLY)
        return OpenFile(self, fd, StoredFile(path.name, os.fstat(fd).st_size))

    def _delete_all(self, base: Path) -> None:
        away = self.root / _DRAFTS / secrets.token_hex(16)
        try:
            base.rename(away)
        except FileNotFoundError:
            return
        shutil.rmtree(away)


def split_path(path: str) -> list[str]:
    """The parts of a file's path inside its fileset. Raises BadRequest for one that could lead outside."""
    parts = path.split("/")
    bad = (
        any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        or "\\" in path
        or not path.isprintable()
        or _ENCODED.search(path)
        or len(path.encode()) > 4000
    )
    if bad:
        raise BadRequest(
            f"'{path[:200]}' is not a path inside a fileset.",
            hint="Use a relative path such as data/train.jsonl, without '..', links or empty parts.",
        )
    return parts


# --- blocking, in a thread -----------------------------------------------------------------------------------------


@contextmanager
def _translated(root: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        raise NotFound("There is no such file.") from e
    except (NotADirectoryError, IsADirectoryError) as e:
        raise Conflict("There is a file where the path needs a directory, or the other way round.") from e
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise BadRequest("The path leads through a symbolic link; links in filesets are not followed.") from e
        if e.errno in _FULL:
            raise DiskFull(f"The disk that holds {root} is full.", hint="Free some space there, then try again.") from e
        raise HostError(f"The file system refused: {e.strerror}.", hint=f"See {root}, and who may write there.") from e


@contextmanager
def _directory(base: Path, parts: list[str], *, create: bool = False) -> Iterator[int]:
    """A descriptor of the directory `parts` below `base`, reached step by step and never through a link."""
    if create:
        base.mkdir(parents=True, exist_ok=True)
        base.chmod(0o755)  # what a container mounts: the umask has no say in it
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            if create:
                _make_directory(part, fd)
            inner = _step(part, fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def _step(part: str, fd: int) -> int:
    try:
        return os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    except NotADirectoryError:  # Linux says so of a link as well: it was not followed
        if stat.S_ISLNK(os.stat(part, dir_fd=fd, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, "symbolic link") from None
        raise


def _make_directory(part: str, fd: int) -> None:
    try:
        os.mkdir(part, 0o755, dir_fd=fd)
        os.chmod(part, 0o755, dir_fd=fd)
    except FileExistsError:
        return


def _create_draft(draft: Path) -> int:
    fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    os.fchmod(fd, 0o644)
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _publish(draft: Path, base: Path, parts: list[str]) -> None:
    with _directory(base, parts[:-1], create=True) as directory:
        os.rename(draft, parts[-1], dst_dir_fd=directory)
        os.fsync(directory)


def _delete_file(base: Path, parts: list[str]) -> StoredFile:
    with _directory(base, parts[:-1]) as directory:
        found = os.stat(parts[-1], dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError
        os.unlink(parts[-1], dir_fd=directory)
    for depth in range(len(parts) - 1, 0, -1):
        try:
            with _directory(base, parts[: depth - 1]) as parent:
                os.rmdir(parts[depth - 1], dir_fd=parent)
        except OSError as e:
            if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                break
            raise
    return StoredFile("/".join(parts), found.st_size)


def _filesets(root: Path) -> list[tuple[str, str]]:
    return [(path.parent.name, path.name) for path in root.glob("*/*") if path.parent.name != _DRAFTS and path.is_dir()]


def _list_files(base: Path, prefix: str) -> list[StoredFile]:
    wanted = prefix.strip("/")
    files = []
    for folder, _, names in os.walk(base):
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(base).as_posix()
            if wanted and relative != wanted and not relative.startswith(f"{wanted}/"):
                continue
            try:
                found = path.lstat()
            except FileNotFoundError:  # others use the directory, too
                continue
            if stat.S_ISREG(found.st_mode):
                files.append(StoredFile(relative, found.st_size))
    return sorted(files, key=lambda file: file.path)
