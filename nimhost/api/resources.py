"""Create, get, list, update and delete for every kind, generated from KINDS.

A write is one transaction: what it refers to is looked up, the wish is completed, the rows are written, or nothing is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import FieldInfo, asdict, replace
from msgspec.structs import fields as struct_fields
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimhost.api.decode import read_fields
from nimhost.api.deploy import begin_deletion, check_config_version, config_in_version, insert_deployment
from nimhost.api.http import JsonReply, bad_sort, empty_reply, query_flag, query_int, read_json
from nimhost.api.parts import Parts
from nimhost.api.rules import (
    check_deletable,
    check_storage,
    check_workspace,
    complete,
    find_config,
    owner_of,
)
from nimhost.api.show import Facts, page_of, show
from nimhost.entities import (
    KINDS,
    Deployment,
    DeploymentStatus,
    Entity,
    Kind,
    Model,
    Secret,
)
from nimhost.errors import BadRequest, Conflict
from nimhost.filters import names_field, parse_filter
from nimhost.refs import ALL_WORKSPACES, check_name
from nimhost.store import Store, Transaction, now

Json = dict[str, Any]
Endpoint = Callable[[Request], Awaitable[Response]]


def routes(parts: Parts) -> list[Route]:
    return [route for kind in KINDS.values() for route in Resource(kind, parts).routes()]


async def get_entity(store: Store | Transaction, kind: str, workspace: str, name: str) -> Entity:
    """Raises NotFound: for the workspace when that is what is missing."""
    entity = await store.find(kind, workspace, name)
    if entity is not None:
        return entity
    if KINDS[kind].in_workspace:
        await store.get("workspaces", "", workspace)
    raise KINDS[kind].not_found(workspace, name)


async def show_entity(entity: Entity, parts: Parts, verbose: bool = False) -> Json:
    return show(entity, (await gather_facts([entity], parts, verbose))[0])


async def gather_facts(entities: list[Entity], parts: Parts, verbose: bool = False) -> list[Facts]:
    """What the replies about these rows (of one kind) show beside the rows."""
    following = [(e.workspace, e.wish.config) for e in entities if e.kind == "deployments"]
    latest = await parts.store.current_versions("deployment-configs", following)
    return [
        Facts(
            verbose=verbose,
            config_version=latest.get((e.workspace, e.wish.config)) if e.kind == "deployments" else None,
            progress=parts.host.progress(e) if e.kind == "deployments" else None,
            directory=str(parts.files.directory(e.workspace, e.name)) if e.kind == "filesets" else None,
            hub_endpoint=parts.settings.weights.endpoint,
        )
        for e in entities
    ]


class Resource:
    """The routes of one kind."""

    def __init__(self, kind: Kind, parts: Parts) -> None:
        self.kind = kind
        self.parts = parts
        self._fields = [f for f in struct_fields(kind.wish) if f.name not in kind.internal]
        status_fields = [f for f in struct_fields(kind.status) if f.name in kind.settable_status]
        self._settable = [*self._fields, *status_fields]

    def routes(self) -> list[Route]:
        base = self.kind.path("{workspace}")
        one = f"{base}/{{name}}"
        table: list[tuple[str, str, Endpoint]] = [
            (base, "GET", self.list),
            (base, "POST", self.create),
            (one, "GET", self.get),
            (one, "DELETE", self.delete),
            (
                one,
                *{"PATCH": ("PATCH", self.patch), "PUT": ("PUT", self.put)}.get(self.kind.update, ("POST", self.renew)),
            ),
        ]
        if self.kind.versioned:
            table += [
                (f"{one}/versions", "GET", self.list_versions),
                (f"{one}/versions/{{version}}", "GET", self.get_version),
                (f"{one}/versions/{{version}}", "DELETE", self.delete_version),
            ]
        return [Route(path, endpoint, methods=[method]) for path, method, endpoint in table]

    # --- reading

    async def get(self, request: Request) -> Response:
        entity = await self._named(request, self.parts.store)
        return JsonReply(await show_entity(entity, self.parts, query_flag(request, "verbose")))

    async def list(self, request: Request) -> Response:
        kind, query = self.kind, request.query_params
        workspace = self._workspace(request)
        if kind.in_workspace and workspace != ALL_WORKSPACES:
            await self.parts.store.get("workspaces", "", workspace)
        filter, shown = parse_filter(query.multi_items(), kind)
        everywhere = workspace == ALL_WORKSPACES or names_field(filter, "workspace")
        sort = query.get("sort", kind.sort) if kind.sort is not None else None
        if sort is not None and sort.removeprefix("-") not in kind.sortable:
            raise bad_sort(sort, kind.sortable)
        page = query_int(request, "page", 1, low=1)
        page_size = query_int(request, "page_size", kind.page_size, low=1, high=kind.page_size_max)
        rows, total = await self.parts.store.page(
            kind.key, None if everywhere else workspace, filter=filter, sort=sort, page=page, page_size=page_size
        )
        facts = await gather_facts(rows, self.parts, query_flag(request, "verbose"))
        items = [show(row, fact, nulls=kind.list_nulls) for row, fact in zip(rows, facts, strict=True)]
        return JsonReply(page_of(items, kind, total=total, page=page, page_size=page_size, sort=sort, filter=shown))

    async def list_versions(self, request: Request) -> Response:
        await self._named(request, self.parts.store)
        rows = await self.parts.store.versions(self.kind.key, self._workspace(request), request.path_params["name"])
        return JsonReply([await show_entity(row, self.parts) for row in rows])

    async def get_version(self, request: Request) -> Response:
        return JsonReply(await show_entity(await self._versioned(request), self.parts))

    # --- writing

    async def create(self, request: Request) -> Response:
        raw = await read_json(request)
        if self.kind.key == "filesets":
            check_storage(raw.get("storage"))
        values = self._read(raw, named=True)
        entity = await self._insert(self._workspace(request), check_name(values.pop("name")), values)
        return JsonReply(await show_entity(entity, self.parts), self.kind.create_code)

    async def patch(self, request: Request) -> Response:
        raw = await read_json(request)
        if self.kind.key == "filesets":
            check_storage(raw.get("storage"))
        fields = [f for f in self._fields if not self.kind.updatable or f.name in self.kind.updatable]
        changes = read_fields(fields, raw, partial=True, silent=bool(self.kind.secret))
        async with self.parts.store.transaction() as tx:
            entity = await self._named(request, tx)
            entity = await self._change(tx, entity, replace(entity.wish, **changes), set(changes))
        return JsonReply(await show_entity(entity, self.parts, query_flag(request, "verbose")))

    async def put(self, request: Request) -> Response:
        values = self._read(await read_json(request))
        workspace, name = self._workspace(request), request.path_params["name"]
        if self.kind.upsert and not await self.parts.store.find(self.kind.key, workspace, name):
            entity = await self._insert(workspace, check_name(name), values)
            return JsonReply(await show_entity(entity, self.parts))
        async with self.parts.store.transaction() as tx:
            entity = await self._named(request, tx)
            wish, status = self._halves(values)
            entity = await self._change(tx, entity, wish, set(values))
            if status:
                entity = await tx.set_status(entity, replace(entity.status, **status))
        return JsonReply(await show_entity(entity, self.parts))

    async def renew(self, request: Request) -> Response:
        """A new version: everything is as the body says, but for the fields that a kind keeps."""
        values = self._read(await read_json(request))
        old = await self._named(request, self.parts.store)
        await self._check_host(old.workspace, values)
        async with self.parts.store.transaction() as tx:
            entity = await self._named(request, tx)
            kept = {key: value for key, value in asdict(entity.wish).items() if key in self.kind.kept}
            wish = self.kind.wish(**(kept | values))
            entity = await self._change(tx, entity, wish, set(values), new_version=True)
            if isinstance(entity.status, DeploymentStatus):
                moved = entity.status.moved("PENDING", "Deployment update pending", now())
                entity = await tx.set_status(entity, moved)
        return JsonReply(await show_entity(entity, self.parts), self.kind.create_code)

    async def delete(self, request: Request) -> Response:
        async with self.parts.store.transaction() as tx:
            entity = await self._named(request, tx)
            await check_deletable(entity, tx)
            if self.kind.key == "deployments":
                await begin_deletion(tx, entity)
            else:
                await tx.delete(entity)
        if self.kind.key == "filesets":
            await self.parts.files.delete_all(self.parts.files.directory(entity.workspace, entity.name))
        return await self._deleted(entity)

    async def delete_version(self, request: Request) -> Response:
        """An old version. The current one is what the entity is; it goes with the entity or after a newer one."""
        old = await self._versioned(request)
        async with self.parts.store.transaction() as tx:
            entity = await self._named(request, tx)
            if old.version == entity.version:
                raise Conflict(
                    f"Version {old.version} is the current one of '{entity.ref}' and cannot be deleted by itself.",
                    hint="Delete the whole entity, or make a newer version first.",
                )
            pinned = [
                e.ref
                for e in await tx.all("deployments")
                if self.kind.key == "deployment-configs"
                and (e.workspace, e.wish.config, e.wish.config_version) == (entity.workspace, entity.name, old.version)
            ]
            if pinned:
                raise Conflict(f"Version {old.version} of '{entity.ref}' is used by deployments: {', '.join(pinned)}")
            await tx.delete_version(entity, old.version)
        return JsonReply(None, 202) if self.kind.delete_code == 202 else empty_reply(204)

    # --- steps

    def _workspace(self, request: Request) -> str:
        return str(request.path_params["workspace"]) if self.kind.in_workspace else ""

    async def _named(self, request: Request, db: Store | Transaction) -> Entity:
        return await get_entity(db, self.kind.key, self._workspace(request), request.path_params["name"])

    async def _versioned(self, request: Request) -> Entity:
        entity, text = await self._named(request, self.parts.store), request.path_params["version"]
        if not (text.isascii() and text.isdigit()):
            raise BadRequest(f"'{text}' is not a version: versions are whole numbers from 1.")
        return await self.parts.store.version(self.kind.key, entity.workspace, entity.name, int(text[:9]))

    def _read(self, raw: Json, named: bool = False) -> Json:
        fields = [*_NAME_FIELD, *self._settable] if named else self._settable
        return read_fields(fields, raw, silent=bool(self.kind.secret))

    def _halves(self, values: Json) -> tuple[Any, Json]:
        status = {key: value for key, value in values.items() if key in self.kind.settable_status}
        return self.kind.wish(**{key: value for key, value in values.items() if key not in status}), status

    async def _insert(self, workspace: str, name: str, values: Json) -> Entity:
        kind = self.kind.key
        await self._check_host(workspace, values)
        wish, status = self._halves(values)
        async with self.parts.store.transaction() as tx:
            if self.kind.in_workspace:
                await check_workspace(workspace, tx)
            if await tx.find(kind, workspace, name):
                raise self.kind.already_exists(workspace, name)
            wish = await complete(kind, wish, workspace, tx, self.parts.settings)
            wish = self._sealed(wish, workspace, name, set(values))
            if kind == "deployments":
                return await insert_deployment(tx, workspace, name, wish)
            if kind == "filesets":
                await self.parts.files.delete_all(self.parts.files.directory(workspace, name))  # of a former one
            return await tx.insert(kind, workspace, name, wish, self.kind.status(**status))

    async def _change(
        self, tx: Transaction, entity: Entity, wish: Any, named: set[str], new_version: bool = False
    ) -> Entity:
        """`named`: the fields that the request carried."""
        await self._check_changeable(tx, entity)
        if "value" in named or not self.kind.secret:
            wish = await complete(entity.kind, wish, entity.workspace, tx, self.parts.settings)
            wish = self._sealed(wish, entity.workspace, entity.name, named)
        if entity.kind == "deployments":
            await check_config_version(tx, entity.workspace, wish)
        return await tx.update_wish(entity, wish, new_version)

    async def _check_changeable(self, tx: Transaction, entity: Entity) -> None:
        if entity.kind == "deployments" and entity.wish.deleting:
            raise Conflict(f"Deployment '{entity.ref}' is being deleted.")
        if entity.kind == "providers" and await owner_of(entity, tx):
            raise Conflict(
                f"Provider '{entity.ref}' belongs to the deployment of that name and cannot be changed by itself.",
                hint="Make a provider of your own with another name, or update the deployment.",
            )

    async def _check_host(self, workspace: str, values: Json) -> None:
        """Before the transaction: it may ask the machine, and nobody should wait for that."""
        if self.kind.key == "deployments" and self.parts.check_deployment is not None:
            wish = Deployment(**values)
            config = await find_config(wish, workspace, self.parts.store)
            if wish.config_version is not None:
                config = await config_in_version(self.parts.store, config, wish.config_version)
            await self.parts.check_deployment(config)

    def _sealed(self, wish: Any, workspace: str, name: str, named: set[str]) -> Any:
        """The wish with the secrets that this request carried sealed; the others are sealed already."""
        vault, ref = self.parts.vault, f"{workspace}/{name}"
        if isinstance(wish, Secret):
            return replace(wish, value=vault.seal(wish.value, ref))
        if isinstance(wish, Model) and "api_endpoint" in named and wish.api_endpoint and wish.api_endpoint.api_key:
            sealed = vault.seal(wish.api_endpoint.api_key, f"{ref}#api_endpoint")
            return replace(wish, api_endpoint=replace(wish.api_endpoint, api_key=sealed))
        return wish

    async def _deleted(self, entity: Entity) -> Response:
        match entity.kind:
            case "workspaces":
                message = "Workspace marked for deletion"
                return JsonReply({"id": entity.id, "message": message, "deleted_count": 1, "deleted_at": now()})
            case "filesets":
                return JsonReply(await show_entity(entity, self.parts))
            case "deployments":
                return JsonReply(None, 202)
        return empty_reply(self.kind.delete_code)


class _Named(Struct):
    name: str


_NAME_FIELD: tuple[FieldInfo, ...] = struct_fields(_Named)
