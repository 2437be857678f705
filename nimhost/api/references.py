"""Who needs an entity that is to be deleted: the references between kinds, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from nimhost.deployments.desired import model_ref
from nimhost.deployments.storage import secret_of
from nimhost.entities import Entity
from nimhost.errors import Conflict, InUse
from nimhost.kinds import KINDS
from nimhost.refs import DEFAULT_WORKSPACE, SYSTEM_WORKSPACE

USERS = {
    "secrets": ("providers", "filesets"),
    "filesets": ("models", "deployment-configs"),
    "models": ("deployment-configs", "virtual-models"),
    "deployment-configs": ("deployments",),
}
"""Kind -> the kinds that may need one. Adapters never block: they go when what they need goes."""


class Reader(Protocol):
    """The store, or a transaction on it."""

    async def find(self, kind: str, workspace: str, name: str) -> Entity | None: ...
    async def all(self, kind: str) -> list[Entity]: ...


def references(entity: Entity) -> Iterator[tuple[str, str]]:
    """What it needs, as (kind, `workspace/name`). A deployment that is going away needs nothing any more."""
    for kind, text in _named_by(entity):
        if text:
            yield kind, text if "/" in text else f"{entity.workspace}/{text}"


def _named_by(entity: Entity) -> Iterator[tuple[str, str | None]]:
    wish = entity.wish
    match entity.kind:
        case "providers":
            yield "secrets", wish.api_key_secret_name
        case "filesets":
            yield "secrets", secret_of(wish.storage)
        case "models":
            yield "filesets", wish.fileset
            yield "filesets", _plugin_of(wish.spec)
        case "deployment-configs":
            yield "models", wish.model_entity_id or str(model_ref(wish.model_spec, entity.workspace) or "")
            yield "filesets", _plugin_of(wish.model_spec)
        case "virtual-models" if entity.generation:  # the others come and go with their models
            yield "models", wish.default_model_entity
        case "deployments" if not wish.deleting:
            yield "deployment-configs", wish.config


def _plugin_of(spec: object) -> str | None:
    tools = getattr(spec, "tool_call_config", None)
    return tools.tool_call_plugin if tools else None


async def users_of(entity: Entity, db: Reader) -> list[Entity]:
    wanted = (entity.kind, entity.ref)
    return [user for kind in USERS.get(entity.kind, ()) for user in await db.all(kind) if wanted in references(user)]


async def users_of_version(config: Entity, version: int, db: Reader) -> list[str]:
    """Deployments that run this very version of a config."""
    if config.kind != "deployment-configs":
        return []
    return [user.ref for user in await users_of(config, db) if user.wish.config_version == version]


async def owner_of(provider: Entity, db: Reader) -> Entity | None:
    """The deployment that a provider was made for."""
    if provider.wish.model_deployment_id != provider.ref:
        return None
    return await db.find("deployments", provider.workspace, provider.name)


async def check_deletable(entity: Entity, db: Reader) -> None:
    """Raises InUse with the users, Conflict for what can never be deleted by itself."""
    if entity.kind == "workspaces" and entity.name in (DEFAULT_WORKSPACE, SYSTEM_WORKSPACE):
        raise Conflict(f"Workspace '{entity.name}' always exists and cannot be deleted.")
    if entity.kind == "providers" and (owner := await owner_of(entity, db)):
        raise Conflict(
            f"Provider '{entity.ref}' belongs to the deployment of that name and goes away with it.",
            hint=f"nimhost inference deployments delete {owner.name} --workspace {owner.workspace}",
        )
    if users := await users_of(entity, db):
        raise in_use(entity, users)


def in_use(entity: Entity, users: Iterable[Entity]) -> InUse:
    names = [f"{KINDS[user.kind].label.lower()} {user.ref}" for user in users]
    hint = f"Used by: {', '.join(names)}. Delete or change them first."
    if entity.kind == "deployment-configs":
        return InUse(
            f"Cannot delete ModelDeploymentConfig '{entity.ref}' because {len(names)} ModelDeployment(s) still"
            " reference it and are not in DELETED status. Delete the dependent deployments first."
            f" Users: {', '.join(names)}",
            hint,
        )
    name = entity.ref if entity.workspace else entity.name
    return InUse(f"{KINDS[entity.kind].label} '{name}' is in use by {', '.join(names)}", hint)
