"""Where requests come in: the socket, and the server that hands its connections to `gateway.front`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn

from nimhost.api.access import is_loopback
from nimhost.config import Server as ServerSettings
from nimhost.errors import StartError
from nimhost.gateway.front import ClientConnection
from nimhost.gateway.room import Room

MAX_CONNECTIONS = 10_000
OTHER_FILES = 256
"""File descriptors for the database, Docker, uploads and so on."""
BACKLOG = 2048


def listen(server: ServerSettings, has_tokens: bool) -> socket.socket:
    """The listening socket. Raises StartError when the address cannot be had, or other machines reach it and there is
    no token to let them in with.
    """
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)  # `localhost` may have both
        if not has_tokens and not is_loopback(str(address[0])):
            raise StartError(
                f"{server.host} can be reached from other machines, and there is no API token to let them in with.",
                f"Make one: {_with_data_dir(server)}nimhost tokens create NAME --scope admin   "
                f"or listen on 127.0.0.1, and reach it with: ssh -L {server.port}:127.0.0.1:{server.port} HOST",
            )
        return _bound(socket.socket(family, kind), address)
    except OSError as error:
        raise StartError(
            f"Cannot listen on {server.host}:{server.port}: {error.strerror}.", _other_address(error)
        ) from None


def _other_address(error: OSError) -> str:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return "Choose an address of this machine (see: ip address): nimhost serve --host 127.0.0.1"
    return "Choose another port: nimhost serve --port 8081"


def _bound(listener: socket.socket, address: object) -> socket.socket:
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)  # type: ignore[arg-type]
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _with_data_dir(server: ServerSettings) -> str:
    return f"NIMHOST_SERVER__DATA_DIR={server.data_dir} " if server.data_dir else ""


class Server(uvicorn.Server):
    """The first signal drains, the second one forces."""

    def __init__(self, app: Any, drain_timeout_s: float, on_stop: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(ClientConnection, Room(raise_limit())),  # type: ignore[arg-type]
                interface="asgi3",
                loop="none",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=round(drain_timeout_s),
            )
        )
        self._on_stop = on_stop
        self._stopping = asyncio.Event()

    async def main_loop(self) -> None:
        """Until `stop`: uvicorn's own looks ten times a second."""
        await self._stopping.wait()

    def stop(self) -> None:
        self.force_exit = self.should_exit
        if not self.should_exit:
            self._on_stop()
        self.should_exit = True
        self._stopping.set()

    def hang_up(self) -> None:
        """The terminal was closed, which the kernel and the shell may both say: that forces nothing."""
        if not self.should_exit:
            self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def raise_limit() -> int:
    """Takes as many file descriptors as the system lets us have. Returns for how many clients they are enough: each may
    need another connection, to an upstream.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS + OTHER_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    files = sys.maxsize if soft == resource.RLIM_INFINITY else soft
    return max(16, min(MAX_CONNECTIONS, (files - OTHER_FILES) // 2))
