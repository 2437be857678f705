"""The two clients: the only place that sends anything."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, BinaryIO, ClassVar

import httpx

import nimhost
from nimhost.client import settings as client_settings
from nimhost.client.resources import Resources
from nimhost.client.settings import is_loopback
from nimhost.client.streams import MakeDecoder
from nimhost.client.wire import Done, Flow, Pause, Request, Step, advance, begin, decode, error_from
from nimhost.errors import BadRequest, ConfigError, NimhostError, Unreachable, UpstreamError, UpstreamTimeout

CONNECT_TIMEOUT_S = 5.0
UPLOAD_PIECE_BYTES = 1 << 20


class _Client(Resources):
    """What the two have in common. What is not given comes from the environment or `client.toml`."""

    _http_class: ClassVar[Callable[..., Any]]
    _http: Any

    def __init__(
        self,
        base_url: str | None = None,
        workspace: str | None = None,
        access_token: str | None = None,
        *,
        timeout_s: float = 60.0,
        transport: Any = None,
    ) -> None:
        """`transport`: one of httpx's, instead of the network. Raises ConfigError."""
        flags = {"base_url": base_url, "workspace": workspace, "access_token": access_token}
        settings = client_settings.load(flags)
        self.base_url = settings.base_url
        self._timeout_s = timeout_s
        self._token = settings.access_token
        super().__init__(settings.workspace)
        try:
            httpx.URL(self.base_url).host.encode("idna")
        except (httpx.InvalidURL, ValueError):
            raise client_settings.not_an_address(self.base_url) from None
        try:
            self._http = self._http_class(**self._options(), transport=transport)
        except (httpx.InvalidURL, ValueError, ImportError) as error:
            raise ConfigError(
                f"A proxy of the environment cannot be used: {error}",
                "See ALL_PROXY, HTTP_PROXY and HTTPS_PROXY, and the same in small letters: http:// and https:// work.",
            ) from None

    def _options(self) -> dict[str, Any]:
        headers = {"user-agent": f"nimhost/{nimhost.__version__}"}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        # A proxy of the environment is for the world outside: it cannot reach our loopback address.
        return {"base_url": self.base_url, "headers": headers, "trust_env": not is_loopback(self.base_url)}

    def _arguments(self, request: Request) -> dict[str, Any]:
        body = {} if request.body is None else {"json": request.body}
        timeout = self._timeout(self._timeout_s if request.quiet_s is None else request.quiet_s)
        return {"method": request.method, "url": request.path, "params": request.query, "timeout": timeout, **body}

    def _timeout(self, read_s: float) -> httpx.Timeout:
        connect_s = min(self._timeout_s, CONNECT_TIMEOUT_S)
        return httpx.Timeout(self._timeout_s, connect=connect_s, read=None if math.isinf(read_s) else read_s)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Every error of httpx becomes one of ours."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unreachable(f"No nimhost at {self.base_url} ({_reason(error)})", self._how_to_reach()) from None
        except httpx.TimeoutException:
            raise UpstreamTimeout(f"{self.base_url} did not answer in time.") from None
        except httpx.InvalidURL as error:
            raise BadRequest(f"{self.base_url}: {error}") from None
        except UnicodeEncodeError:
            raise BadRequest("What was to be sent is not text in UTF-8.") from None
        except httpx.RemoteProtocolError:
            raise UpstreamError(
                f"The connection to {self.base_url} broke off in the middle of an answer.",
                "If nimhost was stopped there: engines go on without it. Start it (nimhost serve), and try again.",
            ) from None
        except httpx.HTTPError as error:
            raise UpstreamError(f"The connection to {self.base_url} broke off ({_reason(error)}).") from None

    def _how_to_reach(self) -> str:
        if is_loopback(self.base_url):
            return "Start it with: nimhost serve   or say where it listens: --base-url URL, NIMHOST_BASE_URL"
        return "Check that it runs there, and --base-url or NIMHOST_BASE_URL."


@contextlib.contextmanager
def opened(request: Request) -> Iterator[_Told | None]:
    """The file to send, if there is one. Raises BadRequest when it cannot be read."""
    path = request.upload
    if path is None:
        yield None
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 an error of what happens with it is not one of opening it
    except OSError as error:
        raise BadRequest(f"Cannot read {path}: {error.strerror}") from None
    with file:
        yield _Told(file, request.on_sent or (lambda _: None))


class _Told:
    """A file that says how far it has been read. httpx asks a file for its length, and then reads it."""

    def __init__(self, file: BinaryIO, on_sent: Callable[[int], None]) -> None:
        self._file, self._on_sent = file, on_sent
        self.fileno = file.fileno

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self._on_sent(self._file.tell())
        return piece

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.read(UPLOAD_PIECE_BYTES), b"")


async def _pieces(file: _Told) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, UPLOAD_PIECE_BYTES):
        yield piece


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


class Client(_Client):
    """Blocking. `with Client() as client: client.deployments.list()`"""

    _http_class = httpx.Client
    _http: httpx.Client

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def run(self, flow: Flow[Any]) -> Any:
        step = begin(flow)
        while not isinstance(step, Done):
            step = advance(flow, self._perform(step))
        return step.value

    def _perform(self, step: Step) -> Any:
        if isinstance(step, Pause):
            return time.sleep(step.duration_s)
        try:
            with opened(step) as file, self._translated():
                reply = self._http.request(**self._arguments(step), content=file)
            return decode(reply.status_code, reply.headers, reply.content)
        except NimhostError as error:
            return error

    def stream(self, request: Request, decoder: MakeDecoder) -> Iterator[Any]:
        """What the reply consists of, as it comes. Close the iterator to stop it."""
        with self._translated(), self._http.stream(**self._arguments(request)) as reply:
            if reply.status_code >= 300:
                raise error_from(reply.status_code, reply.headers, reply.read())
            decoding = decoder(reply.headers.get("content-type", ""))
            for data in reply.iter_bytes():
                yield from decoding.feed(data)
            yield from decoding.end()


class AsyncClient(_Client):
    """For asyncio. `async with AsyncClient() as client: await client.deployments.list()`"""

    _http_class = httpx.AsyncClient
    _http: httpx.AsyncClient

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, flow: Flow[Any]) -> Any:
        step = begin(flow)
        while not isinstance(step, Done):
            step = advance(flow, await self._perform(step))
        return step.value

    async def _perform(self, step: Step) -> Any:
        if isinstance(step, Pause):
            return await asyncio.sleep(step.duration_s)
        try:
            with opened(step) as file, self._translated():
                reply = await self._http.request(**self._arguments(step), content=file and _pieces(file))
            return decode(reply.status_code, reply.headers, reply.content)
        except NimhostError as error:
            return error

    async def stream(self, request: Request, decoder: MakeDecoder) -> AsyncIterator[Any]:
        """What the reply consists of, as it comes. Close the iterator (`aclosing`) to stop it."""
        with self._translated():
            async with self._http.stream(**self._arguments(request)) as reply:
                if reply.status_code >= 300:
                    raise error_from(reply.status_code, reply.headers, await reply.aread())
                decoding = decoder(reply.headers.get("content-type", ""))
                async for data in reply.aiter_bytes():
                    for item in decoding.feed(data):
                        yield item
                for item in decoding.end():
                    yield item
