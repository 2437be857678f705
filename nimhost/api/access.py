"""Who may ask for what, pure: decided from the method, the path and the headers of a request, before it goes anywhere.

1. Web pages: the Host header must name this machine, and an Origin must be our own or an allowed one. A page can send
   requests to localhost, and with DNS rebinding under a name of its own.
2. Tokens: what a request presents is looked up by its hash. A known token has its scopes' rights; an unknown one that
   looks like ours is refused, so that a mistake shows. Any other key is nobody's here: the OpenAI SDK cannot do
   without one.
3. Without a token: whoever reaches a loopback address may do everything but the administrator's part. On any other
   address only the open paths are answered.
4. Rights: traffic to models is `inference`, reading the rest `read`, the other requests are `change`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Literal, NamedTuple

from msgspec.structs import replace

from nimhost.config import Settings, ToolCallPlugin, TrustRemoteCode
from nimhost.errors import BadRequest, ConfigError, Forbidden, Unauthorized
from nimhost.tokens import PREFIX, Scope, Token, digest

Right = Literal["inference", "read", "change", "administrate"]
RIGHTS: dict[Scope, frozenset[Right]] = {
    "inference": frozenset({"inference"}),
    "read": frozenset({"read"}),
    "admin": frozenset({"inference", "read", "change", "administrate"}),
}
_ANONYMOUS: frozenset[Right] = frozenset({"inference", "read", "change"})
_LOOKED_AT = frozenset(
    {b"host", b"origin", b"authorization", b"x-api-key", b"sec-fetch-site", b"sec-fetch-dest",
     b"access-control-request-method", b"access-control-request-headers"}
)  # fmt: skip
_TOKEN_START = PREFIX.encode()

Picked = tuple[tuple[bytes, bytes], ...]
Headers = dict[bytes, bytes]


class Asker(NamedTuple):
    """Who asks: the token that was sent, or nobody in particular."""

    rights: frozenset[Right]
    token: Token | None = None

    @property
    def is_administrator(self) -> bool:
        return "administrate" in self.rights


ANONYMOUS = Asker(_ANONYMOUS)
ASKER = ContextVar("asker", default=ANONYMOUS)
"""Who asks for what is being done. Every request has a context of its own, and a rule deep down that forgot to hand the
asker on would be a hole."""


def is_loopback(host: str) -> bool:
    """Only this machine reaches that address. A name that is not `localhost` could mean anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def pick(headers: Iterable[tuple[bytes, bytes]]) -> Picked:
    """The headers that matter here. On the gateway's paths they alone decide, preflights aside."""
    return tuple([pair for pair in headers if pair[0] in _LOOKED_AT])


def read_head(found: Picked) -> Headers:
    """By name. Raises BadRequest when one of them is there twice: two readers could differ."""
    head = dict(found)
    if len(head) != len(found):
        twice = next(name for name in head if [n for n, _ in found].count(name) > 1)
        raise BadRequest(f"The header {twice.decode()} is there twice.", "Send it once.")
    return head


# --- 1. web pages --------------------------------------------------------------------------------------------------


class Guard:
    """Keeps web pages out, of all origins but our own and the allowed ones."""

    def __init__(self, bound: str, hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._any_address = bound in ("0.0.0.0", "::")
        self._names = {"localhost", bound.lower(), *(name.lower() for name in hosts)}
        self._origins = {check_origin(origin).encode() for origin in origins}
        self._knows = lru_cache(maxsize=256)(self._is_ours)

    def check(self, head: Headers, method: str, to_gateway: bool) -> bytes | None:
        """The allowed origin that a request comes from; None: not from a page of another origin. Raises Forbidden."""
        host = head.get(b"host", b"")
        if not self._knows(host):
            raise Forbidden(
                f"Requests for the host '{_shown(host)}' are refused.",
                hint="If that is a name of this machine, add it to server.allowed_hosts in nimhost.toml.",
            )
        origin = head.get(b"origin")
        if origin is None:
            _check_fetch(head, method, to_gateway)
            return None
        if origin.lower().partition(b"://")[2] == host.lower():
            return None
        if origin.lower() in self._origins:
            return origin
        raise Forbidden(
            f"Requests from web pages of '{_shown(origin)}' are refused.",
            hint="If you trust that site with your models and keys, add it to server.allowed_origins in nimhost.toml.",
        )

    def _is_ours(self, host: bytes) -> bool:
        name = _host_name(host.decode("latin-1"))
        if name in self._names or name.endswith(".localhost"):
            return bool(name)
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self._any_address  # an address cannot be rebound, only a name can


def check_origin(origin: str) -> str:
    """`origin` in lower case. Raises ConfigError for what is none; `*` and `null` stand for anybody."""
    scheme, _, rest = origin.lower().partition("://")
    if not scheme or not rest or set(rest) & set("/*?#@ "):
        raise ConfigError(
            f"server.allowed_origins: '{origin}' is not the origin of a web page.",
            'Write scheme, host and port, and no path: "https://chat.example:8443".',
        )
    return origin.lower()


def _check_fetch(head: Headers, method: str, to_gateway: bool) -> None:
    """Browsers leave Origin out of a page's plain GETs (images, frames), but say where they come from. Following a
    link to the control plane is fine: it changes nothing, and the page does not see what it gets.
    """
    if head.get(b"sec-fetch-site") not in (b"cross-site", b"same-site"):
        return
    if to_gateway or method != "GET" or head.get(b"sec-fetch-dest") != b"document":
        raise Forbidden("Requests from web pages of other sites are refused.", "Use the address of nimhost itself.")


def cors_headers(origin: bytes) -> list[tuple[bytes, bytes]]:
    """Lets a page of that origin read a reply."""
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", b"*"),
        (b"vary", b"origin"),
    ]


def preflight_headers(head: Headers, origin: bytes) -> list[tuple[bytes, bytes]]:
    """The answer to a browser that asks before it sends what a form could not. Cookies are never used here."""
    return [
        *cors_headers(origin),
        (b"access-control-allow-methods", b"GET, HEAD, POST, PUT, PATCH, DELETE"),
        (b"access-control-allow-headers", head.get(b"access-control-request-headers", b"")),
        (b"access-control-max-age", b"600"),
    ]


def _host_name(host: str) -> str:
    """`[::1]:8080` is `::1`, `localhost:8080` is `localhost`."""
    if host.startswith("["):
        name, _, port = host[1:].partition("]")
        return name.lower() if not port or port.startswith(":") else ""
    return host.partition(":")[0].lower().rstrip(".")


def _shown(header: bytes) -> str:
    return header[:100].decode("latin-1")


# --- 2. and 3. tokens ----------------------------------------------------------------------------------------------


class TokenTable:
    """The tokens in force. Looked up by hash: how long that takes tells nothing about a token."""

    def __init__(self, fixed: Iterable[Token] = (), stored: Iterable[Token] = ()) -> None:
        self.fixed = list(fixed)
        """Those of the settings."""
        self.stored: list[Token] = []
        """Those of the database."""
        self.on_revoked: Callable[[Token], None] = lambda token: None
        self.put(stored)

    def put(self, stored: Iterable[Token]) -> None:
        """Replaces those of the database, at once."""
        before, self.stored = self.stored, list(stored)
        self._by_digest = {bytes.fromhex(token.sha256): token for token in self.all()}
        for token in before:
            if token not in self:
                self.on_revoked(token)

    def all(self) -> list[Token]:
        return [*self.stored, *self.fixed]

    def find(self, key: bytes) -> Token | None:
        return self._by_digest.get(digest(key))

    def __contains__(self, token: Token) -> bool:
        return bytes.fromhex(token.sha256) in self._by_digest


def find_asker(head: Headers, path: str, tokens: TokenTable, *, loopback: bool) -> Asker:
    """Who asks. Raises Unauthorized.

    `loopback`: the daemon listens there, and not on an address that other machines reach.
    """
    if path.startswith("/health/") or path == "/apis/auth/discovery":
        return ANONYMOUS
    keys = presented_keys(head)
    for key in keys:
        if token := tokens.find(key):
            return Asker(frozenset().union(*(RIGHTS[scope] for scope in token.scopes)), token)
    if any(key.startswith(_TOKEN_START) for key in keys) or (keys and not loopback):
        raise Unauthorized("There is no such API token: it is misspelt, or was revoked.", _HOW_TO_SEND)
    if not loopback:
        raise Unauthorized("An API token is needed here.", _HOW_TO_SEND)
    return ANONYMOUS


_HOW_TO_SEND = (
    "Send it as 'Authorization: Bearer nimhost_…'; the command line does after: nimhost config set --access-token "
    "TOKEN. An administrator makes one with: nimhost tokens create NAME --scope inference"
)


def presented_keys(head: Headers) -> list[bytes]:
    """What stands in the two headers that clients send keys in: `Authorization: Bearer` and Anthropic's `x-api-key`."""
    scheme, _, bearer = head.get(b"authorization", b"").partition(b" ")
    keys = (bearer.strip() if scheme.lower() == b"bearer" else b"", head.get(b"x-api-key", b"").strip())
    return [key for key in keys if key]


# --- 4. rights -----------------------------------------------------------------------------------------------------


def needed_right(method: str, path: str, to_gateway: bool) -> Right:
    if to_gateway:
        return "inference"
    reads_secret = path.startswith("/apis/secrets/") and path.endswith("/access")
    return "read" if method in ("GET", "HEAD") and not reads_secret else "change"


def check_right(asker: Asker, right: Right) -> None:
    """Raises Forbidden."""
    if right in asker.rights:
        return
    scope = next((scope for scope, rights in RIGHTS.items() if right in rights))
    if asker.token is None:
        raise Forbidden(f"This takes an API token with the scope '{scope}'.", FIRST_ADMINISTRATOR)
    raise Forbidden(
        f"The API token '{asker.token.name}' may not do this: it takes the scope '{scope}', and that one has "
        f"{', '.join(asker.token.scopes)}.",
        f"An administrator makes such a token with: nimhost tokens create NAME --scope {scope}",
    )


FIRST_ADMINISTRATOR = (
    "The first administrator's token is made while nimhost is stopped (engines keep running): "
    "nimhost tokens create NAME --scope admin"
)


def settings_for_asker(settings: Settings) -> Settings:
    """The settings that hold for what is wished: an administrator needs no leave for code inside engines."""
    if not ASKER.get().is_administrator:
        return settings
    plugins, code = ToolCallPlugin(enabled=True), TrustRemoteCode(allow=["(?s:.*)"])
    return replace(settings, models=replace(settings.models, tool_call_plugin=plugins, trust_remote_code=code))
