"""How far a download is: bytes, rate, time left, and what each file waits for. Shared by its threads."""

from __future__ import annotations

import threading
import time
from collections import deque

from nimhost.host.weights.wire import WeightsProgress

_QUIET_S = 5.0
_RATE_WINDOW_S = 5.0


class Meter:
    """All files together."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._received = 0
        self._last_byte = time.monotonic()
        self._notes: dict[str, str] = {}
        self._samples: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def have(self, size_bytes: int) -> None:
        """Bytes that are on disk (negative: bytes that turned out worthless)."""
        with self._lock:
            self.done_bytes += size_bytes

    def receive(self, size_bytes: int) -> None:
        with self._lock:
            self.done_bytes += size_bytes
            self._received += size_bytes
            self._last_byte = time.monotonic()

    def note(self, who: str, text: str = "") -> None:
        """What a file, or one connection of it, waits for; nothing once bytes flow."""
        with self._lock:
            self._notes.pop(who, None)
            if text:
                self._notes[who] = text

    def read(self) -> WeightsProgress:
        with self._lock:
            now = time.monotonic()
            self._samples.append((now, self._received))
            while now - self._samples[0][0] > _RATE_WINDOW_S:
                self._samples.popleft()
            since, before = self._samples[0]
            rate = (self._received - before) / (now - since) if now > since else 0.0
            left = self.total_bytes - self.done_bytes
            quiet = now - self._last_byte
            message = next(iter(self._notes.values()), "")
            if not message and quiet > _QUIET_S and left:
                message = f"no data from the hub for {quiet:.0f} s"
            eta_s = left / rate if rate > 0 else None
            return WeightsProgress(self.done_bytes, self.total_bytes, rate, message, eta_s)
