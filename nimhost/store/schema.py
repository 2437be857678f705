"""The file behind the store: tables, migrations, opening it, and SQLite's errors as ours."""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiosqlite

from nimhost.errors import DiskFull, HostError, NimhostError, NotReady, StartError

APPLICATION_ID = 0x6E696D68
"""Marks the file as ours: "nimh"."""
BUSY_TIMEOUT_S = 5.0


# --- the schema ----------------------------------------------------------------------------------------------------


async def _create_tables(db: aiosqlite.Connection) -> None:
    await db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
    await db.execute(
        """CREATE TABLE entities (
            kind TEXT NOT NULL, workspace TEXT NOT NULL, name TEXT NOT NULL, id TEXT NOT NULL UNIQUE,
            generation INTEGER NOT NULL, version INTEGER NOT NULL, wish TEXT NOT NULL, status TEXT NOT NULL,
            created_at TEXT NOT NULL, updated_at TEXT NOT NULL, UNIQUE (kind, workspace, name))"""
    )
    await db.execute("CREATE INDEX entities_by_age ON entities (kind, workspace, created_at)")
    await db.execute("CREATE INDEX entities_by_kind_and_age ON entities (kind, created_at)")
    await db.execute(
        """CREATE TABLE versions (
            entity_id TEXT NOT NULL REFERENCES entities (id) ON DELETE CASCADE, version INTEGER NOT NULL,
            wish TEXT NOT NULL, created_at TEXT NOT NULL, PRIMARY KEY (entity_id, version)) WITHOUT ROWID"""
    )
    await db.execute("INSERT INTO meta VALUES ('owner', ?)", [str(uuid.uuid4())])


_ROW = "kind, workspace, name, id, generation, version, wish, status, created_at, updated_at"


async def _create_views(db: aiosqlite.Connection) -> None:
    await db.execute(
        "CREATE INDEX entities_by_model ON entities (json_extract(wish, '$.model')) WHERE kind = 'adapters'"
    )
    await db.execute(
        """CREATE VIEW all_versions AS SELECT e.rowid AS rowid, e.kind, e.workspace, e.name, e.id, e.generation,
            v.version, v.wish, e.status, e.created_at, v.created_at AS updated_at
            FROM entities e JOIN versions v ON v.entity_id = e.id"""
    )
    # Every model that something serves is a virtual model of its own accord (generation 0), until one is stored.
    await db.execute(
        f"""CREATE VIEW virtual_models AS SELECT rowid AS rowid, {_ROW} FROM entities WHERE kind = 'virtual-models'
            UNION ALL SELECT m.rowid, 'virtual-models', m.workspace, m.name, 'virtual-' || m.id, 0, 1,
            json_object('default_model_entity', m.workspace || '/' || m.name, 'autoprovisioned', json('true')), '{{}}',
            m.created_at, m.updated_at FROM entities m WHERE m.kind = 'models'
            AND m.workspace || '/' || m.name IN (SELECT json_extract(s.value, '$.model_entity_id')
                FROM entities p, json_each(p.status, '$.served_models') s WHERE p.kind = 'providers')
            AND NOT EXISTS (SELECT 1 FROM entities v WHERE v.kind = 'virtual-models'
                AND v.workspace = m.workspace AND v.name = m.name)"""
    )


async def _create_index_of_changes(db: aiosqlite.Connection) -> None:
    await db.execute("CREATE INDEX entities_by_change ON entities (kind, workspace, updated_at)")


MIGRATIONS: list[Callable[[aiosqlite.Connection], Awaitable[None]]] = [
    _create_tables,
    _create_views,
    _create_index_of_changes,
]
"""Each is applied once, in order, in a transaction of its own; `user_version` counts how many were."""


# --- opening -------------------------------------------------------------------------------------------------------


async def connect(path: Path, *, read_only: bool = False) -> aiosqlite.Connection:
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"
    db = await aiosqlite.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    try:
        await db.execute("PRAGMA foreign_keys = ON")
        await db.execute("PRAGMA synchronous = FULL")
    except BaseException:
        await db.close()
        raise
    return db


async def _pragma(db: aiosqlite.Connection, name: str) -> Any:
    return next(iter(await db.execute_fetchall(f"PRAGMA {name}")))[0]


async def _create(path: Path) -> None:
    """A new database under another name, moved to `path` when it is whole: what is at `path` was once complete."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists():  # SQLite would put what is in it into the new one
        raise StartError(
            f"{log} belongs to a database that is not there any more: {path}.",
            hint=f"Move it to where the database is now, or delete it: {log}",
        )
    draft = path.with_name(f"{path.name}.new")
    for name in (draft, draft.with_name(f"{draft.name}-journal")):
        name.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    db = await connect(draft)
    try:
        await db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        await _migrate(db, 0)
    finally:
        await db.close()
    draft.rename(path)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


async def _migrate(db: aiosqlite.Connection, done: int) -> None:
    for number, step in enumerate(MIGRATIONS[done:], start=done + 1):
        await db.execute("BEGIN IMMEDIATE")
        try:
            await step(db)
            await db.execute(f"PRAGMA user_version = {number}")
        except BaseException:
            await db.rollback()
            raise
        await db.commit()


async def open_database(path: Path) -> aiosqlite.Connection:
    """The one connection that writes. Creates the file where there is none; brings an older one up to date.

    Raises StartError for what is not a nimhost database, is damaged, or was written by a newer nimhost.
    """
    if not path.exists():
        await _create(path)
    if not path.stat().st_size:
        raise StartError(f"{path} is empty: it was a database once.", hint=_elsewhere(path))
    path.chmod(0o600)
    db = await connect(path)
    try:
        await _check(db, path)
        await db.execute("PRAGMA journal_mode = WAL")
    except BaseException:
        await db.close()
        raise
    return db


async def _check(db: aiosqlite.Connection, path: Path) -> None:
    known = len(MIGRATIONS)
    if await _pragma(db, "application_id") != APPLICATION_ID:
        raise StartError(f"{path} is not a database of nimhost.", hint=_elsewhere(path))
    if (done := await _pragma(db, "user_version")) > known:
        raise StartError(
            f"{path} was written by a newer nimhost (schema {done}; this one knows up to {known}).",
            hint="Run that version again, or start this one with another --data-dir.",
        )
    if (verdict := await _pragma(db, "quick_check(1)")) != "ok":
        raise StartError(f"{path} is damaged: {verdict}.", hint=_elsewhere(path))
    await _migrate(db, done)


def _elsewhere(path: Path) -> str:
    return f"Move it away, with what is beside it (mv {path}* ELSEWHERE); restore a backup, or start with an empty one."


# --- SQLite's errors as ours ---------------------------------------------------------------------------------------


@contextmanager
def starting(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as e:
        raise _start_error(e, path) from e
    except OSError as e:
        raise StartError(f"The database {path} cannot be opened: {e.strerror}.", hint="See its permissions.") from e


def _start_error(error: sqlite3.Error, path: Path) -> NimhostError:
    reason = _translate(error)
    if isinstance(reason, DiskFull) or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHMSIZE:
        return DiskFull(f"The disk that holds {path} is full.", hint="Free some space there, then start again.")
    if isinstance(reason, NotReady):
        return StartError(f"{path} is locked by another program.", hint=f"See which: fuser -v {path}")
    code = _code(error)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StartError(f"{path} is damaged: {error}.", hint=_elsewhere(path))
    return StartError(f"The database {path} cannot be opened: {error}.", hint="See its permissions and its disk.")


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _translate(error: sqlite3.Error) -> NimhostError:
    code = _code(error)
    if code == sqlite3.SQLITE_FULL:
        return DiskFull(
            "The disk that holds nimhost's database is full: nothing was changed.",
            hint="Free some space in the data directory's file system and try again.",
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return NotReady("The database is locked by another program: nothing was changed.", retry_after_s=1)
    return HostError(f"The database refused: {error}.", hint="Nothing was changed. See the daemon's log and the disk.")


@contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as e:
        raise _translate(e) from e
