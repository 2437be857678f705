"""Create, get, list, update and delete for one kind, as its row of KINDS says; kinds that do more inherit from it.

A write is one transaction: what it refers to is looked up, the wish is completed, the rows are written, or nothing is.
With `dry_run=true` all of that happens too, and is undone: the reply says what would have been.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import FieldInfo, asdict, replace
from msgspec.structs import fields as struct_fields
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimhost.api.decode import read_fields
from nimhost.api.http import JsonReply, bad_sort, empty_reply, query_flag, query_int, read_json
from nimhost.api.parts import AdapterLoading, Parts
from nimhost.api.references import check_deletable, users_of_version
from nimhost.api.rules import check_workspace, complete
from nimhost.api.show import Facts, page_of, show, show_unreadable
from nimhost.deployments.storage import ref_in
from nimhost.entities import Entity
from nimhost.errors import BadRequest, Conflict
from nimhost.filters import Filter, names_field, parse_filter
from nimhost.kinds import KINDS, Kind
from nimhost.refs import ALL_WORKSPACES, Ref, check_name
from nimhost.store import Store, Transaction, is_readable

Json = dict[str, Any]
Endpoint = Callable[[Request], Awaitable[Response]]
STEP = 100
"""So many rows are shown at once."""
LEADING = ("deployments", "providers", "secrets", "virtual-models")
"""Kinds that requests find their way by, and of which nobody makes thousands."""


class _Named(Struct):
    name: str


_NAME_FIELD: tuple[FieldInfo, ...] = struct_fields(_Named)


class ListQuery(Struct, frozen=True, kw_only=True):
    """What a list was asked for. `workspace` None: of every workspace."""

    workspace: str | None
    filter: Filter
    shown: Json | None
    sort: str | None
    page: int
    page_size: int
    all_versions: bool = False


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
    latest = await parts.store.current_versions("deployment-configs", following) if following else {}
    models = [e.ref for e in entities if e.kind == "models"]
    adapters: dict[str, list[Entity]] = {}
    for adapter in await parts.store.adapters_of(models) if models else ():
        adapters.setdefault(adapter.wish.model, []).append(adapter)
    filesets = await parts.store.by_ref("filesets") if entities and entities[0].kind == "adapters" else {}
    return [
        Facts(
            verbose=verbose,
            config_version=latest.get((e.workspace, e.wish.config)) if e.kind == "deployments" else None,
            progress=parts.host.progress(e) if e.kind == "deployments" else None,
            directory=str(parts.files.directory(e.workspace, e.name)) if e.kind == "filesets" else None,
            hub_endpoint=parts.settings.weights.endpoint,
            loading=_loading(e, parts.adapters, filesets) if e.kind == "adapters" and parts.adapters else None,
            adapters=tuple(adapters.get(e.ref, ())) if e.kind == "models" else (),
        )
        for e in entities
    ]


def _loading(adapter: Entity, loading: AdapterLoading, filesets: Mapping[Ref, Entity]) -> Json:
    """Where it is loaded. An adapter keeps nobody from deleting its files, but says that they are gone."""
    shown = loading.shown(adapter)
    if ref_in(adapter.wish.fileset, adapter.workspace) in filesets:
        return shown
    said = f"Fileset {adapter.wish.fileset} does not exist any more: delete the adapter, or give it another fileset."
    return shown | {"status_message": said}


def is_dry(request: Request) -> bool:
    return query_flag(request, "dry_run")


def would_delete(gone: Sequence[Entity]) -> Response:
    """The reply to a deletion that was only tried."""
    named = [{"kind": e.kind, "workspace": e.workspace or None, "name": e.name} for e in gone]
    return JsonReply({"dry_run": True, "would_delete": named})


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
        update = {"PATCH": ("PATCH", self.patch), "PUT": ("PUT", self.put)}.get(self.kind.update, ("POST", self.renew))
        table: list[tuple[str, str, Endpoint]] = [
            (base, "GET", self.list_page),
            (base, "POST", self.create),
            (one, "GET", self.get),
            (one, "DELETE", self.delete),
            (one, *update),
        ]
        if self.kind.versioned:
            table += [
                (f"{one}/versions", "GET", self.list_versions),
                (f"{one}/versions/{{version}}", "GET", self.get_version),
                (f"{one}/versions/{{version}}", "DELETE", self.delete_version),
            ]
        if self.kind.key in LEADING:
            table = [(path, method, self._followed(method, endpoint)) for path, method, endpoint in table]
        return [Route(path, endpoint, methods=[method]) for path, method, endpoint in table]

    def _followed(self, method: str, endpoint: Endpoint) -> Endpoint:
        """The reply to a change comes when requests go by it: who made a provider may use it at once."""
        follow = self.parts.follow
        if method == "GET" or follow is None:
            return endpoint

        async def change(request: Request) -> Response:
            reply = await endpoint(request)
            await follow()
            return reply

        return change

    # --- what single kinds do differently

    def check_raw(self, raw: Json) -> None:
        """Looks at a body before its fields are read. Raises BadRequest."""

    async def prepare(self, workspace: str, name: str, values: Json, old: Entity | None) -> Json:
        """The values of a create (`old` None) or update, before the transaction: it may ask the machine or the network,
        and nobody should wait for that."""
        return values

    async def insert(self, tx: Transaction, workspace: str, name: str, wish: Any, status: Any) -> Entity:
        return await tx.insert(self.kind.key, workspace, name, wish, status)

    def seal(self, wish: Any, ref: str, named: set[str]) -> Any:
        """The wish with the secrets that this request carried (`named`) sealed; the others are sealed already."""
        return wish

    async def check_changeable(self, tx: Transaction, entity: Entity) -> None:
        """Raises Conflict."""

    async def change(self, tx: Transaction, entity: Entity, wish: Any, named: set[str], new_version: bool) -> Entity:
        """`named`: the fields that the request carried."""
        wish = await complete(entity.kind, wish, entity.workspace, tx, self.parts.settings)
        return await tx.update_wish(entity, self.seal(wish, entity.ref, named), new_version)

    async def written(self, entity: Entity) -> Entity:
        """The entity to show, after a create or an update has been committed."""
        return entity

    async def foreseen(self, entity: Entity) -> Json:
        """What the reply to a create that was only tried tells besides."""
        return {}

    async def remove(self, tx: Transaction, entity: Entity) -> list[Entity]:
        """Deletes it with all that goes along, which it returns. Raises InUse, Conflict, Forbidden."""
        await check_deletable(entity, tx)
        await tx.delete(entity)
        return [entity]

    async def removed(self, gone: list[Entity]) -> None:
        """What is left to do when the rows are gone for good."""

    async def deleted(self, entity: Entity) -> Response:
        return empty_reply(self.kind.delete_code)

    async def rows(self, query: ListQuery) -> tuple[list[Entity], int]:
        """One page, and how many there are."""
        return await self.parts.store.page(
            self.kind.key, query.workspace, filter=query.filter, sort=query.sort, page=query.page,
            page_size=query.page_size, all_versions=query.all_versions,
        )  # fmt: skip

    # --- reading

    async def get(self, request: Request) -> Response:
        entity = await self.named(request, self.parts.store)
        return JsonReply(await show_entity(entity, self.parts, query_flag(request, "verbose")))

    async def list_page(self, request: Request) -> Response:
        query = await self.list_query(request)
        rows, total = await self.rows(query)
        whole = [row for row in rows if is_readable(row)]
        items = await self._shown(rows, iter(await gather_facts(whole, self.parts, query_flag(request, "verbose"))))
        return JsonReply(
            page_of(items, self.kind, total=total, page=query.page, page_size=query.page_size, sort=query.sort,
                    filter=query.shown)
        )  # fmt: skip

    async def _shown(self, rows: list[Entity], facts: Iterator[Facts]) -> list[Json]:
        """`facts` of those that can be read. In steps, so that nobody waits while a large page is made."""
        items: list[Json] = []
        for begin in range(0, len(rows), STEP):
            for row in rows[begin : begin + STEP]:
                shown = show(row, next(facts), nulls=self.kind.list_nulls) if is_readable(row) else show_unreadable(row)
                items.append(shown)
            await asyncio.sleep(0)
        return items

    async def list_query(self, request: Request) -> ListQuery:
        kind, given = self.kind, request.query_params
        workspace = self.workspace(request)
        if kind.in_workspace and workspace != ALL_WORKSPACES:
            await self.parts.store.get("workspaces", "", workspace)
        filter, shown = parse_filter(given.multi_items(), kind)
        everywhere = workspace == ALL_WORKSPACES or (kind.in_workspace and names_field(filter, "workspace"))
        sort = given.get("sort", kind.sort) if kind.sort is not None else None
        if sort is not None and sort.removeprefix("-") not in kind.sortable:
            raise bad_sort(sort, kind.sortable)
        return ListQuery(
            workspace=None if everywhere else workspace, filter=filter, shown=shown, sort=sort,
            page=query_int(request, "page", 1, low=1),
            page_size=query_int(request, "page_size", kind.page_size, low=1, high=kind.page_size_max),
            all_versions=kind.versioned and query_flag(request, "all_versions"),
        )  # fmt: skip

    async def list_versions(self, request: Request) -> Response:
        entity = await self.named(request, self.parts.store)
        rows = await self.parts.store.versions(self.kind.key, entity.workspace, entity.name)
        facts = await gather_facts(rows, self.parts)
        return JsonReply([show(row, fact) for row, fact in zip(rows, facts, strict=True)])

    async def get_version(self, request: Request) -> Response:
        return JsonReply(await show_entity(await self._versioned(request), self.parts))

    # --- writing

    async def create(self, request: Request) -> Response:
        values = self.read(await read_json(request), named=True)
        return await self.create_named(request, self.workspace(request), check_name(values.pop("name")), values)

    async def create_named(self, request: Request, workspace: str, name: str, values: Json) -> Response:
        dry = is_dry(request)
        entity = await self._insert(workspace, name, values, keep=not dry)
        if dry:
            return JsonReply(await show_entity(entity, self.parts) | await self.foreseen(entity))
        return JsonReply(await show_entity(await self.written(entity), self.parts), self.kind.create_code)

    async def patch(self, request: Request) -> Response:
        raw = await read_json(request)
        self.check_raw(raw)
        fields = [f for f in self._fields if not self.kind.updatable or f.name in self.kind.updatable]
        changes = read_fields(fields, raw, partial=True, silent=bool(self.kind.secret))
        old = await self.named(request, self.parts.store)
        changes = await self.prepare(old.workspace, old.name, changes, old)
        async with self.parts.store.transaction(keep=not is_dry(request)) as tx:
            entity = await self.named(request, tx)
            await self.check_changeable(tx, entity)
            entity = await self.change(tx, entity, replace(entity.wish, **changes), set(changes), False)
        entity = entity if is_dry(request) else await self.written(entity)
        return JsonReply(await show_entity(entity, self.parts, query_flag(request, "verbose")))

    async def put(self, request: Request) -> Response:
        values = self.read(await read_json(request))
        workspace, name = self.workspace(request), request.path_params["name"]
        async with self.parts.store.transaction(keep=not is_dry(request)) as tx:
            if self.kind.upsert and not await tx.find(self.kind.key, workspace, name):
                entity = await self._insert_in(tx, workspace, check_name(name), values)
            else:
                entity = await self._replace_in(tx, await self.named(request, tx), values)
        return JsonReply(await show_entity(entity, self.parts))

    async def _replace_in(self, tx: Transaction, entity: Entity, values: Json) -> Entity:
        await self.check_changeable(tx, entity)
        wish, status = self._halves(values)
        entity = await self.change(tx, entity, wish, set(values), False)
        return await tx.set_status(entity, replace(entity.status, **status)) if status else entity

    async def renew(self, request: Request) -> Response:
        """A new version: everything is as the body says, but for the fields that a kind keeps."""
        values = self.read(await read_json(request))
        old = await self.named(request, self.parts.store)
        values = await self.prepare(old.workspace, old.name, values, old)
        async with self.parts.store.transaction(keep=not is_dry(request)) as tx:
            entity = await self.named(request, tx)
            await self.check_changeable(tx, entity)
            kept = {key: value for key, value in asdict(entity.wish).items() if key in self.kind.kept}
            entity = await self.change(tx, entity, self.kind.wish(**(kept | values)), set(values), True)
        return JsonReply(await show_entity(entity, self.parts), self.kind.create_code)

    async def delete(self, request: Request) -> Response:
        dry = is_dry(request)
        async with self.parts.store.transaction(keep=not dry) as tx:
            broken = await tx.find_unreadable(self.kind.key, self.workspace(request), request.path_params["name"])
            if broken:
                await tx.delete(broken)
            else:
                entity = await self.named(request, tx)
                gone = await self.remove(tx, entity)
        if dry:
            return would_delete([broken] if broken else gone)
        if broken:
            code = self.kind.delete_code
            return empty_reply(code) if code == 204 else JsonReply(show_unreadable(broken), code)
        await self.removed(gone)
        return await self.deleted(entity)

    async def delete_version(self, request: Request) -> Response:
        """An old version. The current one is what the entity is; it goes with the entity or after a newer one."""
        old = await self._versioned(request)
        async with self.parts.store.transaction(keep=not is_dry(request)) as tx:
            entity = await self.named(request, tx)
            if old.version == entity.version:
                raise Conflict(
                    f"Version {old.version} is the current one of '{entity.ref}' and cannot be deleted by itself.",
                    hint="Delete the whole entity, or make a newer version first.",
                )
            if users := await users_of_version(entity, old.version, tx):
                raise Conflict(f"Version {old.version} of '{entity.ref}' is used by deployments: {', '.join(users)}")
            await tx.delete_version(entity, old.version)
        return JsonReply(None, 202) if self.kind.delete_code == 202 else empty_reply(204)

    # --- steps

    def workspace(self, request: Request) -> str:
        return str(request.path_params["workspace"]) if self.kind.in_workspace else ""

    async def named(self, request: Request, db: Store | Transaction) -> Entity:
        """The entity in the path. Raises NotFound."""
        return await get_entity(db, self.kind.key, self.workspace(request), request.path_params["name"])

    def read(self, raw: Json, named: bool = False) -> Json:
        """The fields of a body, with the name if `named`. Raises InvalidRequest, BadRequest."""
        self.check_raw(raw)
        fields = [*_NAME_FIELD, *self._settable] if named else self._settable
        return read_fields(fields, raw, silent=bool(self.kind.secret))

    async def _versioned(self, request: Request) -> Entity:
        entity, text = await self.named(request, self.parts.store), request.path_params["version"]
        if not (text.isascii() and text.isdigit()):
            raise BadRequest(f"'{text[:100]}' is not a version: versions are whole numbers from 1.")
        return await self.parts.store.version(self.kind.key, entity.workspace, entity.name, int(text[:9]))

    def _halves(self, values: Json) -> tuple[Any, Json]:
        status = {key: value for key, value in values.items() if key in self.kind.settable_status}
        return self.kind.wish(**{key: value for key, value in values.items() if key not in status}), status

    async def _insert(self, workspace: str, name: str, values: Json, keep: bool) -> Entity:
        if self.kind.in_workspace:
            await check_workspace(workspace, self.parts.store)
        values = await self.prepare(workspace, name, values, None)
        async with self.parts.store.transaction(keep) as tx:
            return await self._insert_in(tx, workspace, name, values)

    async def _insert_in(self, tx: Transaction, workspace: str, name: str, values: Json) -> Entity:
        kind = self.kind
        wish, status = self._halves(values)
        if kind.in_workspace:
            await check_workspace(workspace, tx)
        if await tx.find(kind.key, workspace, name):
            raise kind.already_exists(workspace, name, getattr(wish, "model", ""))
        wish = await complete(kind.key, wish, workspace, tx, self.parts.settings)
        wish = self.seal(wish, f"{workspace}/{name}", set(values))
        return await self.insert(tx, workspace, name, wish, kind.status(**status))
