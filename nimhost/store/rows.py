"""Entities as rows, and the writes of one transaction."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import aiosqlite
import msgspec
from msgspec import Struct
from msgspec.structs import replace

from nimhost.entities import Entity, Wish
from nimhost.errors import Conflict, HostError, Unstorable
from nimhost.kinds import KINDS, Kind
from nimhost.refs import Ref
from nimhost.store.memory import WHOLE, Rows, Write, after

log = logging.getLogger(__name__)

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
COLUMNS = "kind, workspace, name, id, generation, version, wish, status, created_at, updated_at"
Row = Sequence[Any]
ROWS_AT_ONCE = 100


def now() -> str:
    """RFC 3339, UTC, microseconds, `Z`."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def new_id(prefix: str) -> str:
    number, text = secrets.randbits(128), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return f"{prefix}-{text.rjust(22, '1')}"


class Unreadable(Struct, frozen=True):
    """Stands for a wish that is stored, but is none of its kind. Its row can be listed and deleted, and that is all."""

    problem: str


def is_readable(entity: Entity) -> bool:
    return not isinstance(entity.wish, Unreadable)


def readable(entity: Entity | None) -> Entity | None:
    """Raises HostError for an entity that cannot be read."""
    if entity is None or is_readable(entity):
        return entity
    kind = KINDS[entity.kind]
    where = f" --workspace {entity.workspace}" if entity.workspace else ""
    raise HostError(
        f"{kind.label} '{entity.ref.removeprefix('/')}' cannot be read: {entity.wish.problem}.",
        f"Delete it, and make it again: nimhost {kind.cli} delete {entity.name}{where}",
    )


def _text(entity: Entity, value: Struct) -> str:
    """Raises Unstorable for what could not be read again: nothing else has checked the types of its fields."""
    try:
        text = msgspec.json.encode(value)
        msgspec.json.decode(text, type=type(value))
    except ValueError as error:
        raise Unstorable(
            f"{KINDS[entity.kind].label} '{entity.ref}' is not stored, because it could not be read again: {error}.",
            "This is a fault of nimhost. Nothing was changed; please report it.",
        ) from error
    return text.decode()


def to_entity(row: Row) -> Entity:
    """Its wish is Unreadable where it cannot be read. A status that cannot is as if nothing were known: it is found
    out again."""
    kind, workspace, name, id_, generation, version, wish, status, created_at, updated_at = row
    types, ref = KINDS[kind], f"{workspace}/{name}"
    return Entity(
        kind=kind,
        workspace=workspace,
        name=name,
        id=id_,
        generation=generation,
        version=version,
        wish=decoded(wish, types.wish, ref) or Unreadable(f"what is stored is no {types.label.lower()}"),
        status=decoded(status, types.status, ref) or types.status(),
        created_at=created_at,
        updated_at=updated_at,
    )


def decoded(text: str, type: type[Struct], ref: str) -> Struct | None:
    """What is stored of `ref`; None, and a line in the log, where it is none of its kind."""
    try:
        return msgspec.json.decode(text, type=type)
    except (ValueError, RecursionError) as error:
        log.error("the stored %s of %s cannot be read: %s", type.__name__, ref, error)
        return None


async def find_row(db: aiosqlite.Connection, kind: str, workspace: str, name: str) -> Entity | None:
    rows = await db.execute_fetchall(
        f"SELECT {COLUMNS} FROM {KINDS[kind].source} WHERE kind = ? AND workspace = ? AND name = ?",
        (kind, workspace, name),
    )
    return next(map(to_entity, rows), None)


async def read_rows(db: aiosqlite.Connection, kind: str) -> dict[Ref, Entity]:
    """All of a kind that can be read, the oldest first. Others run meanwhile, however many there are."""
    rows = await db.execute_fetchall(
        f"SELECT {COLUMNS} FROM entities WHERE kind = ? ORDER BY created_at, rowid", (kind,)
    )
    found = {}
    for number, row in enumerate(rows, start=1):
        entity = to_entity(row)
        if is_readable(entity):
            found[Ref(entity.workspace, entity.name)] = entity
        if number % ROWS_AT_ONCE == 0:
            await asyncio.sleep(0)
    return found


async def read_adapters(db: aiosqlite.Connection, models: Sequence[str]) -> list[Entity]:
    """The adapters, of whatever workspace, of these models (`workspace/name`), the oldest first."""
    marks = ",".join("?" * len(models))
    rows = await db.execute_fetchall(
        f"SELECT {COLUMNS} FROM entities WHERE kind = 'adapters' AND json_extract(wish, '$.model') IN ({marks})"
        " ORDER BY created_at, rowid",
        models,
    )
    return [entity for row in rows if is_readable(entity := to_entity(row))]


async def read_unreadable(db: aiosqlite.Connection, column: str, value: str) -> list[Entity]:
    """The rows with that in that column which cannot be read."""
    rows = await db.execute_fetchall(f"SELECT {COLUMNS} FROM entities WHERE {column} = ?", (value,))
    return [entity for row in rows if not is_readable(entity := to_entity(row))]


class Transaction:
    """All of its writes become true together, or none does."""

    def __init__(self, db: aiosqlite.Connection, rows: Rows | None = None) -> None:
        self._db = db
        self._rows = rows or Rows()
        self.writes: list[Write] = []
        """In their order."""
        self.wished: set[tuple[str, str, str]] = set()
        """Kind, workspace and name of every wish that was written."""
        self.wrote = False
        self.after: Callable[[], None] | None = None
        """Called when it is committed, before anybody else can write."""

    async def find(self, kind: str, workspace: str, name: str) -> Entity | None:
        """Raises HostError for one that cannot be read."""
        return readable(await find_row(self._db, kind, workspace, name))

    async def find_unreadable(self, kind: str, workspace: str, name: str) -> Entity | None:
        entity = await find_row(self._db, kind, workspace, name)
        return None if entity is None or is_readable(entity) else entity

    async def unreadable_in(self, workspace: str) -> list[Entity]:
        return await read_unreadable(self._db, "workspace", workspace)

    async def get(self, kind: str, workspace: str, name: str) -> Entity:
        return found(await self.find(kind, workspace, name), KINDS[kind], workspace, name)

    async def all(self, kind: str) -> list[Entity]:
        kept = self._rows.of(kind)
        rows = await read_rows(self._db, kind) if kept is None else after(kept, kind, self.writes)
        return list(rows.values())

    async def adapters_of(self, models: Sequence[str]) -> list[Entity]:
        return await read_adapters(self._db, models)

    async def insert(self, kind: str, workspace: str, name: str, wish: Wish, status: Struct | None = None) -> Entity:
        """Raises AlreadyExists; NotFound for a missing workspace is for the caller to ask about."""
        row = KINDS[kind]
        if await self.find(kind, workspace, name):
            raise row.already_exists(workspace, name, getattr(wish, "model", ""))
        return await self._put(kind, workspace, name, wish, row.status() if status is None else status)

    async def _put(self, kind: str, workspace: str, name: str, wish: Wish, status: Struct) -> Entity:
        id_, time = new_id(KINDS[kind].id_prefix), now()
        entity = Entity(
            kind=kind,
            workspace=workspace,
            name=name,
            id=id_,
            wish=wish,
            status=status,
            created_at=time,
            updated_at=time,
        )
        await self._db.execute(
            f"INSERT INTO entities ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)",
            (kind, workspace, name, id_, 1, 1, _text(entity, wish), _text(entity, status), time, time),
        )
        await self._keep_version(entity)
        self._wished(entity, WHOLE)
        return entity

    async def update_wish(self, entity: Entity, wish: Wish, new_version: bool = False) -> Entity:
        """The entity with another wish, in its current version or as a new one.

        Raises Conflict when the stored wish is not the one that `entity` shows.
        """
        if not entity.generation:  # derived until now: from here on it is stored
            return await self._put(entity.kind, entity.workspace, entity.name, wish, entity.status)
        changed = replace(
            entity,
            wish=wish,
            generation=entity.generation + 1,
            version=entity.version + new_version,
            updated_at=now(),
        )
        text = _text(entity, wish)
        done = await self._db.execute(
            "UPDATE entities SET wish=?, generation=?, version=?, updated_at=? WHERE id=? AND generation=?",
            (text, changed.generation, changed.version, changed.updated_at, entity.id, entity.generation),
        )
        if not done.rowcount:
            raise _overtaken(entity)
        await self._keep_version(changed)
        self._wished(changed, ("wish", "generation", "version", "updated_at"))
        return changed

    async def rewrite_wish(self, entity: Entity, wish: Wish) -> None:
        """Stores the same wish in another form: it is no change, and nobody is woken."""
        await self._db.execute("UPDATE entities SET wish=? WHERE id=?", (_text(entity, wish), entity.id))
        self.writes.append(Write(replace(entity, wish=wish), ("wish",)))
        self.wrote = True

    async def set_status(self, entity: Entity, status: Struct) -> Entity:
        """Raises Conflict when the wish is not the one that `entity` shows any more."""
        changed = replace(entity, status=status, updated_at=now())
        done = await self._db.execute(
            "UPDATE entities SET status=?, updated_at=? WHERE id=? AND generation=?",
            (_text(entity, status), changed.updated_at, entity.id, entity.generation),
        )
        if not done.rowcount:
            raise _overtaken(entity)
        self.writes.append(Write(changed, ("status", "updated_at")))
        self.wrote = True
        return changed

    async def delete(self, entity: Entity) -> None:
        """Whatever is stored under the entity's id, with its versions. Nothing there is no error."""
        await self._db.execute("DELETE FROM entities WHERE id=?", (entity.id,))
        self._wished(entity, ())

    async def has_version(self, entity: Entity, version: int) -> bool:
        if not 0 < version < 2**63:
            return False
        rows = await self._db.execute_fetchall(
            "SELECT 1 FROM versions WHERE entity_id=? AND version=?", (entity.id, version)
        )
        return bool(list(rows))

    async def delete_version(self, entity: Entity, version: int) -> None:
        await self._db.execute("DELETE FROM versions WHERE entity_id=? AND version=?", (entity.id, version))
        self.wrote = True

    async def meta(self, key: str) -> str | None:
        rows = await self._db.execute_fetchall("SELECT value FROM meta WHERE key = ?", (key,))
        return next((row[0] for row in rows), None)

    async def set_meta(self, key: str, value: str) -> None:
        await self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def _wished(self, entity: Entity, fields: tuple[str, ...]) -> None:
        self.writes.append(Write(entity, fields))
        self.wished.add((entity.kind, entity.workspace, entity.name))
        self.wrote = True

    async def _keep_version(self, entity: Entity) -> None:
        if KINDS[entity.kind].versioned:
            await self._db.execute(
                "INSERT OR REPLACE INTO versions VALUES (?,?,?,?)",
                (entity.id, entity.version, _text(entity, entity.wish), entity.updated_at),
            )


def found(entity: Entity | None, kind: Kind, workspace: str, name: str) -> Entity:
    if entity is None:
        raise kind.not_found(workspace, name)
    return entity


def _overtaken(entity: Entity) -> Conflict:
    return Conflict(f"{KINDS[entity.kind].label} '{entity.ref}' was changed by somebody else.", hint="Try again.")
