"""How much of all request bodies together is in memory: one measure for traffic and the control plane.

The first piece of a body is free, up to a few hundred kilobytes: only large requests are ever refused for want of room,
and the small ones of others go on. Uploads that are passed on as they come are not held at all.
"""

from __future__ import annotations

import asyncio

from nimhost.errors import NotReady
from nimhost.gateway.memory import trim

LIMIT_BYTES = 256 << 20
"""Five of the largest bodies for models."""
TRIM_ABOVE_BYTES = 64 << 20
QUIET_S = 1.0
"""So long after most of it was let go, the memory goes back to the system."""


class Buffers:
    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._peak_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def hold(self) -> Held:
        return Held(self)

    def take(self, size_bytes: int) -> None:
        """Raises NotReady."""
        if self.held_bytes + size_bytes > self.limit_bytes:
            raise NotReady(
                f"There is no room for another large request now: those under way hold {self.held_bytes >> 20} MB.",
                "Send it again in a moment, and fewer large ones at a time.",
                retry_after_s=2,
            )
        self.held_bytes += size_bytes
        self._peak_bytes = max(self._peak_bytes, self.held_bytes)

    def give(self, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        if self._peak_bytes > TRIM_ABOVE_BYTES and self.held_bytes * 4 < self._peak_bytes and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(QUIET_S, self._settle)

    def _settle(self) -> None:
        self._timer, self._peak_bytes = None, self.held_bytes
        asyncio.get_running_loop().run_in_executor(None, trim)


class Held:
    """What one request holds; to be let go at its end."""

    __slots__ = ("_buffers", "size_bytes")

    def __init__(self, buffers: Buffers) -> None:
        self._buffers, self.size_bytes = buffers, 0

    def add(self, size_bytes: int) -> None:
        """Raises NotReady."""
        self._buffers.take(size_bytes)
        self.size_bytes += size_bytes

    def let_go(self) -> None:
        if self.size_bytes:
            self._buffers.give(self.size_bytes)
            self.size_bytes = 0


BUFFERS = Buffers()
"""Of this process: its memory is one, whoever fills it."""
