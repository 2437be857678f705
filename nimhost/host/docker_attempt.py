"""One create and start, as a whole: it ends with a running container or with nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from nimhost.host.container import Container
from nimhost.host.docker_requests import refused_limits


class _Abandoned(Exception):
    """Nobody waits for this attempt any more."""


class Attempt:
    """Performed in one thread from beginning to end, so that no cancelling can come between the two steps.

    `create`, `start` and `discard` are blocking; `discard` removes a container and never fails. Limits that the
    machine refuses are dropped, each with a sentence in `warnings`.
    """

    def __init__(
        self,
        create: Callable[[Any, Mapping[str, int]], str],
        start: Callable[[Any, str], Container],
        discard: Callable[[Any, str], None],
        ulimits: Mapping[str, int],
    ) -> None:
        self._create = create
        self._start = start
        self._discard = discard
        self._ulimits = dict(ulimits)
        self._lock = threading.Lock()
        self._abandoned = False
        self._running: str | None = None
        self.warnings: tuple[str, ...] = ()

    def abandon(self) -> str | None:
        """Nobody waits any more. The id of the container if it runs already: then removing it is left to the caller."""
        with self._lock:
            self._abandoned = True
            return self._running

    def perform(self, client: Any) -> Container:
        while True:
            container_id = self._create(client, self._ulimits)
            try:
                container = self._start(client, container_id)
                self._claim(container_id)
                return container
            except BaseException as error:
                self._discard(client, container_id)
                if not self._give_way(str(error)):
                    raise

    def _claim(self, container_id: str) -> None:
        with self._lock:
            if self._abandoned:
                raise _Abandoned
            self._running = container_id

    def _give_way(self, message: str) -> bool:
        """Whether a limit was refused; it is dropped."""
        refused = refused_limits(message, self._ulimits)
        for name in refused:
            value = self._ulimits.pop(name)
            self.warnings += (f"this machine refuses the limit {name}={value}: started without it",)
        return bool(refused) and not self._abandoned
