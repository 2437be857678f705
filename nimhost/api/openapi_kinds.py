"""The routes of the kinds as operations of OpenAPI, generated from KINDS. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from nimhost.api.schemas import NULL, TEXT, record, ref
from nimhost.filters import valid_fields
from nimhost.kinds import Kind

Json = dict[str, Any]
JSON = "application/json"
BODY_ERRORS = (400, 408, 413, 415, 422)


class Operation(Struct, frozen=True, kw_only=True):
    """One method on one path. `replies`: status -> media type -> schema; None for no content."""

    path: str
    method: str
    id: str
    summary: str
    tag: str
    replies: dict[int, dict[str, Json] | None]
    errors: tuple[int, ...] = ()
    query: tuple[Json, ...] = ()
    body: dict[str, Json] | None = None
    links: Json = {}


def query(name: str, schema: Json, description: str = "", **more: Any) -> Json:
    return {"name": name, "in": "query", "schema": schema, "description": description or name, **more}


def flag(name: str, description: str) -> Json:
    return query(name, {"type": "boolean", "default": False}, description)


VERBOSE = flag("verbose", "Show what is long as well.")


# --- the kinds -----------------------------------------------------------------------------------------------------


def of_kind(kind: Kind) -> Iterator[Operation]:
    """What `resources.py` serves for it."""
    base = kind.path("{workspace}")
    one, name, word = f"{base}/{{name}}", kind.wish.__name__, _word(kind)
    tag, label = kind.key, kind.label.lower()
    whole = {JSON: ref(name)}
    dry = flag("dry_run", "Do it, say what it did, and undo it.")
    yield Operation(
        path=base, method="GET", id=f"list_{kind.key.replace('-', '_')}", summary=f"List {label}s", tag=tag,
        replies={200: {JSON: ref(f"{name}Page")}}, errors=(400, 404, 422), query=_list_query(kind),
    )  # fmt: skip
    yield Operation(
        path=base, method="POST", id=f"create_{word}", summary=f"Create a {label}", tag=tag, links=_links(kind),
        replies={200: whole, kind.create_code: whole}, errors=(*BODY_ERRORS, 404, 409), query=(dry,),
        body={JSON: ref(f"{name}Create")},
    )  # fmt: skip
    yield Operation(
        path=one, method="GET", id=f"get_{word}", summary=f"Get a {label}", tag=tag, replies={200: whole},
        errors=(404, 422), query=(VERBOSE,),
    )  # fmt: skip
    yield Operation(
        path=one, method="POST" if kind.versioned else kind.update, id=f"update_{word}", summary=_UPDATES[kind.update],
        tag=tag, replies={kind.create_code if kind.versioned else 200: whole}, errors=(*BODY_ERRORS, 404, 409),
        body={JSON: ref(f"{name}Update")}, query=(dry, VERBOSE) if kind.update == "PATCH" else (dry,),
    )  # fmt: skip
    yield Operation(
        path=one, method="DELETE", id=f"delete_{word}", summary=f"Delete a {label}", tag=tag,
        replies=_deleted(kind), errors=(404, 409, 422), query=(dry,),
    )  # fmt: skip
    if kind.versioned:
        yield from _versions(kind)


def _versions(kind: Kind) -> Iterator[Operation]:
    name, word, label = kind.wish.__name__, _word(kind), kind.label.lower()
    path = f"{kind.path('{workspace}')}/{{name}}/versions"
    yield Operation(
        path=path, method="GET", id=f"list_{word}_versions", summary=f"List the versions of a {label}, newest first",
        tag=kind.key, replies={200: {JSON: {"type": "array", "items": ref(name)}}}, errors=(404,),
    )  # fmt: skip
    yield Operation(
        path=f"{path}/{{version}}", method="GET", id=f"get_{word}_version", summary=f"Get a {label} as it was",
        tag=kind.key, replies={200: {JSON: ref(name)}}, errors=(400, 404),
    )  # fmt: skip
    code = 202 if kind.delete_code == 202 else 204
    yield Operation(
        path=f"{path}/{{version}}", method="DELETE", id=f"delete_{word}_version", summary="Delete an old version",
        tag=kind.key, replies={code: {JSON: NULL} if code == 202 else None}, errors=(404, 409, 422),
        query=(flag("dry_run", "Do it, and undo it."),),
    )  # fmt: skip


_UPDATES = {
    "PATCH": "Change the fields that are there; null means the default",
    "PUT": "Replace it",
    "VERSION": "Make a new version",
}


def _word(kind: Kind) -> str:
    return kind.id_prefix.removeprefix("model-").replace("-", "_")


def _deleted(kind: Kind) -> dict[int, dict[str, Json] | None]:
    """200 also says what would have been deleted."""
    tried, broken = ref("Deletion"), ref("Unreadable")
    if kind.delete_code != 200:
        done = {JSON: {"anyOf": [NULL, broken]}} if kind.delete_code == 202 else None
        return {200: {JSON: tried}, kind.delete_code: done}
    times = {"id": TEXT, "message": TEXT, "deleted_at": TEXT}
    match kind.key:
        case "workspaces":
            done = record(times | {"deleted_count": {"type": "integer"}})
        case "projects":
            done = record(times)
        case _:
            done = ref(kind.wish.__name__)
    return {200: {JSON: {"anyOf": [done, tried, broken]}}}


def _list_query(kind: Kind) -> tuple[Json, ...]:
    fields = dict.fromkeys(valid_fields(kind), TEXT)
    size = {"type": "integer", "minimum": 1, "maximum": kind.page_size_max, "default": kind.page_size}
    found = [query("page", {"type": "integer", "minimum": 1, "default": 1}), query("page_size", size)]
    if kind.sort is not None:
        orders = [f"{way}{field}" for field in kind.sortable for way in ("", "-")]
        found.append(query("sort", {"enum": orders, "default": kind.sort}))
    if kind.versioned:
        found.append(flag("all_versions", "Old versions as well."))
    if kind.key == "models":
        found.append(VERBOSE)
    if kind.key == "virtual-models":
        found.append(flag("exclude_autoprovisioned", "Only those that somebody made."))
    how = 'As `filter[field]=value`, `filter[field][$op]=value`, or as JSON: `filter={"field": {"$op": "value"}}`.'
    schema = {"type": "object", "properties": fields, "additionalProperties": False}
    return (*found, query("filter", schema, how, style="deepObject", explode=True))


def _links(kind: Kind) -> Json:
    """What can be done with something that was just made."""
    where = {"name": "$response.body#/name"}
    if kind.in_workspace:
        where["workspace"] = "$request.path.workspace"
    word = _word(kind)
    ids = [f"get_{word}", f"update_{word}", f"delete_{word}"]
    return {id: {"operationId": id, "parameters": where} for id in ids}
