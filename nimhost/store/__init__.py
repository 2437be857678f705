"""What nimhost remembers: one SQLite file, one generic table, versions, and a signal when a wish changed.

Writes go through one connection, one transaction at a time; reads go through another, one statement each, so that a
read sees a transaction whole or not at all (WAL). A committed wish survives a power cut (`synchronous=FULL`).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiosqlite
from msgspec import Struct
from msgspec.structs import replace

from nimhost.entities import Entity, Workspace
from nimhost.errors import Conflict, NotFound
from nimhost.filters import EVERYTHING, Filter
from nimhost.filters.sql import order_by, to_sql
from nimhost.kinds import KINDS
from nimhost.refs import DEFAULT_WORKSPACE, SYSTEM_WORKSPACE, Ref
from nimhost.store.memory import Rows
from nimhost.store.rows import (
    COLUMNS,
    Transaction,
    decoded,
    find_row,
    found,
    is_readable,
    now,
    read_adapters,
    read_rows,
    read_unreadable,
    readable,
    to_entity,
)
from nimhost.store.schema import connect, open_database, starting, translated

__all__ = ["Store", "Transaction", "is_readable", "now"]


class Store:
    """Raises NotFound, AlreadyExists, Conflict; DiskFull, NotReady (locked) and HostError for what SQLite refuses."""

    def __init__(self, path: Path, db: aiosqlite.Connection, reader: aiosqlite.Connection, owner: str) -> None:
        self.path = path
        self.owner = owner
        """UUID of this installation: the label of everything it creates."""
        self.changed = asyncio.Event()
        """Set after every committed change of a wish. The reconciler clears it."""
        self.listeners: list[Callable[[set[tuple[str, str, str]]], None]] = []
        """Called after every such commit, with kind, workspace and name of all that was written."""
        self.revision = 0
        """Counts commits, of wishes and statuses, since the start of this process."""
        self._moved = asyncio.Event()
        self._rows = Rows()
        self._db = db
        self._reader = reader
        self._writing = asyncio.Lock()

    @classmethod
    async def open(cls, path: Path) -> Store:
        """Creates the file where there is none, and brings an older one up to date.

        Raises StartError when it is locked, damaged, foreign or newer than this nimhost; DiskFull.
        """
        with starting(path):
            db = await open_database(path)
            try:
                await _ensure_workspaces(db)
                owner = next(iter(await db.execute_fetchall("SELECT value FROM meta WHERE key = 'owner'")))[0]
                reader = await connect(path, read_only=True)
            except BaseException:
                await db.close()
                raise
        return cls(path, db, reader, owner)

    async def close(self) -> None:
        """After the transaction that is under way."""
        async with self._writing:
            await self._reader.close()
            await self._db.close()

    async def find(self, kind: str, workspace: str, name: str) -> Entity | None:
        """Raises HostError for one that cannot be read."""
        with translated():
            return readable(await find_row(self._reader, kind, workspace, name))

    async def get(self, kind: str, workspace: str, name: str) -> Entity:
        return found(await self.find(kind, workspace, name), KINDS[kind], workspace, name)

    async def all(self, kind: str) -> list[Entity]:
        """Of every workspace, the oldest first. What cannot be read is left out, and stays as it is."""
        return list((await self.by_ref(kind)).values())

    async def by_ref(self, kind: str) -> dict[Ref, Entity]:
        """All of a kind, the oldest first. They are read once: after that this costs no more than a copy of a dict."""
        kept = self._rows.of(kind)
        if kept is not None:
            return dict(kept)
        seen = self.revision
        with translated():
            rows = await read_rows(self._reader, kind)
        if self.revision == seen:  # nobody wrote meanwhile: from now on these are followed
            self._rows.keep(kind, rows)
        return dict(rows)

    async def page(
        self,
        kind: str,
        workspace: str | None,
        *,
        filter: Filter = EVERYTHING,
        sort: str | None = None,
        page: int = 1,
        page_size: int = 100,
        all_versions: bool = False,
    ) -> tuple[list[Entity], int]:
        """One page (numbered from 1) and the number of all that match; `workspace` None: of every workspace.

        `all_versions`: every version is an entity of its own, with the current status. What cannot be read is among
        them: `is_readable` tells.
        """
        source = f"{'all_versions' if all_versions else KINDS[kind].source} AS entities"
        condition, params = to_sql(filter, KINDS[kind])
        where = f"kind = ? AND {'1' if workspace is None else 'workspace = ?'} AND {condition}"
        params = [kind, *([] if workspace is None else [workspace]), *params]
        order, sort_params = order_by(sort or "created_at", KINDS[kind])
        limits = (page_size, (page - 1) * page_size)
        count = f"SELECT count(*) FROM {source} WHERE {where}"
        select = f"SELECT {COLUMNS}, ({count}) FROM {source} WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?"
        with translated():
            rows = list(await self._reader.execute_fetchall(select, [*params, *params, *sort_params, *limits]))
            if not rows:
                return [], next(iter(await self._reader.execute_fetchall(count, params)))[0]
        return [to_entity(row[:-1]) for row in rows], rows[0][-1]

    async def unreadable(self, kind: str) -> list[Entity]:
        """What is stored of a kind and cannot be read."""
        with translated():
            return await read_unreadable(self._reader, "kind", kind)

    async def adapters_of(self, models: Sequence[str]) -> list[Entity]:
        """The adapters, of whatever workspace, of these models (`workspace/name`), the oldest first."""
        with translated():
            return await read_adapters(self._reader, models)

    async def version(self, kind: str, workspace: str, name: str, version: int) -> Entity:
        """The entity as it was wished in that version. Raises NotFound for the entity or the version."""
        wanted = [e for e in await self.versions(kind, workspace, name) if e.version == version]
        if not wanted:
            raise NotFound(f"{KINDS[kind].label} '{workspace}/{name}' has no version {version}")
        return wanted[0]

    async def versions(self, kind: str, workspace: str, name: str) -> list[Entity]:
        """Every version that can be read, the newest first. The status is the current one. Raises NotFound."""
        entity = await self.get(kind, workspace, name)
        with translated():
            rows = await self._reader.execute_fetchall(
                "SELECT version, wish, created_at FROM versions WHERE entity_id = ? ORDER BY version DESC", (entity.id,)
            )
        return [
            replace(entity, version=number, wish=wish, updated_at=time)
            for number, text, time in rows
            if (wish := decoded(text, KINDS[kind].wish, entity.ref)) is not None
        ]

    async def current_versions(self, kind: str, refs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """The latest version of each of these (workspace, name) that exist."""
        wanted = list(set(refs))
        if not wanted:
            return {}
        marks = ",".join(["(?,?)"] * len(wanted))
        with translated():
            rows = await self._reader.execute_fetchall(
                "SELECT workspace, name, version FROM entities"
                f" WHERE kind = ? AND (workspace, name) IN (VALUES {marks})",
                [kind, *(part for ref in wanted for part in ref)],
            )
        return {(row[0], row[1]): row[2] for row in rows}

    @asynccontextmanager
    async def transaction(self, keep: bool = True) -> AsyncIterator[Transaction]:
        """Everything written in it is committed at its end, or nothing when it raises, or is not to be kept."""
        async with self._writing:
            tx = Transaction(self._db, self._rows)
            try:
                with translated():
                    await self._db.execute("BEGIN IMMEDIATE")
                    yield tx
            except BaseException:
                await _finish(self._db.rollback())
                raise
            await _finish(self._commit(tx) if keep else self._db.rollback())

    async def _commit(self, tx: Transaction) -> None:
        with translated():
            try:
                await self._db.commit()
            except sqlite3.Error:
                with suppress(sqlite3.Error):  # SQLite may have rolled back by itself; the first error counts
                    await self._db.rollback()
                raise
        self._rows.follow(tx.writes)
        if tx.wished:
            self.changed.set()
            for tell in self.listeners:
                tell(tx.wished)
        if tx.wrote:
            self.revision += 1
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()
        if tx.after is not None:
            tx.after()

    async def set_status(self, entity: Entity, status: Struct) -> bool:
        """Writes a status that was found out for the wish in `entity`; False, and no write, when the wish moved on."""
        try:
            async with self.transaction() as tx:
                await tx.set_status(entity, status)
        except Conflict:
            return False
        return True

    def wake(self) -> None:
        """Has the reconciler look at what is no wish: a status that somebody else wrote."""
        self.changed.set()

    async def wait_change(self, seen: int) -> int:
        """Returns the current `revision` as soon as it is another than `seen`: read `revision`, read rows, wait."""
        while self.revision == seen:
            await self._moved.wait()
        return self.revision


async def _finish(work: Awaitable[None]) -> None:
    """Awaits `work` to its end even when we are cancelled, and again: a commit is never left half-way."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


async def _ensure_workspaces(db: aiosqlite.Connection) -> None:
    """In a transaction of its own: an opened store is one that can be written."""
    always = {
        SYSTEM_WORKSPACE: "Platform-provided resources (read-only for users)",
        DEFAULT_WORKSPACE: "General-purpose workspace (all users have write access)",
    }
    await db.execute("BEGIN IMMEDIATE")
    try:
        tx = Transaction(db)
        for name, description in always.items():
            if not await tx.find("workspaces", "", name):
                await tx.insert("workspaces", "", name, Workspace(description=description))
    except BaseException:
        await db.rollback()
        raise
    await db.commit()
