"""How many connections there may be, and which of them go first."""

from __future__ import annotations

import asyncio
import time
from asyncio import TimerHandle
from email.utils import formatdate
from typing import Protocol

KEEP_ALIVE_S = 75.0
"""Longer than common clients and proxies keep a connection: who closes first must not be a matter of chance."""


class Visitor(Protocol):
    """A connection."""

    loop: asyncio.AbstractEventLoop
    counted: bool
    """It has a place in the room."""

    def close(self) -> None: ...


class Room:
    """For so many connections at once. When it is full, whoever has been idle the longest makes place."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._idle: dict[Visitor, float] = {}
        """Without a request under way; since when, the longest first."""
        self._count = 0
        self._sweep: TimerHandle | None = None
        self._dated = (0, b"")

    def enter(self, connection: Visitor) -> bool:
        """False: it is full, and everybody in it is busy."""
        if self._count >= self.limit:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                return False
            oldest.close()
            self.leave(oldest)
        self._count += 1
        connection.counted = True
        self.rest(connection)
        return True

    def leave(self, connection: Visitor) -> None:
        self._count -= connection.counted
        connection.counted = False
        self._idle.pop(connection, None)

    def rest(self, connection: Visitor) -> None:
        """It has no request under way from now on."""
        loop = connection.loop
        self._idle.pop(connection, None)
        self._idle[connection] = loop.time()
        if self._sweep is None:
            self._sweep = loop.call_later(KEEP_ALIVE_S, self._close_expired, loop)

    def work(self, connection: Visitor) -> None:
        self._idle.pop(connection, None)

    def _close_expired(self, loop: asyncio.AbstractEventLoop) -> None:
        """One timer for all: those at the front have been idle the longest."""
        self._sweep = None
        for connection, since in list(self._idle.items()):
            left_s = since + KEEP_ALIVE_S - loop.time()
            if left_s > 0:
                self._sweep = loop.call_later(left_s, self._close_expired, loop)
                return
            del self._idle[connection]
            connection.close()

    def date_line(self) -> bytes:
        """A header of every reply: made once for those of a second."""
        second = int(time.time())
        if second != self._dated[0]:
            self._dated = (second, b"date: %b\r\n" % formatdate(second, usegmt=True).encode())
        return self._dated[1]
