"""One request under way, ended from outside: because its client left, or because its upstream is silent for too long.

Both cancel the task that carries the request, wherever it waits; cancelling it closes the upstream's connection.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any, Protocol

from nimhost.errors import UpstreamTimeout
from nimhost.gateway.routes import Route

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

WATCH_AFTER_S = 0.03
"""Most short requests are over by then, and never pay for a task that watches the client. A client that leaves is
noticed so much later at most."""


class Stoppable(Protocol):
    def stop(self) -> None: ...


class ClientLeft(Exception):
    """Nobody is there to answer."""


class Exchange:
    """Use as `with`: raises what it was ended with in place of the cancellation that this caused."""

    def __init__(self, receive: Receive, first_byte_timeout_s: float) -> None:
        self.uploaded = True
        """The body of the request has been read: `receive` may be watched."""
        self.route: Route | None = None
        """Who is being asked, for the error that says who is silent."""
        self.keep_alive: Stoppable | None = None
        """Comments that are sent until the upstream answers."""
        self._receive = receive
        self._limit_s = first_byte_timeout_s
        self._waiting_for = "begin its answer"
        self._ended: Exception | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Exchange:
        task = asyncio.current_task()
        assert task
        self._task = task
        self._since = self._loop.time()
        self._timer = self._loop.call_later(WATCH_AFTER_S, self._tick)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watcher:
            self._watcher.cancel()
        if self.keep_alive:
            self.keep_alive.stop()
        if self._ended is None:
            return
        self._task.uncancel()
        if isinstance(error, asyncio.CancelledError):
            raise self._ended from None

    def upstream_answers(self, idle_timeout_s: float) -> None:
        """The head of the reply is here: from now on it is the pauses that count."""
        self._waiting_for, self._limit_s = "go on with its answer", idle_timeout_s
        if self.keep_alive:
            self.keep_alive.stop()
        if self._watcher:
            self._timer.cancel()
            self._timer = self._loop.call_later(idle_timeout_s, self._tick)

    @property
    def timed_out(self) -> bool:
        return isinstance(self._ended, UpstreamTimeout)

    def upstreams_turn(self) -> None:
        self._since = self._loop.time()

    def clients_turn(self) -> None:
        """A slow client is not the upstream's fault."""
        self._since = math.inf

    def end(self, why: Exception) -> None:
        if self._ended is None:
            self._ended = why
            self._task.cancel()

    def _tick(self) -> None:
        if self._watcher is None and self.uploaded:
            self._watcher = self._loop.create_task(self._watch())
        silent_s = max(self._loop.time() - self._since, 0.0)
        if silent_s >= self._limit_s:
            who = f"Provider {self.route.upstream.provider}" if self.route else "The upstream"
            hint = "The limits are first_byte_timeout_s and idle_timeout_s in [gateway]."
            self.end(UpstreamTimeout(f"{who} did not {self._waiting_for} within {self._limit_s:g} s.", hint))
            return
        pause_s = self._limit_s - silent_s
        self._timer = self._loop.call_later(pause_s if self._watcher else min(pause_s, WATCH_AFTER_S), self._tick)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end(ClientLeft())
