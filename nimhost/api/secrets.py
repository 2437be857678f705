"""Secrets: sealed before they are stored, shown by `access` only, and the NGC key that the environment may bring."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimhost.api.http import JsonReply
from nimhost.api.resource import ListQuery, Resource
from nimhost.api.rules import complete
from nimhost.config import ngc_api_key
from nimhost.entities import Entity, Secret
from nimhost.errors import Forbidden, NotFound
from nimhost.refs import NGC_KEY
from nimhost.store import Store, Transaction

Json = dict[str, Any]
VIRTUAL = "environment"
"""The id of the secret that is not stored."""


class Secrets(Resource):
    def routes(self) -> list[Route]:
        one = f"{self.kind.path('{workspace}')}/{{name}}"
        return [*super().routes(), Route(f"{one}/access", self.access, methods=["GET"])]

    async def access(self, request: Request) -> Response:
        secret = await self.named(request, self.parts.store)
        value = ngc_api_key() if secret.id == VIRTUAL else self.parts.vault.open(secret.wish.value, secret.ref)
        body = {"name": secret.name, "workspace": secret.workspace, "value": value}
        return JsonReply(body, headers={"cache-control": "no-store"})

    async def named(self, request: Request, db: Store | Transaction) -> Entity:
        try:
            return await super().named(request, db)
        except NotFound:
            virtual = await environment_secret(db)
            if virtual is None or (self.workspace(request), request.path_params["name"]) != NGC_KEY:
                raise
            return virtual

    async def rows(self, query: ListQuery) -> tuple[list[Entity], int]:
        """The one of the environment comes last."""
        rows, total = await super().rows(query)
        virtual = await environment_secret(self.parts.store)
        if virtual is None or query.shown or query.workspace not in (None, NGC_KEY.workspace):
            return rows, total
        on_page = (query.page - 1) * query.page_size <= total < query.page * query.page_size
        return [*rows, *([virtual] if on_page else [])], total + 1

    def seal(self, wish: Any, ref: str, named: set[str]) -> Any:
        return Secret(value=self.parts.vault.seal(wish.value, ref), description=wish.description)

    async def change(self, tx: Transaction, entity: Entity, wish: Any, named: set[str], new_version: bool) -> Entity:
        if "value" in named:
            wish = await complete("secrets", wish, entity.workspace, tx, self.parts.settings)
            wish = self.seal(wish, entity.ref, named)
        return await tx.update_wish(entity, wish)

    async def check_changeable(self, tx: Transaction, entity: Entity) -> None:
        if entity.id == VIRTUAL:
            raise Forbidden(
                f"Secret '{entity.ref}' comes from the environment variable NGC_API_KEY and cannot be changed here.",
                hint=f"Store one of your own over it: nimhost secrets create {entity.name} --from-file - "
                f"--workspace {entity.workspace}",
            )

    async def remove(self, tx: Transaction, entity: Entity) -> list[Entity]:
        await self.check_changeable(tx, entity)
        return await super().remove(tx, entity)


async def environment_secret(db: Store | Transaction) -> Entity | None:
    """`system/ngc-api-key` as the environment has it, unless one is stored."""
    if ngc_api_key() is None or await db.find("secrets", *NGC_KEY):
        return None
    since = (await db.get("workspaces", "", NGC_KEY.workspace)).created_at
    wish = Secret(value="", description="From the environment variable NGC_API_KEY")
    return Entity(
        kind="secrets", id=VIRTUAL, workspace=NGC_KEY.workspace, name=NGC_KEY.name, wish=wish, created_at=since,
        updated_at=since,
    )  # fmt: skip
