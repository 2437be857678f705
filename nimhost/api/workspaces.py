"""Workspaces and projects. A workspace takes everything in it along."""

from __future__ import annotations

from starlette.responses import Response

from nimhost.api.deploy import begin_deletion
from nimhost.api.http import JsonReply
from nimhost.api.references import USERS, check_deletable, in_use, owner_of, references
from nimhost.api.resource import Resource
from nimhost.entities import Entity
from nimhost.kinds import KINDS
from nimhost.store import Transaction, now


class Projects(Resource):
    async def deleted(self, entity: Entity) -> Response:
        return JsonReply({"id": entity.id, "message": "Resource deleted successfully.", "deleted_at": now()})


class Workspaces(Resource):
    """A deleted workspace is gone at once. Deployments in it end as deleted ones do: their rows, and the providers
    that belong to them, go when their containers have."""

    async def remove(self, tx: Transaction, entity: Entity) -> list[Entity]:
        """Raises InUse when something in another workspace needs what is in this one."""
        await check_deletable(entity, tx)
        gone = [e for kind in KINDS if kind != "workspaces" for e in await tx.all(kind) if e.workspace == entity.name]
        if users := await _users_elsewhere(gone, entity.name, tx):
            raise in_use(entity, users)
        models = [e.ref for e in gone if e.kind == "models"]
        gone += [e for e in await tx.adapters_of(models) if e.workspace != entity.name]
        owned = {e.id for e in gone if e.kind == "providers" and await owner_of(e, tx)}
        for row in await tx.unreadable_in(entity.name):
            await tx.delete(row)
        for row in gone:
            if row.kind == "deployments":
                await begin_deletion(tx, row)
            elif row.id not in owned:
                await tx.delete(row)
        await tx.delete(entity)
        return [entity, *gone]

    async def removed(self, gone: list[Entity]) -> None:
        await self.parts.files.delete_all(self.parts.files.root / gone[0].name)

    async def deleted(self, entity: Entity) -> Response:
        message = "Workspace marked for deletion"
        return JsonReply({"id": entity.id, "message": message, "deleted_count": 1, "deleted_at": now()})


async def _users_elsewhere(gone: list[Entity], workspace: str, tx: Transaction) -> list[Entity]:
    used = {(e.kind, e.ref) for e in gone}
    kinds = sorted({kind for users in USERS.values() for kind in users})
    others = [e for kind in kinds for e in await tx.all(kind) if e.workspace != workspace]
    return [e for e in others if used & set(references(e))]
