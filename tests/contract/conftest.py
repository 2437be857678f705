"""A whole daemon on a real port, in a thread of its own, for tools that bring their own HTTP client."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nimhost.listening import Server
from tests.api.conftest import world  # noqa: F401
from tests.world import World


class Served:
    """`url` answers while this is open; `call(coroutine)` runs something on the daemon's loop."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.world = World(directory, **settings)
        self._loop = asyncio.new_event_loop()
        self._begun = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="daemon")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        async with self.world:
            server = Server(self.world.daemon.app(), drain_timeout_s=1, on_stop=lambda: None)
            serving = asyncio.create_task(server.serve(sockets=[self._listener]))
            self._begun.set()
            await self._stop.wait()
            server.stop()
            await serving

    def open(self) -> None:
        self._thread.start()
        assert self._begun.wait(20), "the daemon did not start"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)


@contextmanager
def serving(directory: Path, **settings: Any) -> Iterator[Served]:
    served = Served(directory, **settings)
    served.open()
    try:
        yield served
    finally:
        served.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("daemon")) as opened:
        yield opened
