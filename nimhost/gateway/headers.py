"""Which headers travel, pure. To the upstream: what the client meant for it, and never whose client it is."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from nimhost.gateway.routes import Route

RawHeaders = list[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer trailers "
    b"transfer-encoding upgrade".split()
)
_NOT_SENT = _HOP_BY_HOP | frozenset(
    b"host authorization cookie x-api-key content-length expect forwarded x-real-ip x-request-id".split()
)
_NOT_SENT_PREFIXES = (b"x-nmp-", b"x-forwarded-")
_NOT_RETURNED = _HOP_BY_HOP | {b"date"}
REQUEST_ID = b"x-request-id"
COMPRESSION = frozenset({b"accept-encoding"})
NOTHING: frozenset[bytes] = frozenset()


@lru_cache(maxsize=1024)
def _sent_name(name: bytes) -> bytes | None:
    """`name: `, or None: stays here."""
    lower = name.lower()
    return None if lower in _NOT_SENT or lower.startswith(_NOT_SENT_PREFIXES) else lower + b": "


@lru_cache(maxsize=1024)
def _returned_name(name: bytes) -> bytes | None:
    lower = name.lower()
    return None if lower in _NOT_RETURNED else lower


def request_headers(
    client: Iterable[tuple[bytes, bytes]], route: Route, request_id: bytes, without: frozenset[bytes] = NOTHING
) -> bytes:
    """What is sent, as lines: the client's headers that may travel, the route's defaults where absent, what the route
    sets. `without`: names of the client's that stay here as well.
    """
    fixed = route.set_names | without if without else route.set_names
    sent = [b"x-request-id: ", request_id, b"\r\n"]
    for name, value in client:
        if name not in fixed and (kept := _sent_name(name)) is not None:
            sent += (kept, value, b"\r\n")
    if route.default_lines:
        present = {name for name, _ in client}
        sent += [line for name, line in route.default_lines if name not in present]
    sent.append(route.set_lines)
    return b"".join(sent)


def reply_headers(upstream: Iterable[tuple[bytes, bytes]], request_id: bytes) -> RawHeaders:
    """What the client gets: everything but hop-by-hop headers and the date, which is ours."""
    kept = [(name, value) for raw, value in upstream if (name := _returned_name(raw)) is not None]
    if find(kept, REQUEST_ID) is None:
        kept.append((REQUEST_ID, request_id))
    return kept


def find(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value; `name` in lower case, as are the names in `headers`."""
    for key, value in headers:
        if key == name:
            return value
    return None
