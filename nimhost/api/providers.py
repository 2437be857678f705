"""Providers: those of deployments are not changed by themselves, and a deleted one is taken off its models."""

from __future__ import annotations

from nimhost.api.references import owner_of
from nimhost.api.resource import Resource
from nimhost.deployments.publish import unlink_provider
from nimhost.entities import Entity
from nimhost.errors import Conflict
from nimhost.store import Transaction


class Providers(Resource):
    async def check_changeable(self, tx: Transaction, entity: Entity) -> None:
        if await owner_of(entity, tx):
            raise Conflict(
                f"Provider '{entity.ref}' belongs to the deployment of that name and cannot be changed by itself.",
                hint="Make a provider of your own with another name, or update the deployment.",
            )

    async def remove(self, tx: Transaction, entity: Entity) -> list[Entity]:
        gone = await super().remove(tx, entity)
        await unlink_provider(tx, entity)
        return gone
