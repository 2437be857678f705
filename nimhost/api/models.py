"""Models: their specs are found out, a key of an endpoint is sealed, and adapters go when their model goes."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from nimhost.api.access import settings_for_asker
from nimhost.api.model_rules import check_model
from nimhost.api.references import check_deletable
from nimhost.api.resource import Resource
from nimhost.entities import Entity
from nimhost.store import Transaction

ENDPOINT = "#api_endpoint"
"""Added to what a sealed key is bound to."""


class Models(Resource):
    async def insert(self, tx: Transaction, workspace: str, name: str, wish: Any, status: Any) -> Entity:
        await check_model(None, wish, workspace, tx, settings_for_asker(self.parts.settings))
        return await super().insert(tx, workspace, name, wish, status)

    async def change(self, tx: Transaction, entity: Entity, wish: Any, named: set[str], new_version: bool) -> Entity:
        await check_model(entity.wish, wish, entity.workspace, tx, settings_for_asker(self.parts.settings))
        before = entity.wish.api_endpoint
        if "api_endpoint" in named and wish.api_endpoint and wish.api_endpoint.api_key is None and before:
            # No reply shows the key: who sends back what he got means to keep it. "" takes it away.
            wish = replace(wish, api_endpoint=replace(wish.api_endpoint, api_key=before.api_key))
            named = named - {"api_endpoint"}
        return await super().change(tx, entity, wish, named, new_version)

    async def written(self, entity: Entity) -> Entity:
        """With its spec, where that can be had in time."""
        return await self.parts.specs.settle(entity) if self.parts.specs else entity

    def seal(self, wish: Any, ref: str, named: set[str]) -> Any:
        endpoint = wish.api_endpoint
        if "api_endpoint" not in named or not endpoint:
            return wish
        if not endpoint.api_key:
            return replace(wish, api_endpoint=replace(endpoint, api_key=None))
        sealed = self.parts.vault.seal(endpoint.api_key, f"{ref}{ENDPOINT}")
        return replace(wish, api_endpoint=replace(endpoint, api_key=sealed))

    async def remove(self, tx: Transaction, entity: Entity) -> list[Entity]:
        await check_deletable(entity, tx)
        gone = [entity, *await tx.adapters_of([entity.ref])]
        for row in gone:
            await tx.delete(row)
        return gone
