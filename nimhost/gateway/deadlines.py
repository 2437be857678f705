"""Who is waited for until when: one timer for all requests under way, because one for each costs more than the rest of
what is done about timeouts."""

from __future__ import annotations

import asyncio
from typing import Protocol

TICK_S = 0.05
"""A deadline is met so much later at most."""


class Waiting(Protocol):
    tick: int

    def overdue(self, now_s: float) -> float | None:
        """Called when it may be: the time to look again; None when it is over."""
        ...


class Deadlines:
    def __init__(self) -> None:
        self._at: dict[int, set[Waiting]] = {}
        """By the tick at which they are looked at."""
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0

    def add(self, one: Waiting, at_s: float, loop: asyncio.AbstractEventLoop) -> None:
        one.tick = tick = int(at_s / TICK_S) + 1
        found = self._at.get(tick)
        if found is None:
            self._at[tick] = {one}
            if self._timer is None or tick < self._next:
                self._arm(tick, loop)
        else:
            found.add(one)

    def discard(self, one: Waiting) -> None:
        if found := self._at.get(one.tick):
            found.discard(one)
            if not found:
                del self._at[one.tick]

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _arm(self, tick: int, loop: asyncio.AbstractEventLoop) -> None:
        self.close()
        self._next, self._timer = tick, loop.call_at(tick * TICK_S, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now_s = loop.time()
        for tick in [tick for tick in self._at if tick * TICK_S <= now_s]:
            for one in self._at.pop(tick):
                if (again_s := one.overdue(now_s)) is not None:
                    self.add(one, max(again_s, now_s), loop)
        if self._at:
            self._arm(min(self._at), loop)
