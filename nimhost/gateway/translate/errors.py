"""Errors in Anthropic's words, and upstreams' errors in the other format. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from nimhost.gateway.bodies import UNREADABLE
from nimhost.gateway.translate.fields import Json

TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Status -> type, as Anthropic has them; any other is `invalid_request_error` below 500 and `api_error` above."""
TEXT_LENGTH = 2000
_encode = msgspec.json.Encoder().encode


def anthropic_error(status: int, message: str) -> Json:
    kind = TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def openai_error(status: int, message: str, code: object) -> Json:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_of_messages(status: int, body: bytes) -> Json:
    """An upstream's error reply for a client that speaks Anthropic's format."""
    return anthropic_error(status, _said(body)[0] or f"The upstream answered with HTTP {status}.")


def error_of_chat(status: int, body: bytes) -> Json:
    """An upstream's error reply for a client that speaks OpenAI's format."""
    message, code = _said(body)
    return openai_error(status, message or f"The upstream answered with HTTP {status}.", code)


def message_of_error(error: object) -> tuple[str, object]:
    """The message and the code (OpenAI) or type (Anthropic) of an error object, in whatever form engines have it."""
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail")
        return _plain(message), error.get("code") or error.get("type")
    return _plain(error), None


def _plain(said: object) -> str:
    if isinstance(said, str):
        return said
    return _encode(said)[:TEXT_LENGTH].decode("utf-8", "replace") if said else ""


def _said(body: bytes) -> tuple[str, object]:
    try:
        found = msgspec.json.decode(body, type=dict[str, Any])
    except UNREADABLE:
        return body[:TEXT_LENGTH].decode("utf-8", "replace").strip(), None
    inner = found.get("error") or found.get("detail") or found
    message, code = message_of_error(inner)
    return message or _plain(inner), code
