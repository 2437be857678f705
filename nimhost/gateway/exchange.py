"""One request under way, ended from outside: because its client left, or because its upstream is silent for too long.

Both cancel the task that carries the request, wherever it waits; cancelling it closes the upstream's connection.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from nimhost.errors import UpstreamTimeout
from nimhost.gateway.deadlines import Deadlines
from nimhost.gateway.routes import Route


class Stoppable(Protocol):
    def stop(self) -> None: ...


class Client(Protocol):
    @property
    def task(self) -> asyncio.Task[None] | None: ...

    def watch(self, on_leave: Callable[[], None] | None) -> None:
        """Called when the client leaves; None: nobody wants to know any more."""
        ...


class ClientLeft(Exception):
    """Nobody is there to answer."""


class Exchange:
    """Use as `with`: raises what it was ended with in place of the cancellation that this caused."""

    __slots__ = ("_client", "_deadlines", "_ended", "_idle_timeout_s", "_limit_s", "_loop", "_since", "_task",
                 "_waiting_for", "keep_alive", "route", "tick")  # fmt: skip

    def __init__(
        self, client: Client, deadlines: Deadlines, first_byte_timeout_s: float, idle_timeout_s: float
    ) -> None:
        self.route: Route | None = None
        """Who is being asked, for the error that says who is silent."""
        self.keep_alive: Stoppable | None = None
        """Comments that are sent until the upstream answers."""
        self.tick = 0
        self._waiting_for = "begin its answer"
        self._ended: Exception | None = None
        self._client, self._deadlines = client, deadlines
        self._limit_s, self._idle_timeout_s = first_byte_timeout_s, idle_timeout_s

    def __enter__(self) -> Exchange:
        task = self._client.task
        assert task
        self._task, self._loop = task, task.get_loop()
        self._since = self._loop.time()
        self._deadlines.add(self, self._since + min(self._limit_s, self._idle_timeout_s), self._loop)
        self._client.watch(self._leave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadlines.discard(self)
        self._client.watch(None)
        if self.keep_alive:
            self.keep_alive.stop()
        if self._ended is None:
            return
        self._task.uncancel()
        if isinstance(error, asyncio.CancelledError):
            raise self._ended from None

    def upstream_answers(self) -> None:
        """The head of the reply is here: from now on it is the pauses that count."""
        self._waiting_for, self._limit_s = "go on with its answer", self._idle_timeout_s
        if self.keep_alive:
            self.keep_alive.stop()

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

    def _leave(self) -> None:
        self.end(ClientLeft())

    def overdue(self, now_s: float) -> float | None:
        silent_s = max(now_s - self._since, 0.0)
        if silent_s < self._limit_s:
            return now_s + min(self._limit_s, self._idle_timeout_s) - min(silent_s, self._idle_timeout_s)
        who = f"Provider {self.route.upstream.provider}" if self.route else "The upstream"
        hint = "The limits are first_byte_timeout_s and idle_timeout_s in [gateway]."
        self.end(UpstreamTimeout(f"{who} did not {self._waiting_for} within {self._limit_s:g} s.", hint))
        return None
