"""A stream that only blocking code can read, as something to await and to cancel at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, Self, TypeVar

import requests

T = TypeVar("T")
Hold = Callable[[socket.socket], None]
_AHEAD = 256


class _Cancelled(Exception):
    """Unwinds the thread."""


class BlockingStream(Generic[T]):
    """Items of a blocking generator, read by a thread of its own.

    The generator gets `hold`, to which it hands each socket before it first waits for it. Leaving the `async with`
    shuts them down, so that the thread ends by itself, wherever it was blocked; nobody waits for it. A reader that is
    too slow stops the thread after 256 items.
    """

    def __init__(self, name: str, read: Callable[[Hold], Generator[T, None, None]]) -> None:
        self._read = read
        self._items: asyncio.Queue[tuple[T | None, BaseException | None]] = asyncio.Queue()
        self._room = threading.Semaphore(_AHEAD)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._cancelled = False
        self._loop: asyncio.AbstractEventLoop
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self.thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the thread, from any thread, any number of times."""
        with self._lock:
            self._cancelled = True
            for sock in self._sockets:
                with contextlib.suppress(OSError):  # it is closed already
                    sock.shutdown(socket.SHUT_RDWR)
        self._room.release()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        item, end = await self._items.get()
        self._room.release()
        if end is None:
            return item  # type: ignore[return-value]  # the end is the only item that may be None
        self._items.put_nowait((None, end))
        if isinstance(end, StopIteration):
            raise StopAsyncIteration
        raise end

    async def next(self, timeout_s: float) -> T | None:
        """The next item, or None at the end. Raises TimeoutError, after which it can be asked again."""
        async with asyncio.timeout(timeout_s):
            return await anext(self, None)

    def _run(self) -> None:
        end: BaseException = StopIteration()
        try:
            with contextlib.closing(self._read(self._hold)) as items:
                for item in items:
                    self._room.acquire()
                    if self._cancelled:
                        break
                    self._post(item, None)
        except BaseException as error:  # noqa: BLE001 - not swallowed: raised again where the items are awaited
            end = error
        finally:
            with self._lock:
                for sock in self._sockets:
                    sock.close()
        self._post(None, StopIteration() if self._cancelled else end)

    def _hold(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.append(sock)
            if self._cancelled:
                raise _Cancelled

    def _post(self, item: T | None, end: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._items.put_nowait, (item, end))


def hold_sockets(session: requests.Session, url: str, hold: Hold) -> None:
    """Hand out the socket of each connection that this session makes to the host of `url`, before it is used.

    A reply that has not begun cannot be closed, and Docker begins the reply to a pull only when the registry has
    answered. So the connection is made, and its socket taken, before the request.
    """
    adapter: Any = session.get_adapter(url)
    pool_for = adapter.get_connection_with_tls_context

    def connected(*args: Any, **kwargs: Any) -> Any:
        pool = pool_for(*args, **kwargs)
        connection = pool._get_conn()  # urllib3 has no public way; the tests of cancelling notice a change
        if connection.sock is None:
            connection.connect()
        hold(connection.sock)
        pool._put_conn(connection)  # the next request takes it: the queue is last in, first out
        return pool

    adapter.get_connection_with_tls_context = connected
