"""Streams of events in the other format, event by event, from bytes that come in any pieces. Pure.

What comes out does not depend on how the bytes were cut. `feed` never raises: once `failed` is set, what it returned is
all that could be translated, and nothing more will come.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import msgspec

from nimhost.errors import UpstreamError
from nimhost.gateway.bodies import UNREADABLE
from nimhost.gateway.translate.fields import Json
from nimhost.gateway.translate.sse import Events

encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Stream(ABC):
    def __init__(self) -> None:
        self.ended = False
        """What says "this was all" has come."""
        self.failed: UpstreamError | None = None
        self._events = Events()
        self._out: list[bytes] = []

    def feed(self, piece: bytes) -> bytes:
        try:
            for data in self._events.feed(piece):
                if self.ended:
                    break
                self._take(data)
        except UpstreamError as error:
            self.failed, self.ended = error, True
        out = b"".join(self._out)
        self._out.clear()
        return out

    def close(self) -> bytes:
        """The upstream sends no more: the rest, or `failed` if it broke off in the middle."""
        if not self.ended:
            self._finish()
        out = b"".join(self._out)
        self._out.clear()
        return out

    # --- for those that know a format

    @abstractmethod
    def _take(self, data: bytes) -> None:
        """One event. Raises UpstreamError if it cannot be understood."""

    def _finish(self) -> None:
        """Nothing comes any more, although nothing said so."""
        self.failed = UpstreamError("The upstream ended its stream in the middle of its answer.")
        self.ended = True


def read_event(data: bytes) -> Json:
    """Raises UpstreamError."""
    try:
        return _decode(data)
    except UNREADABLE as error:
        raise UpstreamError(f"The upstream sent an event that could not be read: {error}") from None
