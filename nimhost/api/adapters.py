"""Adapters: of a workspace, and of a model by the routes below it."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec.structs import asdict
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimhost.api.http import read_json
from nimhost.api.parts import Parts
from nimhost.api.resource import Resource, get_entity
from nimhost.deployments.adapters import LOADABLE
from nimhost.entities import Entity, LocalStorage
from nimhost.errors import BadRequest, HostError, InvalidRequest, NotFound, Problem
from nimhost.kinds import KINDS
from nimhost.refs import Ref, check_name, parse_ref
from nimhost.store import Store, Transaction

Json = dict[str, Any]
PATIENCE_S = 3.0
"""So long a hub may take to show what an adapter is."""


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
        wish = {**(asdict(old.wish) if old else {"enabled": True, "lora_config": None}), **values}
        if wish["finetuning_type"] == LOADABLE and (old is None or "fileset" in values or values.get("enabled")):
            await self._check_loadable(wish, workspace)
        return values

    async def _check_loadable(self, wish: Json, workspace: str) -> None:
        """What is wrong with an adapter as far as it can be told at once. A hub that does not answer is no reason to
        refuse it: it is looked at again before it is loaded. Raises InvalidRequest, naming the field."""
        fileset = await self.parts.store.find("filesets", *parse_ref(wish["fileset"], workspace, "fileset"))
        model = await self.parts.store.find("models", *parse_ref(wish["model"], workspace, "model"))
        if self.parts.adapters is None or fileset is None or model is None:
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                rank = await self.parts.adapters.check(fileset, model)
        except (HostError, TimeoutError):
            return
        said = wish["lora_config"]
        if said is not None and rank and said.rank != rank:
            raise InvalidRequest.field(f"the files of {fileset.ref} have rank {rank}", "lora_config", "rank")
        problem = self.parts.adapters.refusal(rank, Ref(model.workspace, model.name)) if wish["enabled"] else None
        if problem is not None:
            raise InvalidRequest.field(problem, "fileset")

    async def written(self, entity: Entity) -> Entity:
        """Once engines serve it, or do not any more, where that takes no longer than a request may."""
        if self.parts.adapters is not None:
            await self.parts.adapters.settle(Ref(entity.workspace, entity.name))
        return entity

    async def removed(self, gone: list[Entity]) -> None:
        for row in gone:
            await self.written(row)


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
