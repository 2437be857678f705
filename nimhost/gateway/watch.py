"""What may look on while a request is carried: the one seam for metrics and the request log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nimhost.gateway.caller import Caller
from nimhost.gateway.headers import RawHeaders
from nimhost.gateway.paths import Place
from nimhost.gateway.routes import Target


class Watch(Protocol):
    """Told about one request, in this order; it must neither wait nor raise."""

    def sent(self, target: Target) -> None:
        """The upstream is asked now; again if the one before could not be reached."""

    def answered(self, status: int, headers: RawHeaders) -> None:
        """The head of the reply, about to go to the client; headers may be added."""

    def piece(self, piece: bytes) -> None:
        """Some of the reply's body, about to go to the client."""

    def ended(self, error: Exception | None) -> None:
        """Always the last. None: the reply went out whole."""


WatchRequest = Callable[[Caller, Place], Watch]
