"""Replies that the gateway makes itself, pure: the two error envelopes and lists of models."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from nimhost.errors import ERROR_HEADER, BadRequest, NimhostError, NotReady, UpstreamTimeout, status_of
from nimhost.gateway.headers import RawHeaders
from nimhost.refs import Ref


class BodyTooLarge(BadRequest):
    """413."""


class MethodNotAllowed(BadRequest):
    """405."""


_STATUS: dict[type[NimhostError], int] = {BodyTooLarge: 413, MethodNotAllowed: 405}
"""Beside `errors.STATUS`."""


def error_reply(error: NimhostError, *, short: bool) -> tuple[int, RawHeaders, bytes]:
    """Status, headers and body. `short`: the OpenAI envelope alone, else with the `detail` of `/apis` as well."""
    status = _STATUS.get(type(error)) or status_of(error)
    envelope = {"error": _error_object(error, status)}
    body = envelope if short else {"detail": error.message, "hint": error.hint} | envelope
    headers = [(b"content-type", b"application/json"), (ERROR_HEADER.encode(), type(error).__name__.encode())]
    if isinstance(error, NotReady):
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if _retry_is_harmful(error):
        headers.append((b"x-should-retry", b"false"))
    return status, headers, msgspec.json.encode(body)


def error_event(error: NimhostError) -> bytes:
    """The last event of a stream that broke off."""
    return b"data: " + msgspec.json.encode({"error": _error_object(error, status_of(error))}) + b"\n\n"


def _retry_is_harmful(error: NimhostError) -> bool:
    """It cannot help, or makes a busy engine do the same work again: clients retry 5xx twice by themselves."""
    return error.final or isinstance(error, NotReady | UpstreamTimeout)


def _error_object(error: NimhostError, status: int) -> dict[str, object]:
    return {
        "message": _sentence(error),
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": None,
        "code": re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower(),
    }


def _sentence(error: NimhostError) -> str:
    if not error.hint:
        return error.message
    end = "" if error.message.endswith((".", "!", "?")) else "."
    return f"{error.message}{end} {error.hint}"


def model_list(refs: Sequence[Ref]) -> bytes:
    return msgspec.json.encode({"object": "list", "data": [_card(ref) for ref in refs]})


def model_card(ref: Ref) -> bytes:
    return msgspec.json.encode(_card(ref))


def ready_note(ref: Ref, host_url: str) -> bytes:
    return msgspec.json.encode({"ready": True, "provider": str(ref), "host_url": host_url})


def _card(ref: Ref) -> dict[str, object]:
    return {"id": str(ref), "object": "model", "created": 0, "owned_by": ref.workspace}
