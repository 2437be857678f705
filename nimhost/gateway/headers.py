"""Which headers travel, pure. To the upstream: what the client meant for it, and never whose client it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nimhost.gateway.routes import Route

RawHeaders = list[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer trailers "
    b"transfer-encoding upgrade".split()
)
_NOT_SENT = _HOP_BY_HOP | frozenset(
    b"host authorization cookie x-api-key content-length expect forwarded x-real-ip x-request-id origin referer".split()
)
"""Which web pages may ask is decided here: Anthropic's API, Ollama or another nimhost would refuse them again."""
_NOT_SENT_PREFIXES = (b"x-nmp-", b"x-forwarded-", b"sec-fetch-")
_NOT_RETURNED = _HOP_BY_HOP | {b"date", b"x-nimhost-overhead-ms"}
REQUEST_ID = b"x-request-id"
OVERHEAD = b"x-nimhost-overhead-ms"
"""Reply header: how long the request was with us, the client's body and the upstream aside."""
COMPRESSION = frozenset({b"accept-encoding"})
NOTHING: frozenset[bytes] = frozenset()
MOST_KNOWN, LONGEST_KNOWN_BYTES = 1024, 100
_NAMES_NOTHING = frozenset({b"keep-alive", b"Keep-Alive", b"close", b"Close", b""})
"""What nearly everybody has in `Connection`."""


class _Names(dict[bytes, bytes]):
    """What becomes of a header, by its name; empty: it does not travel. Names are remembered, but neither many nor long
    ones: a client can think up as many as it likes."""

    def __init__(self, judge: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self._judge = judge

    def __missing__(self, name: bytes) -> bytes:
        found = self._judge(name)
        if len(name) <= LONGEST_KNOWN_BYTES:
            if len(self) >= MOST_KNOWN:
                self.clear()
            self[name] = found
        return found


def _sent_name(name: bytes) -> bytes:
    lower = name.lower()
    return b"" if lower in _NOT_SENT or lower.startswith(_NOT_SENT_PREFIXES) else lower + b": "


def _returned_name(name: bytes) -> bytes:
    lower = name.lower()
    return b"" if lower in _NOT_RETURNED else lower


_sent, _returned = _Names(_sent_name), _Names(_returned_name)


def request_headers(
    client: Iterable[tuple[bytes, bytes]], route: Route, request_id: bytes, without: frozenset[bytes] = NOTHING
) -> bytes:
    """What is sent, as lines: the client's headers that may travel, the route's defaults for what the client does not
    send, what the route sets. `without`: names that stay here as well.
    """
    fixed = route.set_names | without if without else route.set_names
    sent = [b"x-request-id: ", request_id, b"\r\n"]
    for name, value in client:
        if name not in fixed and (kept := _sent[name]):
            sent += (kept, value, b"\r\n")
        elif name == b"connection" and value not in _NAMES_NOTHING:
            return request_headers(_end_to_end(client), route, request_id, without)
    if route.default_lines:
        present = without | {name for name, _ in client if _sent[name]}
        sent += [line for name, line in route.default_lines if name not in present]
    sent.append(route.set_lines)
    return b"".join(sent)


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """Without `Connection` and the headers that it names: they end here (RFC 9110, 7.6.1)."""
    pairs = [(name.lower(), value) for name, value in headers]
    named = {word.strip().lower() for name, value in pairs if name == b"connection" for word in value.split(b",")}
    return [pair for pair in pairs if pair[0] not in named and pair[0] != b"connection"]


def reply_headers(upstream: Iterable[tuple[bytes, bytes]], request_id: bytes) -> RawHeaders:
    """What the client gets: everything but hop-by-hop headers and the date, which is ours."""
    kept = []
    for raw, value in upstream:
        if name := _returned[raw]:
            kept.append((name, value))
        elif value not in _NAMES_NOTHING and raw.lower() == b"connection":
            return reply_headers(_end_to_end(upstream), request_id)
    if find(kept, REQUEST_ID) is None:
        kept.append((REQUEST_ID, request_id))
    return kept


def find(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The last value; `name` in lower case, as are the names in `headers`."""
    return dict(headers).get(name)
