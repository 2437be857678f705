"""What KINDS says, as JSON Schema: bodies that are taken, and what replies and lists show. Pure.

A stored Struct has up to three forms, because the wire has: as a body (what may be left out has a default), as it is
shown alone (`…Shown`: every field is there, null when empty) and as it is shown in lists (`…Listed`: no nulls).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from nimhost.kinds import KINDS, Kind
from nimhost.refs import NAME_RULE

Json = dict[str, Any]
PREFIX = "#/components/schemas/"
NULL: Json = {"type": "null"}
TEXT: Json = {"type": "string"}
NAME: Json = {
    "type": "string", "pattern": "^[A-Za-z0-9](-?[A-Za-z0-9._])+$", "minLength": 2, "maxLength": 63,
    "description": NAME_RULE,
}  # fmt: skip
TIME: Json = {"type": "string", "format": "date-time"}
OPEN: Json = {"type": "object"}
"""An object with whatever in it."""


def ref(name: str) -> Json:
    return {"$ref": f"{PREFIX}{name}"}


WHOLES = frozenset(kind.wish.__name__ for kind in KINDS.values())
"""A kind's reply has the plain name."""
EXTRA: dict[str, Json] = {
    "models": {"adapters": {"type": "array", "items": ref("Adapter")}},
    "virtual-models": {"entity_id": TEXT},
    "deployments": {"config_version": {"type": "integer"}, "progress": {"anyOf": [OPEN, NULL]}},
}
"""Fields that replies about a kind show beside its halves, or show differently from them."""
SOMETIMES: dict[str, Json] = {
    "deployments": {"warnings": {"type": "array", "items": TEXT}, "plan": OPEN},
    "adapters": {
        "served_name": TEXT,
        "loaded_on": {"type": "array", "items": TEXT},
        "status_message": {"anyOf": [TEXT, NULL]},
    },
}
"""Fields that are there when there is something to say."""


def record(properties: Json, required: Iterable[str] | None = None) -> Json:
    """An object with exactly these fields; all of them are there unless `required` says which."""
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def nullable(schema: Json) -> Json:
    return schema if _takes_null(schema) else {"anyOf": [schema, NULL]}


def components() -> dict[str, Json]:
    """Every named schema: what is nested in the kinds, in three forms, and the bodies and replies of the kinds."""
    kinds = list(KINDS.values())
    _, stored = msgspec.json.schema_components(
        [t for kind in kinds for t in (kind.wish, kind.status)], ref_template=f"{PREFIX}{{name}}"
    )
    wholes = {t.__name__ for kind in kinds for t in (kind.wish, kind.status)}
    found: dict[str, Json] = {}
    for name, schema in stored.items():
        if name not in wholes:
            found |= {name: schema, f"{name}Shown": shown(schema), f"{name}Listed": listed(schema)}
    for kind in kinds:
        wish, status = (stored[t.__name__] for t in (kind.wish, kind.status))
        found |= _of_kind(kind, wish, status)
    return found


def _of_kind(kind: Kind, wish: Json, status: Json) -> dict[str, Json]:
    name = kind.wish.__name__
    body = {key: value for key, value in wish["properties"].items() if key not in kind.internal}
    for key in kind.secret:
        body[key] = body[key] | {"writeOnly": True}
    changes = {key: nullable(value) for key, value in body.items() if not kind.updatable or key in kind.updatable}
    settable = {key: status["properties"][key] for key in kind.settable_status}
    needed = [key for key in wish["required"] if key in body]
    whole = _seen(kind, wish, status)
    sometimes = SOMETIMES.get(kind.key, {})
    return {
        f"{name}Wish": record(body, needed),
        f"{name}Create": record({"name": NAME} | body | settable, ["name", *needed]),
        f"{name}Update": record(changes, []) if kind.update == "PATCH" else record(body | settable, needed),
        name: _with(sometimes, shown(whole)),
        f"{name}Listed": _with(sometimes, shown(whole) if kind.list_nulls else listed(whole)),
        f"{name}Page": _page(kind, {"anyOf": [ref(f"{name}Listed"), ref("Unreadable")]}),
    }


def _seen(kind: Kind, wish: Json, status: Json) -> Json:
    """What a reply shows of an entity, before the rules about nulls."""
    properties = {
        **({"id": TEXT} if kind.has_id else {}),
        "name": TEXT,
        **({"workspace": TEXT} if kind.in_workspace else {}),
        "created_at": TIME,
        "updated_at": TIME,
        **({"entity_version": {"type": "integer", "minimum": 1}} if kind.versioned else {}),
        **status["properties"],
        **wish["properties"],
    }
    properties |= dict.fromkeys(kind.empty_for_null, TEXT)
    properties = {key: value for key, value in properties.items() if key not in (*kind.hidden, *kind.secret)}
    properties |= {key: _like(value) for key, value in kind.fixed.items()}
    return record(properties | EXTRA.get(kind.key, {}))


def _with(sometimes: Json, schema: Json) -> Json:
    return schema | {"properties": schema["properties"] | sometimes}


def _page(kind: Kind, item: Json) -> Json:
    count = {"type": "integer", "minimum": 0}
    numbers = ("page", "page_size", "current_page_size", "total_pages", "total_results")
    properties: Json = {
        "data": {"type": "array", "items": item},
        "pagination": record(dict.fromkeys(numbers, count)),
        **({"sort": TEXT} if kind.sort is not None else {}),
        **({"filter": {"anyOf": [OPEN, NULL]}} if kind.list_nulls else {}),
    }
    return record(properties)


def _like(value: object) -> Json:
    """A schema for what always looks like `value`."""
    match value:
        case None:
            return NULL
        case dict():
            return record({key: _like(inner) for key, inner in value.items()})
        case list():
            return {"type": "array"}
    return {"type": {bool: "boolean", int: "integer"}.get(type(value), "string")}


# --- forms ---------------------------------------------------------------------------------------------------------


def shown(schema: Json) -> Json:
    """As it is in a reply about one thing: all fields are there, and no others."""
    return _form(schema, "Shown", lambda properties: (properties, list(properties)))


def listed(schema: Json) -> Json:
    """As it is in a list: a field that is null is not there."""

    def without_nulls(properties: Json) -> tuple[Json, list[str]]:
        kept = {key: _without_null(value) for key, value in properties.items() if value != NULL}
        return kept, [key for key in kept if not _takes_null(properties[key])]

    return _form(schema, "Listed", without_nulls)


def _form(schema: Json, suffix: str, of_fields: Callable[[Json], tuple[Json, list[str]]]) -> Json:
    if "$ref" in schema:
        whole = schema["$ref"].removeprefix(PREFIX) in WHOLES and suffix == "Shown"
        return {"$ref": f"{schema['$ref']}{'' if whole else suffix}"}
    form = {key: value for key, value in schema.items() if key not in ("default", "title", "discriminator")}
    if "properties" in schema:
        properties, required = of_fields(schema["properties"])
        form |= {
            "properties": {key: _form(value, suffix, of_fields) for key, value in properties.items()},
            "required": required,
            "additionalProperties": False,
        }
    if "anyOf" in schema:
        form["anyOf"] = [_form(choice, suffix, of_fields) for choice in schema["anyOf"]]
    if "items" in schema:
        form["items"] = _form(schema["items"], suffix, of_fields)
    return form


def _takes_null(schema: Json) -> bool:
    return schema == NULL or NULL in schema.get("anyOf", ()) or None in schema.get("enum", ())


def _without_null(schema: Json) -> Json:
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice != NULL]
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        return rest | choices[0] if len(choices) == 1 else rest | {"anyOf": choices}
    if "enum" in schema:
        return schema | {"enum": [choice for choice in schema["enum"] if choice is not None]}
    return schema


def used(components: dict[str, Json], roots: object) -> dict[str, Json]:
    """The components that `roots` refers to, and those that they refer to, by name."""
    found: dict[str, Json] = {}
    waiting = [roots]
    while waiting:
        match waiting.pop():
            case {"$ref": str(path)} if path.startswith(PREFIX) and (name := path.removeprefix(PREFIX)) not in found:
                found[name] = components[name]
                waiting.append(components[name])
            case dict() as node:
                waiting += node.values()
            case list() as nodes:
                waiting += nodes
    return dict(sorted(found.items()))
