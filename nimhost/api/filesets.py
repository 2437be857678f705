"""Filesets: where their files are is checked before they are stored, and our own copies go when they go."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace
from starlette.responses import Response

from nimhost.api.access import settings_for_asker
from nimhost.api.http import JsonReply
from nimhost.api.model_rules import check_trust
from nimhost.api.parts import Parts
from nimhost.api.references import users_of
from nimhost.api.resource import Resource, show_entity
from nimhost.api.rules import check_remote, check_storage
from nimhost.config import ngc_api_key
from nimhost.deployments.repos import repo_in
from nimhost.deployments.storage import secret_of
from nimhost.entities import Entity, HuggingFaceStorage, ModelStatus, NgcStorage, Storage
from nimhost.errors import BadRequest, WeightsGated, WeightsMissing
from nimhost.refs import NGC_KEY, parse_ref
from nimhost.store import Transaction

Json = dict[str, Any]


class Filesets(Resource):
    def check_raw(self, raw: Json) -> None:
        check_storage(raw.get("storage"))

    async def prepare(self, workspace: str, name: str, values: Json, old: Entity | None) -> Json:
        """A revision becomes the commit that it stands for now, where the hub says so quickly: what is deployed later
        is what was looked at. A hub that is away is no reason to refuse."""
        storage = values.get("storage")
        if not isinstance(storage, HuggingFaceStorage | NgcStorage) or self.parts.hub is None:
            return values
        check_remote(storage)
        repo = repo_in(storage)
        assert repo is not None
        token = await storage_token(self.parts, storage, workspace)
        try:
            commit = await self.parts.hub.confirm(repo, token)
        except WeightsGated as error:
            raise BadRequest(f"Access denied to storage backend: {error.message}", error.hint) from error
        except WeightsMissing as error:
            raise BadRequest(f"Invalid storage configuration: {error.message}", error.hint) from error
        return values if commit is None else values | {"storage": _pinned(storage, commit)}

    async def insert(self, tx: Transaction, workspace: str, name: str, wish: Any, status: Any) -> Entity:
        await self.parts.files.delete_all(self.parts.files.directory(workspace, name))  # of a former one
        return await super().insert(tx, workspace, name, wish, status)

    async def change(self, tx: Transaction, entity: Entity, wish: Any, named: set[str], new_version: bool) -> Entity:
        if wish.storage != entity.wish.storage:
            await self._move_models(tx, entity, wish.storage)
        return await super().change(tx, entity, wish, named, new_version)

    async def _move_models(self, tx: Transaction, fileset: Entity, storage: Storage) -> None:
        """What was found out of the fileset's models is of other files. Raises Forbidden for code nobody allowed."""
        models = [user for user in await users_of(fileset, tx) if user.kind == "models"]
        for model in models:
            if model.wish.trust_remote_code:
                check_trust(storage, settings_for_asker(self.parts.settings))
            await tx.set_status(model, ModelStatus())
        if (specs := self.parts.specs) is not None:
            tx.after = lambda: specs.touched([(model.kind, model.workspace, model.name) for model in models])

    async def removed(self, gone: list[Entity]) -> None:
        for fileset in gone:
            await self.parts.files.delete_all(self.parts.files.directory(fileset.workspace, fileset.name))
        if self.parts.stock is not None:
            await self.parts.stock.discard(fileset.wish.storage for fileset in gone)

    async def deleted(self, entity: Entity) -> Response:
        return JsonReply(await show_entity(entity, self.parts))


def _pinned(storage: HuggingFaceStorage | NgcStorage, commit: str) -> Storage:
    """With the commit, or the version, that was meant; what was asked for is kept beside it."""
    if isinstance(storage, NgcStorage):
        return replace(storage, version=commit)
    if commit == storage.revision:
        return storage
    return replace(storage, revision=commit, original_revision=storage.original_revision or storage.revision)


async def storage_token(parts: Parts, storage: Storage, workspace: str) -> str | None:
    """What opens it: the value of its secret. Raises BadRequest for one that does not exist."""
    name = secret_of(storage)
    return await token_named(parts, name, workspace) if name else None


async def token_named(parts: Parts, name: str, workspace: str) -> str:
    """The value of a secret. Raises BadRequest for one that does not exist."""
    ref = parse_ref(name, workspace, "storage", "secret")
    secret = await parts.store.find("secrets", *ref)
    if secret is not None:
        return parts.vault.open(secret.wish.value, secret.ref)
    if ref == NGC_KEY and (key := ngc_api_key()):
        return key
    raise BadRequest(f"Secret not found: {name}", hint=f"nimhost secrets create {ref.name} --from-file -")
