"""Virtual models: other names for models. Every served model is one without being stored."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace
from starlette.requests import Request

from nimhost.api.http import query_flag
from nimhost.api.resource import ListQuery, Resource
from nimhost.entities import Entity
from nimhost.errors import Conflict
from nimhost.filters import Compare, Group
from nimhost.store import Transaction


class VirtualModels(Resource):
    async def list_query(self, request: Request) -> ListQuery:
        query = await super().list_query(request)
        if not query_flag(request, "exclude_autoprovisioned"):
            return query
        own = Group("and", (query.filter, Compare("autoprovisioned", "eq", False)))
        return replace(query, filter=own)

    async def change(self, tx: Transaction, entity: Entity, wish: Any, named: set[str], new_version: bool) -> Entity:
        """What a user changed is the user's."""
        mine = wish if "autoprovisioned" in named else replace(wish, autoprovisioned=False)
        return await super().change(tx, entity, mine, named, new_version)

    async def remove(self, tx: Transaction, entity: Entity) -> list[Entity]:
        if not entity.generation:
            raise Conflict(
                f"Virtual model '{entity.ref}' is there because the model of that name is served.",
                hint="It goes when nothing serves that model any more.",
            )
        return await super().remove(tx, entity)
