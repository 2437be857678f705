"""The writes that a deployment needs beside its own row: its provider, its history, the wish that it goes away."""

from __future__ import annotations

from msgspec.structs import replace

from nimhost.entities import Deployment, DeploymentStatus, Entity, HistoryEntry, Provider
from nimhost.errors import BadRequest
from nimhost.store import Store, Transaction, now

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
