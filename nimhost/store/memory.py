"""Rows that are read whole again and again: decoded once, then kept in step with what is committed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from msgspec.structs import replace

from nimhost.entities import Entity
from nimhost.refs import Ref

WHOLE = ("*",)


class Write(NamedTuple):
    """One statement of a transaction: which fields of the row are now as in `entity`; WHOLE: it is new; (): gone."""

    entity: Entity
    fields: tuple[str, ...]


def after(rows: Mapping[Ref, Entity], kind: str, writes: Iterable[Write]) -> dict[Ref, Entity]:
    """The rows of `kind` as these writes leave them."""
    found = dict(rows)
    for write in writes:
        if write.entity.kind == kind:
            _apply(found, write)
    return found


class Rows:
    """By kind, then by name, the oldest first. A kind is here once somebody asked for all of it."""

    def __init__(self) -> None:
        self._kinds: dict[str, dict[Ref, Entity]] = {}

    def of(self, kind: str) -> Mapping[Ref, Entity] | None:
        """None: not here yet."""
        return self._kinds.get(kind)

    def keep(self, kind: str, rows: dict[Ref, Entity]) -> None:
        self._kinds[kind] = rows

    def follow(self, writes: Iterable[Write]) -> None:
        """What was committed, in its order."""
        for write in writes:
            if (rows := self._kinds.get(write.entity.kind)) is not None:
                _apply(rows, write)


def _apply(rows: dict[Ref, Entity], write: Write) -> None:
    entity, fields = write
    ref = Ref(entity.workspace, entity.name)
    row = rows.get(ref)
    if fields == WHOLE:
        rows[ref] = entity
    elif row is None or row.id != entity.id:
        return
    elif not fields:
        del rows[ref]
    else:
        rows[ref] = replace(row, **{field: getattr(entity, field) for field in fields})
