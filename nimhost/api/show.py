"""Entities -> JSON of replies. Pure."""

from __future__ import annotations

import math
from typing import Any

from msgspec import NODEFAULT, Struct, to_builtins
from msgspec.structs import FieldInfo
from msgspec.structs import fields as struct_fields

from nimhost.entities import DeploymentStatus, Entity, LocalStorage, Model
from nimhost.kinds import KINDS, Kind
from nimhost.models.spec import with_spec
from nimhost.runs import Update

Json = dict[str, Any]


class Facts(Struct, frozen=True, kw_only=True):
    """What a reply shows beside the row."""

    verbose: bool = False
    config_version: int | None = None
    """Of a deployment that follows its config: the latest."""
    progress: Json | None = None
    directory: str | None = None
    """Of a fileset that nimhost keeps."""
    hub_endpoint: str | None = None
    adapters: tuple[Entity, ...] = ()
    """Of a model."""
    loading: Json | None = None
    """Of an adapter: where it is loaded, or why not."""


def show(entity: Entity, facts: Facts | None = None, *, nulls: bool = True) -> Json:
    """The entity as clients see it; without its null fields unless `nulls`. What users wrote freely stays as it is."""
    kind = KINDS[entity.kind]
    entity = with_spec(entity) if entity.kind == "models" else entity
    facts = facts or Facts()
    body = _identity(entity, kind) | to_builtins(entity.wish)
    for key, value in to_builtins(entity.status).items():
        if value is not None or key not in body:
            body[key] = value
    for key in (*kind.hidden, *kind.secret):
        body.pop(key, None)
    for key in kind.empty_for_null:
        body[key] = body[key] or ""
    body |= kind.fixed
    _adjust(body, entity, facts)
    if entity.kind == "models":
        body["adapters"] = [show(adapter, nulls=nulls) for adapter in facts.adapters]
    return body if nulls else _without_nulls(body, entity)


def show_unreadable(entity: Entity) -> Json:
    """A row whose wish cannot be read, among others of its kind: who reads them all finds the fields of a kind that
    has nothing in them."""
    kind, problem = KINDS[entity.kind], f"It cannot be read: {entity.wish.problem}. Delete it, and make it again."
    body = {**_identity(entity, kind), **{f.encode_name: _nothing(f) for f in struct_fields(kind.wish)}}
    body = to_builtins(entity.status) | body | kind.fixed
    if "status_message" in body:
        body |= {"status": "ERROR", "status_message": problem}
    return {k: v for k, v in body.items() if k not in (*kind.hidden, *kind.secret)} | {"unreadable": problem}


def _nothing(field: FieldInfo) -> object:
    if not field.required:
        return to_builtins(field.default_factory() if field.default is NODEFAULT else field.default)
    return {} if isinstance(field.type, type) and issubclass(field.type, Struct) else ""


def page_of(
    items: list[Json], kind: Kind, *, total: int, page: int, page_size: int, sort: str | None, filter: Any
) -> Json:
    pages = math.ceil(total / page_size) if total else kind.pages_when_empty
    body: Json = {
        "data": items,
        "pagination": {
            "page": page,
            "page_size": page_size,
            "current_page_size": len(items),
            "total_pages": pages,
            "total_results": total,
        },
    }
    if sort is not None:
        body["sort"] = sort
    if kind.list_nulls:
        body["filter"] = filter
    return body


def _identity(entity: Entity, kind: Kind) -> Json:
    return {
        **({"id": entity.id} if kind.has_id else {}),
        "name": entity.name,
        **({"workspace": entity.workspace} if kind.in_workspace else {}),
        "created_at": entity.created_at,
        "updated_at": entity.updated_at,
        **({"entity_version": entity.version} if kind.versioned else {}),
    }


def _adjust(body: Json, entity: Entity, facts: Facts) -> None:
    """What single kinds show differently from what is stored."""
    match entity.kind:
        case "deployments":
            body["config_version"] = entity.wish.config_version or facts.config_version
            body["progress"] = facts.progress
            body["update"] = update_of(entity, body["config_version"])
            if warnings := (entity.status.run.resolved or {}).get("warnings"):
                body["warnings"] = warnings
        case "filesets" if isinstance(entity.wish.storage, LocalStorage) and not entity.wish.storage.path:
            body["storage"]["path"] = facts.directory
        case "filesets" if "endpoint" in body["storage"]:
            body["storage"]["endpoint"] = body["storage"]["endpoint"] or facts.hub_endpoint
        case "virtual-models":
            body["entity_id"] = entity.id
        case "adapters" if facts.loading is not None:
            body.update(facts.loading)
        case "models":
            _mask_model(body, entity.wish, facts.verbose)


def update_of(deployment: Entity, config_version: int | None) -> Update | None:
    """How its update is going. While its status is about another version than is wished by now, it rolls: the
    reconciler will say more in a moment."""
    status: DeploymentStatus = deployment.status
    if status.status not in ("READY", "ERROR", "LOST") or not status.run.version or deployment.wish.deleting:
        return status.update
    seen = (status.run.version, status.run.config_version) == (deployment.version, config_version or 0)
    return status.update if seen else "rolling"


def _mask_model(body: Json, model: Model, verbose: bool) -> None:
    if model.spec:
        body["spec"] |= {"minimum_gpus_all_weights": None, "minimum_gpus_lora": None}
        if not verbose:
            body["spec"]["linear_layers"] = None
    if model.api_endpoint:
        body["api_endpoint"]["api_key"] = None


def _without_nulls(body: Json, entity: Entity) -> Json:
    """Drops null fields, also those of nested structs; content of free-form fields stays."""
    fixed = KINDS[entity.kind].fixed
    kept: Json = {}
    for key, value in body.items():
        if value is None:
            continue
        if not isinstance(value, dict | list):
            kept[key] = value
            continue
        source = getattr(entity.wish, key, getattr(entity.status, key, None))
        if isinstance(source, Struct) or (isinstance(source, list) and any(isinstance(v, Struct) for v in source)):
            kept[key] = _drop(value, source)
        elif key in fixed and isinstance(value, dict):
            kept[key] = {k: v for k, v in value.items() if v is not None}
        else:
            kept[key] = value
    return kept


def _drop(value: Any, source: Any) -> Any:
    """`value` is how `source` is shown; the two are walked together, because only structs lose their nulls."""
    if isinstance(source, Struct) and isinstance(value, dict):
        return {k: _drop(v, getattr(source, k, None)) for k, v in value.items() if v is not None}
    if isinstance(source, list) and isinstance(value, list):
        return [_drop(v, s) for v, s in zip(value, source, strict=True)]
    return value
