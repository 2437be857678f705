"""The way out: one connection pool to all engines and providers. The only place that knows aiohttp."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from urllib.parse import quote

import aiohttp
from yarl import URL

from nimhost.errors import NimhostError, UpstreamError, UpstreamTimeout
from nimhost.gateway.routes import Route

IDLE_CONNECTION_S = 4.0
"""Engines close idle connections after 5 s (uvicorn's default); we close them first, so as not to send into one."""
LARGE_BODY_BYTES = 1 << 20
_MAX_HEADER_BYTES = 65_536
_AUTO_HEADERS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")

Body = bytes | AsyncIterator[bytes] | None


class Reply:
    """A reply whose head has arrived. Close it always: before its end that closes the connection too."""

    __slots__ = ("_content", "_reply", "_route", "headers", "status")

    def __init__(self, reply: aiohttp.ClientResponse, route: Route) -> None:
        self._reply, self._route, self._content = reply, route, reply.content
        self.status: int = reply.status
        self.headers: tuple[tuple[bytes, bytes], ...] = reply.raw_headers

    @property
    def complete(self) -> bool:
        """Everything has been read."""
        return self._content.at_eof()

    async def read(self) -> bytes:
        """What has arrived since, at least a byte; b"" at the end. Raises UpstreamError if it breaks off."""
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError) as error:
            # aiohttp raises at once and keeps what came before the break; the client is owed those bytes first.
            if rest := self._content._read_nowait(-1):
                return rest
            raise _translate(error, self._route, "broke off in the middle of its reply") from error

    def close(self) -> None:
        self._reply.close()


class UpstreamPool:
    def __init__(self, connect_timeout_s: float) -> None:
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def send(
        self, route: Route, method: str, url: str, query: bytes, headers: list[tuple[str, str]], body: Body
    ) -> Reply:
        """Send a request and wait for the head of the reply. Cancelled, it closes the connection.

        `url` is percent-encoded already and `query` raw; both go out as they are. Raises UpstreamError if the upstream
        cannot be reached or breaks off, UpstreamTimeout if it does not accept the connection in time.
        """
        session = self._session or self._open()
        data = io.BytesIO(body) if isinstance(body, bytes) and len(body) >= LARGE_BODY_BYTES else body
        target = f"{url}?{_text(query)}" if query else url
        try:
            reply = await session.request(
                method, URL(target, encoded=True), headers=headers, data=data, allow_redirects=False
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _translate(error, route, "closed the connection without an answer") from error
        return Reply(reply, route)

    def _open(self) -> aiohttp.ClientSession:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S, ttl_dns_cache=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=_AUTO_HEADERS,
            timeout=self._timeout,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
        )
        return self._session

    async def close(self) -> None:
        if self._session:
            session, self._session = self._session, None
            await session.close()


def _text(query: bytes) -> str:
    """Raw where it can be; bytes that no URL may have are percent-encoded."""
    return query.decode("ascii") if query.isascii() else quote(query, safe="%!$&'()*+,;=:@/?-._~[]|")


def _translate(error: Exception, route: Route, otherwise: str) -> NimhostError:
    """The one place where aiohttp's errors become ours."""
    upstream = route.upstream
    who = f"Provider {upstream.provider}"
    own = upstream.policy != "external"
    hint = f"See: nimhost logs {upstream.provider.name}" if own else f"Is its host_url right? It is {upstream.base_url}"
    if isinstance(error, aiohttp.ServerTimeoutError):
        return UpstreamTimeout(f"{who} did not accept the connection in time.", hint)
    if isinstance(error, aiohttp.ClientConnectorError):
        return UpstreamError(f"{who} cannot be reached: {error.os_error.strerror or error.os_error}.", hint)
    return UpstreamError(f"{who} {otherwise}.", hint)
