"""Adapters: of a workspace, and of a model by the routes below it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimhost.api.http import read_json
from nimhost.api.parts import Parts
from nimhost.api.resource import Resource, get_entity
from nimhost.entities import Entity, LocalStorage
from nimhost.errors import BadRequest, InvalidRequest, NotFound, Problem
from nimhost.kinds import KINDS
from nimhost.refs import Ref, check_name, parse_ref
from nimhost.store import Store, Transaction

Json = dict[str, Any]


class Adapters(Resource):
    def routes(self) -> list[Route]:
        below = f"{KINDS['models'].path('{workspace}')}/{{model}}/adapters"
        return [
            *super().routes(),
            Route(below, self.create_below, methods=["POST"]),
            Route(f"{below}/{{name}}", self.patch, methods=["PATCH"]),
            Route(f"{below}/{{name}}", self.delete, methods=["DELETE"]),
        ]

    async def create_below(self, request: Request) -> Response:
        raw, workspace = await read_json(request), self.workspace(request)
        if "model" in raw:
            problem = Problem(("body", "model"), "Unknown field: the path names the model", "extra_forbidden")
            raise InvalidRequest("model: the path names the model", problems=(problem,))
        values = self.read(raw | {"model": f"{workspace}/{request.path_params['model']}"}, named=True)
        return await self.create_named(request, workspace, check_name(values.pop("name")), values)

    async def named(self, request: Request, db: Store | Transaction) -> Entity:
        """Below a model, the model has to be there, and the adapter has to be its own."""
        model = request.path_params.get("model")
        if model is None:
            return await super().named(request, db)
        workspace, name = self.workspace(request), request.path_params["name"]
        owner = await get_entity(db, "models", workspace, model)
        adapter = await db.find("adapters", workspace, name)
        if adapter is None or adapter.wish.model != owner.ref:
            raise NotFound(f"Adapter {name} with workspace '{workspace}' and model name '{model}' not found")
        return adapter

    async def prepare(self, workspace: str, name: str, values: Json, old: Entity | None) -> Json:
        if "model" in values:
            model = parse_ref(values["model"], workspace, "model")
            await get_entity(self.parts.store, "models", *model)
            values = values | {"model": str(model)}
        if "fileset" in values:
            await check_not_empty(self.parts, parse_ref(values["fileset"], workspace, "fileset"))
        return values


async def check_not_empty(parts: Parts, ref: Ref) -> None:
    """Raises BadRequest for a local fileset without files; whether it exists is asked elsewhere."""
    fileset = await parts.store.find("filesets", *ref)
    if fileset is None or not isinstance(fileset.wish.storage, LocalStorage):
        return
    if not await parts.files.list_files(parts.files.base(fileset)):
        raise BadRequest(
            f"Fileset {ref}, exists but is empty",
            hint=f"Upload the adapter first: nimhost files upload DIRECTORY/ {ref.name} --workspace {ref.workspace}",
        )
