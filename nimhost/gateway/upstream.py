"""The way out: connections to all engines and providers, kept for the next request while they are fresh."""

from __future__ import annotations

import asyncio
import socket
import ssl
from functools import lru_cache
from urllib.parse import quote, urlsplit

from nimhost.errors import NimhostError, UpstreamError, UpstreamTimeout
from nimhost.gateway.connection import Body, ConnectionBroken, Origin, Reply, UpstreamConnection
from nimhost.gateway.routes import Route

__all__ = ["Body", "ConnectionBroken", "NothingSent", "Reply", "UpstreamPool", "broken_off"]

IDLE_CONNECTION_S = 4.0
"""Engines close idle connections after 5 s (uvicorn's default); we close them first, so as not to send into one."""
STALE_WITHIN_S = 1.0
"""An upstream that had closed an idle connection before our request came says so within a round trip. What breaks off
later may have been at work on it, and is not asked again."""
ADDRESS_TTL_S = 60.0
LONG_URL = 500
"""Longer ones are not remembered: clients can think up as many as they like."""
_PATH_SAFE = "%!$&'()*+,;=:@/-._~"


class NothingSent(Exception):
    """No connection came about: the request may safely go elsewhere. `error` is what to tell the client if not."""

    def __init__(self, error: NimhostError) -> None:
        super().__init__(error.message)
        self.error = error


class UpstreamPool:
    def __init__(self, connect_timeout_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._trust: ssl.SSLContext | None = None
        self._idle: dict[Origin, dict[UpstreamConnection, float]] = {}
        """Since when; the one used last is at the end, and is used first."""
        self._connections: set[UpstreamConnection] = set()
        self._addresses: dict[str, tuple[float, list[str]]] = {}
        self._sweep: asyncio.TimerHandle | None = None

    async def send(self, route: Route, method: str, url: str, query: bytes, headers: bytes, body: Body) -> Reply:
        """Send a request and wait for the head of the reply. Cancelled, it closes the connection.

        `url` is percent-encoded already and `query` raw; both go out as they are. `headers`: lines, each with its end.
        Raises NothingSent if there is no connection to be had, ConnectionBroken if it does not last.
        """
        origin, path, host = split_url(url)
        if query:
            path += b"?" + query
        head = b"%b %b HTTP/1.1\r\nhost: %b\r\n%b" % (method.encode(), path, host, headers)
        connection = self._take(origin)
        if connection:
            sent_at = connection.loop.time()
            try:
                reply = connection.request(head, body, bodiless=method == "HEAD")
                await reply.head()
                return reply
            except ConnectionBroken as error:
                late = connection.loop.time() - sent_at > STALE_WITHIN_S
                if late or not error.untouched or not isinstance(body, bytes | None):
                    raise
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connection = await self._connect(origin)
        except (OSError, TimeoutError) as error:  # ssl.SSLError, socket.gaierror are OSErrors
            raise NothingSent(_unreachable(error, route)) from error
        reply = connection.request(head, body, bodiless=method == "HEAD")
        await reply.head()
        return reply

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def close(self) -> None:
        if self._sweep:
            self._sweep.cancel()
            self._sweep = None
        self._idle.clear()
        for connection in list(self._connections):
            connection.close()

    # --- connections that wait for their next request

    def _take(self, origin: Origin) -> UpstreamConnection | None:
        idle = self._idle.get(origin)
        while idle:
            connection, since = idle.popitem()
            if connection.usable and connection.loop.time() - since < IDLE_CONNECTION_S:
                return connection
            connection.close()
        return None

    def _free(self, connection: UpstreamConnection) -> None:
        self._idle.setdefault(connection.origin, {})[connection] = connection.loop.time()
        if self._sweep is None:
            self._sweep = connection.loop.call_later(IDLE_CONNECTION_S, self._close_expired)

    def _lost(self, connection: UpstreamConnection) -> None:
        self._connections.discard(connection)
        if idle := self._idle.get(connection.origin):
            idle.pop(connection, None)

    def _close_expired(self) -> None:
        """Whatever is idle for too long; looks again only as long as there is something to look at."""
        self._sweep, loop = None, asyncio.get_running_loop()
        for origin, idle in list(self._idle.items()):
            for connection, since in list(idle.items()):
                if loop.time() - since < IDLE_CONNECTION_S:
                    break
                del idle[connection]
                connection.close()
            if not idle:
                del self._idle[origin]
        if self._idle:
            self._sweep = loop.call_later(IDLE_CONNECTION_S / 4, self._close_expired)

    # --- new ones

    async def _connect(self, origin: Origin) -> UpstreamConnection:
        """Raises OSError, the last address's if there are several: one that never answers takes half of the time."""
        loop = asyncio.get_running_loop()
        trust, name = (await self._tls(), origin.host) if origin.secure else (None, None)
        addresses = await self._resolve(origin.host)
        timeout_s = self._connect_timeout_s / min(len(addresses), 2)
        for address in tuple(addresses):
            try:
                async with asyncio.timeout(timeout_s):
                    _, connection = await loop.create_connection(
                        lambda: UpstreamConnection(loop, origin, self._free, self._lost),
                        address, origin.port, ssl=trust, server_hostname=name,
                    )  # fmt: skip
            except OSError as error:
                problem = error
                addresses.remove(address)
                addresses.append(address)  # the next one begins with one that answers
            else:
                self._connections.add(connection)
                return connection
        self._addresses.pop(origin.host, None)
        raise problem

    async def _resolve(self, host: str) -> list[str]:
        """At least one address, the one that answered last before others. Raises OSError."""
        loop = asyncio.get_running_loop()
        until, addresses = self._addresses.get(host, (0.0, []))
        if loop.time() >= until:
            first = addresses[:1]
            addresses = sorted(await _addresses_of(host), key=lambda address: address not in first)
            self._addresses[host] = (loop.time() + ADDRESS_TTL_S, addresses)
        return addresses

    async def _tls(self) -> ssl.SSLContext:
        if self._trust is None:  # reading the system's certificates takes tens of milliseconds
            self._trust = await asyncio.to_thread(_trusting_the_system)
        return self._trust


async def _addresses_of(host: str) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def split_url(url: str) -> tuple[Origin, bytes, bytes]:
    """Where to connect to, the path to ask for, and the Host header. A default port is not named in it."""
    return (_known_split if len(url) <= LONG_URL else _split)(url)


def _split(url: str) -> tuple[Origin, bytes, bytes]:
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    default = 443 if secure else 80
    port = parts.port or default
    name = f"[{host}]" if ":" in host else host
    name = name if port == default else f"{name}:{port}"
    path = quote(parts.path or "/", safe=_PATH_SAFE)
    return Origin(host, port, secure), path.encode(), name.encode("ascii" if name.isascii() else "idna")


_known_split = lru_cache(maxsize=2048)(_split)


def _trusting_the_system() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _unreachable(error: OSError, route: Route) -> NimhostError:
    who, hint = _who(route)
    if isinstance(error, TimeoutError) and error.errno is None:
        return UpstreamTimeout(f"{who} did not accept the connection in time.", hint)
    if isinstance(error, ssl.SSLError):
        return UpstreamError(f"{who} cannot be reached: {getattr(error, 'verify_message', '') or error.reason}.", hint)
    return UpstreamError(f"{who} cannot be reached: {error.strerror or error}.", hint)


def broken_off(error: ConnectionBroken, route: Route) -> NimhostError:
    who, hint = _who(route)
    return UpstreamError(f"{who} {error.what}.", hint)


def _who(route: Route) -> tuple[str, str]:
    """Whose fault it is, and where to look."""
    upstream = route.upstream
    own = upstream.policy != "external"
    hint = f"See: nimhost logs {upstream.provider.name}" if own else f"Is its host_url right? It is {upstream.base_url}"
    return f"Provider {upstream.provider}", hint
