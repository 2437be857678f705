"""Deployments, and what one needs beside its own row: its provider, its history, the wish that it goes away."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace
from starlette.responses import Response

from nimhost.api.http import JsonReply
from nimhost.api.resource import Resource
from nimhost.api.rules import complete, find_config
from nimhost.entities import Deployment, DeploymentStatus, Entity, HistoryEntry, Provider
from nimhost.errors import BadRequest, Conflict
from nimhost.refs import Ref
from nimhost.store import Store, Transaction, now

Json = dict[str, Any]

UNKNOWN_ENGINE_URL = "http://127.0.0.1:0"
"""Of a deployment's provider until the engine listens somewhere."""


async def insert_deployment(tx: Transaction, workspace: str, name: str, wish: Deployment) -> Entity:
    """The deployment and the provider of its name. Raises AlreadyExists when either name is taken."""
    await check_config_version(tx, workspace, wish)
    ref, time = f"{workspace}/{name}", now()
    first = DeploymentStatus()
    history = [HistoryEntry(time, first.status, first.status_message)]
    status = replace(first, status_history=history, model_provider_id=ref)
    entity = await tx.insert("deployments", workspace, name, wish, status)
    provider = Provider(
        host_url=UNKNOWN_ENGINE_URL,
        model_deployment_id=ref,
        description=f"Auto-created provider for deployment {name}",
    )
    await tx.insert("providers", workspace, name, provider)
    return entity


async def check_config_version(tx: Transaction, workspace: str, wish: Deployment) -> None:
    config = await tx.get("deployment-configs", workspace, wish.config)
    if wish.config_version is not None and not await tx.has_version(config, wish.config_version):
        raise _no_version(config, wish.config_version)


async def config_of(wish: Deployment, workspace: str, store: Store) -> Entity:
    """The config that a deployment follows, in the version it is pinned to. Raises BadRequest."""
    config = await find_config(wish, workspace, store)
    return config if wish.config_version is None else await config_in_version(store, config, wish.config_version)


async def config_in_version(store: Store, config: Entity, version: int) -> Entity:
    rows = await store.versions("deployment-configs", config.workspace, config.name)
    found = next((row for row in rows if row.version == version), None)
    if found is None:
        raise _no_version(config, version)
    return found


def _no_version(config: Entity, version: int) -> BadRequest:
    return BadRequest(
        f"Deployment config '{config.ref}' has no version {version}",
        hint=f"The latest is {config.version}; leave config_version out to follow it.",
    )


async def begin_deletion(tx: Transaction, entity: Entity) -> None:
    """The wish that it goes away. Asking again changes nothing."""
    if entity.wish.deleting:
        return
    entity = await tx.update_wish(entity, replace(entity.wish, deleting=True))
    await tx.set_status(entity, entity.status.moved("DELETING", "Deployment deletion requested", now()))


class Deployments(Resource):
    async def prepare(self, workspace: str, name: str, values: Json, old: Entity | None) -> Json:
        """Refuses what this machine can never run."""
        if self.parts.check_deployment is not None:
            wish = Deployment(**values)
            await self.parts.check_deployment(await config_of(wish, workspace, self.parts.store), wish.force)
        return values

    async def foreseen(self, entity: Entity) -> Json:
        """The plan of what it would become."""
        if self.parts.previews is None:
            return {}
        config = await config_of(entity.wish, entity.workspace, self.parts.store)
        return {"plan": await self.parts.previews.explain(config)}

    async def insert(self, tx: Transaction, workspace: str, name: str, wish: Any, status: Any) -> Entity:
        return await insert_deployment(tx, workspace, name, wish)

    async def check_changeable(self, tx: Transaction, entity: Entity) -> None:
        if entity.wish.deleting:
            raise Conflict(f"Deployment '{entity.ref}' is being deleted.")

    async def change(self, tx: Transaction, entity: Entity, wish: Any, named: set[str], new_version: bool) -> Entity:
        wish = await complete("deployments", wish, entity.workspace, tx, self.parts.settings)
        await check_config_version(tx, entity.workspace, wish)
        entity = await tx.update_wish(entity, wish, new_version)
        pending = entity.status.moved("PENDING", "Deployment update pending", now())
        return await tx.set_status(entity, replace(pending, update=None))

    async def remove(self, tx: Transaction, entity: Entity) -> list[Entity]:
        """Its rows go when its containers have."""
        await begin_deletion(tx, entity)
        ref = Ref(entity.workspace, entity.name)
        provider = await tx.find_unreadable("providers", *ref) or await tx.find("providers", *ref)
        return [entity, *([provider] if provider else [])]

    async def deleted(self, entity: Entity) -> Response:
        return JsonReply(None, 202)
