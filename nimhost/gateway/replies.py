"""Replies that the gateway makes itself, pure: the two error envelopes and lists of models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import msgspec

from nimhost.errors import (
    ERROR_HEADER,
    MethodNotAllowed,
    NimhostError,
    NotReady,
    Unauthorized,
    UpstreamTimeout,
    status_of,
)
from nimhost.gateway.headers import RawHeaders
from nimhost.gateway.translate.errors import anthropic_error, openai_error
from nimhost.refs import Ref

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
"""That the gateway passes on."""
ANTHROPIC_PATHS = ("/v1/messages", "/v1/messages/count_tokens")


def error_reply(error: NimhostError, path: str) -> tuple[int, RawHeaders, bytes]:
    """Status, headers and body, in the form that clients of this path know: OpenAI's, or Anthropic's for messages;
    under `/apis` with the `detail` of there as well.
    """
    status = status_of(error)
    known = _envelope(error, status, path)
    body = known if not path.startswith("/apis/") else {"detail": error.message, "hint": error.hint} | known
    headers = [(b"content-type", b"application/json"), (ERROR_HEADER.encode(), type(error).__name__.encode())]
    if isinstance(error, NotReady):
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", ", ".join(METHODS).encode()))
    if _retry_is_harmful(error):
        headers.append((b"x-should-retry", b"false"))
    return status, headers, msgspec.json.encode(body)


def error_event(error: NimhostError, path: str) -> bytes:
    """The last event of a stream that broke off: the typed one where the format of this path has one."""
    status = status_of(error)
    if path.endswith(ANTHROPIC_PATHS):
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(_envelope(error, status, path))
    if path.endswith("/v1/responses"):
        said = {"type": "error", "code": kind_of(error), "message": _sentence(error), "param": None}
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(said)
    return b"data: %b\n\n" % msgspec.json.encode(_envelope(error, status, path))


def _envelope(error: NimhostError, status: int, path: str) -> dict[str, object]:
    if path.endswith(ANTHROPIC_PATHS):
        return anthropic_error(status, _sentence(error))
    return openai_error(status, _sentence(error), kind_of(error))


def _retry_is_harmful(error: NimhostError) -> bool:
    """It cannot help, or makes a busy engine do the same work again: clients retry 5xx twice by themselves."""
    return error.final or isinstance(error, NotReady | UpstreamTimeout)


def kind_of(error: NimhostError) -> str:
    """`NotFound` is `not_found`: OpenAI's `code`, and what errors are counted by."""
    return _in_snake_case(type(error).__name__)


@cache
def _in_snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _sentence(error: NimhostError) -> str:
    if not error.hint:
        return error.message
    end = "" if error.message.endswith((".", "!", "?")) else "."
    return f"{error.message}{end} {error.hint}"


def model_list(refs: Sequence[Ref], created: Mapping[Ref, int]) -> bytes:
    """`created`: Unix times in seconds."""
    return msgspec.json.encode({"object": "list", "data": [_card(ref, created) for ref in refs]})


def model_card(ref: Ref, created: Mapping[Ref, int]) -> bytes:
    return msgspec.json.encode(_card(ref, created))


def ready_note(ref: Ref, host_url: str) -> bytes:
    return msgspec.json.encode({"ready": True, "provider": str(ref), "host_url": host_url})


def _card(ref: Ref, created: Mapping[Ref, int]) -> dict[str, object]:
    return {"id": str(ref), "object": "model", "created": created.get(ref, 0), "owned_by": ref.workspace}
