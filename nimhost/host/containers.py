"""Docker, made async: the only importer of its library.

Short calls cross into one bounded pool of threads, by one method. Each stream (events, followed logs, a pull) has a
thread and a connection of its own, which is shut down to cancel it. Errors are translated once, in `_translated`.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import socket
import struct
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import requests
import urllib3
from docker import APIClient, auth
from docker.errors import APIError, DockerException
from docker.errors import NotFound as NotInDocker
from docker.transport.unixconn import UnixHTTPAdapter, UnixHTTPConnection, UnixHTTPConnectionPool
from docker.utils import kwargs_from_env
from msgspec.structs import replace

from nimhost.errors import DockerError, DockerUnavailable, GpuRuntimeMissing, GpuUnavailable, NimhostError
from nimhost.host import docker_replies as replies
from nimhost.host.container import (
    GPU_ULIMITS,
    Container,
    ContainerEvent,
    Containers,
    EngineFacts,
    Image,
    Launch,
    PullProgress,
)
from nimhost.host.docker_attempt import Attempt
from nimhost.host.docker_errors import USUAL_SOCKET, chain, refusal, unreachable
from nimhost.host.docker_pull import follow_pull
from nimhost.host.docker_requests import container_body, probe_body, probe_labels
from nimhost.host.docker_stream import BlockingStream, Hold, hold_sockets
from nimhost.host.threads import Threads, in_thread

__all__ = [
    "GPU_ULIMITS", "Container", "ContainerEvent", "Containers", "DockerContainers", "EngineFacts", "Image", "Launch",
    "PullProgress",
]  # fmt: skip

T = TypeVar("T")
log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 60
_HELLO_TIMEOUT_S = 10
_ANY_VERSION = "1.24"  # only to ask for the real one
_THREADS = 32  # a stop holds one for as long as the container takes to end
_CLOSE_S = 5.0  # what Docker has not answered by then is left to it: a daemon that is killed leaves no less
_EVENTS = {
    "type": ["container", "image"],
    "event": ["create", "start", "die", "oom", "destroy", "pause", "unpause", "rename", "pull", "delete", "import"],
}
_EMPTY_TAR = bytes(10_240)
_UNREACHABLE = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    struct.error,  # a log stream that broke off inside a frame
)


class DockerContainers:
    """`Containers` on a real engine: at `host` (`unix:///…`, `tcp://…`), else DOCKER_HOST, else the usual socket.

    Connects, and agrees on an API version, at the first call; after a lost connection the next call does so again.
    """

    def __init__(self, host: str | None = None) -> None:
        self._host = host
        self._pool = Threads(_THREADS, "docker")
        self._calls: set[Future[Any]] = set()
        self._streams: set[BlockingStream[Any]] = set()
        self._lock = threading.Lock()
        self._client: APIClient | None = None
        self._seen: dict[str, tuple[object, Container]] = {}

    # --- what it knows ---------------------------------------------------------------------------------------------

    async def facts(self) -> EngineFacts:
        return await self._call(lambda client: replies.engine_facts(client.version(), client.info()))

    async def hands_out_gpus(self, owner: str = "") -> bool:
        try:
            await self._call(lambda client: _start_empty_with_gpu(client, owner))
        except GpuRuntimeMissing:
            return False
        except (DockerError, GpuUnavailable):
            pass  # it got past the GPUs and found, as meant, nothing to run
        return True

    async def list(self) -> tuple[Container, ...]:
        return await self._call(self._list)

    def _list(self, client: APIClient) -> tuple[Container, ...]:
        """One call, and one more for each container that changed since it was last looked at."""
        old, now = self._seen, dict[str, tuple[object, Container]]()
        for row in client.containers(all=True):
            key, (known_key, known) = replies.listing_key(row), old.get(row["Id"], (None, None))
            if known is None or key != known_key:
                try:
                    known = replies.container(client.inspect_container(row["Id"]))
                except NotInDocker:
                    continue  # removed since it was listed
                except APIError as error:
                    known = replies.listed(row, str(error.explanation))
                    if known is None:
                        raise
            now[row["Id"]] = key, known
        self._seen = now
        return tuple(container for _, container in now.values())

    async def image(self, name: str) -> Image | None:
        return await self._call(lambda client: _image(client, name))

    # --- images ----------------------------------------------------------------------------------------------------

    async def login(self, name: str) -> tuple[str, str] | None:
        """In a thread of its own: a helper that waits for somebody to open a keyring must not hold up Docker."""
        return await in_thread(_login, name)

    async def pull(
        self,
        name: str,
        auth: tuple[str, str] | None,
        on_progress: Callable[[PullProgress], None],
        stall_timeout_s: float = 120,
    ) -> Image:
        config = {"username": auth[0], "password": auth[1]} if auth else None

        def lines(client: APIClient) -> Iterable[replies.Json]:
            return client.pull(name, stream=True, decode=True, auth_config=config)  # type: ignore[no-any-return]

        try:
            async with self._stream("docker-pull", lines, pulling=name) as stream:
                await follow_pull(name, stream, on_progress, stall_timeout_s)
        except NimhostError as error:
            secret = auth[1] if auth else ""
            if not (secret and secret in error.message):
                raise
            raise type(error)(error.message.replace(secret, "…"), error.hint) from None
        image = await self.image(name)
        if image is None:
            raise DockerUnavailable(f"Image {name}: the pull broke off")
        return image

    # --- one container ---------------------------------------------------------------------------------------------

    async def run(self, launch: Launch) -> Container:
        def made(client: APIClient, limits: Mapping[str, int]) -> str:
            return _create(client, launch.name, container_body(replace(launch, ulimits=dict(limits))))

        attempt = Attempt(made, _start, _discard, launch.ulimits)
        try:
            container = await self._call(attempt.perform, image=launch.spec.image)
        except asyncio.CancelledError:
            if late := attempt.abandon():
                self._submit(lambda client: _remove(client, late))
            raise
        for warning in attempt.warnings:
            log.warning("%s: %s", launch.name, warning)
        return container

    async def stop(self, container_id: str, timeout_s: int) -> None:
        with contextlib.suppress(_Gone):
            await self._call(lambda client: client.stop(container_id, timeout=timeout_s))

    async def remove(self, container_id: str) -> None:
        await self._call(lambda client: _remove(client, container_id))

    async def log_tail(self, container_id: str, lines: int = 80) -> str:
        raw: bytes = await self._call(lambda client: client.logs(container_id, tail=lines))
        return raw.decode(errors="replace")

    # --- streams ---------------------------------------------------------------------------------------------------

    async def logs(self, container_id: str, *, tail: int, follow: bool) -> AsyncGenerator[bytes, None]:
        def frames(client: APIClient) -> Iterable[bytes]:
            return client.logs(container_id, stream=True, follow=follow, tail=tail)  # type: ignore[no-any-return]

        async with self._stream("docker-logs", frames) as stream:
            async for frame in stream:
                yield frame

    async def events(self) -> AsyncGenerator[ContainerEvent, None]:
        def lines(client: APIClient) -> Iterable[replies.Json | None]:
            stream = client.events(decode=True, filters=_EVENTS)
            yield None  # the reply has begun: we are subscribed
            yield from stream

        async with self._stream("docker-events", lines) as stream:
            async for line in stream:
                event = replies.event(line) if line else replies.CONNECTED
                self._seen.pop(event.container_id, None)
                yield event
        raise DockerUnavailable("Docker closed the stream of events", "Run: sudo systemctl status docker")

    @contextlib.asynccontextmanager
    async def _stream(
        self, name: str, opened: Callable[[APIClient], Iterable[T]], *, pulling: str = ""
    ) -> AsyncIterator[BlockingStream[T]]:
        def read(hold: Hold) -> Generator[T, None, None]:
            with contextlib.closing(self._connect(version=self._connection().api_version, timeout_s=None)) as client:
                hold_sockets(client, client.base_url, hold)
                yield from opened(client)

        stream = BlockingStream(name, read)
        self._streams = {other for other in self._streams if other.thread.is_alive()} | {stream}
        try:
            async with stream:
                yield stream
        except (DockerException, *_UNREACHABLE) as error:
            raise self._translated(error, image=pulling, pulling=bool(pulling)) from error

    # --- the crossing ----------------------------------------------------------------------------------------------

    async def _call(self, call: Callable[[APIClient], T], *, image: str = "") -> T:
        """The one way from the loop to Docker: a short call in a thread of the pool, its errors translated.

        Cancelled, it returns at once; a call that has begun runs to its end behind it.
        """
        try:
            return await asyncio.wrap_future(self._submit(call))
        except (DockerException, *_UNREACHABLE) as error:
            raise self._translated(error, image=image) from error

    def _submit(self, call: Callable[[APIClient], T]) -> Future[T]:
        future = self._pool.submit(lambda: self._cross(call))
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def _cross(self, call: Callable[[APIClient], T]) -> T:
        """In a thread: the call, and a new client for the next one if the connection was lost."""
        client = self._connection()
        try:
            return call(client)
        except APIError:
            raise
        except _UNREACHABLE:
            with self._lock:
                self._client = None if self._client is client else self._client
            client.close()
            raise

    def _connection(self) -> APIClient:
        """The client that short calls share. Blocking; in a thread only."""
        with self._lock:
            if self._client is None:
                with contextlib.closing(self._connect(version=_ANY_VERSION, timeout_s=_HELLO_TIMEOUT_S)) as any_client:
                    version = any_client.version(api_version=False)["ApiVersion"]
                self._client = self._connect(version=version, timeout_s=_CALL_TIMEOUT_S)
            return self._client

    def _connect(self, *, version: str, timeout_s: int | None) -> APIClient:
        where = {"base_url": self._host} if self._host else kwargs_from_env()
        client = APIClient(**where, version=version, timeout=timeout_s, max_pool_size=_THREADS)
        _share_connections(client)
        return client

    def _translated(self, error: Exception, *, image: str = "", pulling: bool = False) -> NimhostError:
        """Every error of Docker's libraries, as one of ours."""
        if isinstance(error, APIError):
            message = str(error.explanation or error)
            if error.status_code == 404 and "no such container" in message.lower():
                return _Gone(f"Docker: {message}")
            return refusal(error.status_code, message, image=image, pulling=pulling)
        if any(isinstance(cause, _UNREACHABLE) for cause in chain(error)):
            host = self._host or kwargs_from_env().get("base_url") or USUAL_SOCKET
            return unreachable(error, host)
        return DockerError(f"Docker: {error}")

    async def close(self) -> None:
        for stream in self._streams:
            stream.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                while self._calls:
                    await asyncio.gather(*map(asyncio.wrap_future, self._calls.copy()), return_exceptions=True)
                for stream in self._streams:
                    await in_thread(stream.thread.join)
        self._pool.close()
        if self._client is not None:
            self._client.close()
            self._client = None


class _Gone(DockerError):
    """There is no such container (any more)."""


# --- in a thread ---------------------------------------------------------------------------------------------------


class _UnixConnection(UnixHTTPConnection):  # type: ignore[misc]
    def connect(self) -> None:
        """Without the socket that docker-py leaks when nobody listens."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self.unix_socket)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


class _UnixPool(UnixHTTPConnectionPool):  # type: ignore[misc]
    def _new_conn(self) -> _UnixConnection:
        return _UnixConnection(self.base_url, self.socket_path, self.timeout)


def _share_connections(client: APIClient) -> None:
    """One pool for all paths. By itself a client of a Unix socket has one for each, and closes the oldest of more than
    25 even while another thread is about to use it.
    """
    adapter = client.get_adapter(client.base_url)
    if isinstance(adapter, UnixHTTPAdapter):
        pool = _UnixPool(client.base_url, adapter.socket_path, adapter.timeout, maxsize=_THREADS)
        adapter.pools[client.base_url] = pool  # where closing the client finds it
        adapter.get_connection_with_tls_context = lambda *_, **__: pool


def _image(client: APIClient, name: str) -> Image | None:
    try:
        return replies.image(name, client.inspect_image(name))
    except NotInDocker:
        return None


def _login(name: str) -> tuple[str, str] | None:
    """From the user's configuration of Docker, or the helper that it names."""
    try:
        found = auth.load_config().resolve_authconfig(auth.resolve_repository_name(name)[0]) or {}
    except (DockerException, ValueError):
        return None
    given = {key.lower(): value for key, value in found.items()}
    user, password = given.get("username"), given.get("password")
    return (user, password) if user and password else None


def _create(client: APIClient, name: str | None, body: replies.Json) -> str:
    return str(client.create_container_from_config(body, name)["Id"])


def _start(client: APIClient, container_id: str) -> Container:
    client.start(container_id)
    return replies.container(client.inspect_container(container_id))


def _remove(client: APIClient, container_id: str) -> None:
    try:
        client.remove_container(container_id, force=True, v=True)
    except APIError as error:
        if error.status_code != 404 and "already in progress" not in str(error.explanation):
            raise


def _discard(client: APIClient, container_id: str) -> None:
    """Remove what should not be, if there is anything."""
    with contextlib.suppress(DockerException, *_UNREACHABLE):  # what made it useless is the error to show
        _remove(client, container_id)


def _start_empty_with_gpu(client: APIClient, owner: str) -> None:
    """Always fails; how, tells whether Docker can hand out GPUs. Needs no image: it makes an empty one."""
    labels = [f"{name}={value}" for name, value in probe_labels(owner).items()]
    for left in client.containers(all=True, filters={"label": labels}):  # by a daemon that was killed
        _discard(client, left["Id"])
    image_id = json.loads(client.import_image_from_data(_EMPTY_TAR))["status"]
    container_id = ""
    try:
        container_id = _create(client, None, probe_body(image_id, owner))
        client.start(container_id)
    finally:
        _discard(client, container_id)
        with contextlib.suppress(APIError):  # an image of no bytes may stay
            client.remove_image(image_id, force=True)
