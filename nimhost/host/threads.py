"""Blocking calls off the loop, in threads that keep nobody waiting: not at a cancellation, not at the exit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_Work = tuple[Future[Any], Callable[[], Any]]


class Threads:
    """At most so many threads, made as they are needed. Those of an executor would keep the exit waiting: a driver that
    hangs may never answer."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._count = 0
        self._idle = threading.Semaphore(0)
        self._waiting: SimpleQueue[_Work | None] = SimpleQueue()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """What becomes of it. From one thread only."""
        future: Future[T] = Future()
        self._waiting.put((future, call))
        if not self._idle.acquire(blocking=False) and self._count < self._most:
            self._count += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._count}", daemon=True).start()
        return future

    def close(self) -> None:
        """The threads end once all that waits has been done."""
        for _ in range(self._count):
            self._waiting.put(None)

    def _work(self) -> None:
        while (work := self._next()) is not None:
            future, call = work
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001  it is raised again where it is waited for
                    future.set_exception(error)
            del work, future, call  # nothing is kept alive while it waits for more

    def _next(self) -> _Work | None:
        try:
            return self._waiting.get_nowait()
        except Empty:
            self._idle.release()
            return self._waiting.get()


async def in_thread(call: Callable[..., T], *args: object) -> T:
    """What `call` returns or raises. When we are cancelled it is left to end by itself, and so at the exit."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[T], None] | Callable[[BaseException], None], outcome: object) -> None:
        if not done.done():
            settle(outcome)  # type: ignore[arg-type]

    def run() -> None:
        settle: Callable[[T], None] | Callable[[BaseException], None]
        outcome: object
        try:
            settle, outcome = done.set_result, call(*args)
        except BaseException as error:  # noqa: BLE001  it is raised again where it is waited for
            settle, outcome = done.set_exception, error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, settle, outcome)

    threading.Thread(target=run, daemon=True).start()
    return await done
