"""Filesets: where their files are is checked before they are stored, and our own copies go when they go."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace
from starlette.responses import Response

from nimhost.api.access import settings_for_caller
from nimhost.api.http import JsonReply
from nimhost.api.model_rules import check_trust
from nimhost.api.parts import Parts
from nimhost.api.references import users_of
from nimhost.api.resource import Resource, show_entity
from nimhost.api.rules import check_repo_id, check_storage
from nimhost.entities import Entity, HuggingFaceStorage, ModelStatus, Storage
from nimhost.errors import BadRequest, WeightsGated, WeightsMissing
from nimhost.host.weights_wire import Repo
from nimhost.refs import parse_ref
from nimhost.store import Transaction

Json = dict[str, Any]


class Filesets(Resource):
    def check_raw(self, raw: Json) -> None:
        check_storage(raw.get("storage"))

    async def prepare(self, workspace: str, name: str, values: Json, old: Entity | None) -> Json:
        """A revision becomes the commit that it stands for now, where the hub says so quickly: what is deployed later
        is what was looked at. A hub that is away is no reason to refuse."""
        storage = values.get("storage")
        if not isinstance(storage, HuggingFaceStorage) or self.parts.hub is None:
            return values
        check_repo_id(storage.repo_id)
        token = await hub_token(self.parts, storage, workspace)
        try:
            commit = await self.parts.hub.confirm(hub_repo(storage), token)
        except WeightsGated as error:
            raise BadRequest(f"Access denied to storage backend: {error.message}", error.hint) from error
        except WeightsMissing as error:
            raise BadRequest(f"Invalid storage configuration: {error.message}", error.hint) from error
        if commit is None or commit == storage.revision:
            return values
        original = storage.original_revision or storage.revision
        return values | {"storage": replace(storage, revision=commit, original_revision=original)}

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
                check_trust(storage, settings_for_caller(self.parts.settings))
            await tx.set_status(model, ModelStatus())
        if (specs := self.parts.specs) is not None:
            tx.after = lambda: specs.touched([(model.kind, model.workspace, model.name) for model in models])

    async def removed(self, gone: list[Entity]) -> None:
        for fileset in gone:
            await self.parts.files.delete_all(self.parts.files.directory(fileset.workspace, fileset.name))

    async def deleted(self, entity: Entity) -> Response:
        return JsonReply(await show_entity(entity, self.parts))


def hub_repo(storage: HuggingFaceStorage) -> Repo:
    return Repo(storage.repo_id, storage.revision, storage.repo_type, storage.endpoint)


async def hub_token(parts: Parts, storage: HuggingFaceStorage, workspace: str) -> str | None:
    """Raises BadRequest for a secret that does not exist."""
    if storage.token_secret is None:
        return None
    secret = await parts.store.find("secrets", *parse_ref(storage.token_secret, workspace, "storage", "token_secret"))
    if secret is None:
        raise BadRequest(
            f"Secret not found: {storage.token_secret}",
            hint=f"nimhost secrets create {storage.token_secret.rpartition('/')[2]} --from-file -",
        )
    return parts.vault.open(secret.wish.value, secret.ref)
