"""`/openapi.json`: an OpenAPI 3.1 document of what is served. A test compares it with the routes that there are."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import nimhost
from nimhost.api.openapi_kinds import JSON, Operation, of_kind
from nimhost.api.openapi_others import of_gateway, of_others, of_platform
from nimhost.api.schemas import NAME, OPEN, TEXT, components, nullable, record, ref, used
from nimhost.kinds import KINDS

Json = dict[str, Any]
ERRORS = {
    400: "The request cannot be carried out as written.",
    401: "An access token is needed.",
    403: "The request comes from a foreign host name or web page, or needs a setting or an administrator's token.",
    404: "It does not exist.",
    408: "The body stopped coming.",
    409: "The name is taken, or something else needs it, or somebody else changed it.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    416: "The range is not inside the file.",
    422: "Fields are wrong; `detail` names each of them.",
}
EVERYWHERE = (400, 401, 403)
FAILED = "The daemon or its machine failed, or cannot answer yet (503, with Retry-After)."


def routes() -> list[Route]:
    async def serve(request: Request) -> Response:
        return Response(encoded(), media_type=JSON)

    return [Route("/openapi.json", serve, methods=["GET"])]


@cache
def encoded() -> bytes:
    """The document as it is served, made once."""
    return msgspec.json.encode(document())


def document() -> Json:
    paths: dict[str, Json] = {}
    kinds = [operation for kind in KINDS.values() for operation in of_kind(kind)]
    for operation in (*of_platform(), *kinds, *of_others(), *of_gateway()):
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    for path, item in paths.items():
        item["parameters"] = [_path_parameter(name) for name in re.findall(r"\{(\w+)\}", path)]
    errors = {
        str(code): {"description": text, "content": {JSON: {"schema": ref("Error")}}} for code, text in ERRORS.items()
    }
    errors["5XX"] = {"description": FAILED, "content": {JSON: {"schema": ref("Error")}}}
    schemas = components() | _COMMON
    return {
        "openapi": "3.1.0",
        "info": {"title": "nimhost", "version": nimhost.__version__, "description": nimhost.__doc__ or "nimhost"},
        "servers": [{"url": "/"}],
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {
            "schemas": used(schemas, [paths, errors]),
            "responses": errors,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


_COMMON: dict[str, Json] = {
    "Error": {
        "type": "object",
        "properties": {
            "detail": {"anyOf": [TEXT, {"type": "array", "items": ref("Problem"), "minItems": 1}]},
            "hint": TEXT | {"description": "What to type or to change."},
        },
        "required": ["detail"],
        "additionalProperties": False,
    },
    "Problem": {
        "type": "object",
        "description": "One wrong field.",
        "properties": {
            "type": TEXT,
            "loc": {"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 1},
            "msg": TEXT,
            "input": {},
            "ctx": OPEN,
        },
        "required": ["type", "loc", "msg", "input"],
        "additionalProperties": False,
    },
    "File": record(
        {"file_ref": TEXT, "file_url": TEXT, "path": TEXT, "size": {"type": "integer", "minimum": 0},
         "cache_status": nullable(TEXT)}
    ),
    "Unreadable": {
        "type": "object",
        "description": "In place of something whose stored row cannot be read: the fields of its kind are empty.",
        "properties": {"name": TEXT, "unreadable": TEXT},
        "required": ["name", "unreadable"],
    },
    "ServedModel": record({"model_entity_id": TEXT, "served_model_name": TEXT}),
    "Deletion": record(
        {"dry_run": {"const": True}, "would_delete": {"type": "array", "items": record(
            {"kind": TEXT, "workspace": nullable(TEXT), "name": TEXT}
        )}}
    ),
    "Progress": record(
        {"status": TEXT, "status_message": TEXT, "desired": {"enum": ["running", "stopped"]},
         "update": nullable({"enum": ["rolling", "failed"]}), "progress": nullable(OPEN)}
    ),
}  # fmt: skip


def _operation(o: Operation) -> Json:
    replies: Json = {}
    for code, content in o.replies.items():
        reply: Json = {"description": "Done." if code < 300 else ERRORS[code]}
        if content is not None:
            reply["content"] = {media: {"schema": schema} for media, schema in content.items()}
        if o.links:
            reply["links"] = o.links
        replies[str(code)] = reply
    changes = o.method != "GET" and o.tag != "gateway" and not o.path.endswith("{path}")  # there files come
    for error in sorted({*o.errors, *EVERYWHERE, *((415,) if changes else ())}):
        replies[str(error)] = {"$ref": f"#/components/responses/{error}"}
    replies["5XX"] = {"$ref": "#/components/responses/5XX"}
    found: Json = {"operationId": o.id, "summary": o.summary, "tags": [o.tag], "responses": replies}
    if o.query:
        found["parameters"] = list(o.query)
    if o.body is not None:
        content = {media: {"schema": schema} for media, schema in o.body.items()}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _path_parameter(name: str) -> Json:
    schema = {"version": {"type": "integer", "minimum": 1}, "path": TEXT | {"minLength": 1}}.get(name, NAME)
    return {"name": name, "in": "path", "required": True, "schema": schema}
