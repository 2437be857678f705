"""Is a reply of the control plane one that the OpenAPI document describes?"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import httpx
import jsonschema_rs

from nimhost.api.openapi import document

Json = dict[str, Any]


def complaints(method: str, path: str, status: int, content_type: str, body: bytes) -> list[str]:
    """What the document does not say: the route, the status, the content type, or something about the body."""
    found = _operation(method, path.partition("?")[0])
    if found is None:
        return [] if status in (404, 405) else [f"{method} {path} is not described"]
    reply = found["responses"].get(str(status)) or found["responses"].get(f"{status // 100}XX")
    if reply is None:
        return [f"status {status} of {found['operationId']} is not described"]
    if "$ref" in reply:
        reply = _document()["components"]["responses"][reply["$ref"].rpartition("/")[2]]
    media = reply.get("content", {})
    kind = content_type.partition(";")[0]
    if not body and not media:
        return []
    if kind not in media:
        return [f"content type '{kind}' of {found['operationId']} is not described"]
    if kind != "application/json":
        return []
    validator = _validator(json.dumps(media[kind]["schema"]))
    where = found["operationId"]
    return [f"{where}: {list(e.instance_path)}: {e.message[:300]}" for e in validator.iter_errors(json.loads(body))]


async def as_described(reply: httpx.Response) -> None:
    """For `event_hooks` of a client: every reply in JSON of the control plane is one that the document describes."""
    path, kind = reply.request.url.raw_path.decode(), reply.headers.get("content-type", "")
    if not path.startswith("/apis/") or path.startswith("/apis/inference-gateway/") or kind != "application/json":
        return
    await reply.aread()
    wrong = complaints(reply.request.method, path, reply.status_code, kind, reply.content)
    assert wrong == [], f"{reply.request.method} {path}: {wrong}"


@cache
def _document() -> Json:
    return document()


@cache
def _paths() -> list[tuple[re.Pattern[str], Json]]:
    """The ones without parameters first, as a server would look them up."""
    paths = sorted(_document()["paths"].items(), key=lambda item: item[0].count("{"))
    return [(re.compile(_pattern(path)), item) for path, item in paths]


def _pattern(path: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda m: ".+" if m[1] == "path" else "[^/]+", path)


def _operation(method: str, path: str) -> Json | None:
    for pattern, item in _paths():
        if pattern.fullmatch(path) and method.lower() in item:
            operation: Json = item[method.lower()]
            return operation
    return None


@cache
def _validator(schema: str) -> Any:
    root = {"$schema": "https://json-schema.org/draft/2020-12/schema", "components": _document()["components"]}
    return jsonschema_rs.validator_for({**root, **json.loads(schema)})
