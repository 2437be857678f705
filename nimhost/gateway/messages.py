"""What `cycle.Cycle` offers the gateway, where there are only ASGI's messages: somebody stands in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable, MutableMapping
from typing import Any

from nimhost.gateway.cycle import Receive, Send


class Messages:
    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._head: MutableMapping[str, Any] | None = None
        self._whole = False
        """The body has been read."""
        self._on_leave: Callable[[], None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.task: asyncio.Task[Any] | None = asyncio.current_task()
        self.broken_off = False

    def whole_body(self) -> bytes | None:
        return None

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self._whole = not message.get("more_body", False)
        self.watch(self._on_leave)
        return message

    def watch(self, on_leave: Callable[[], None] | None) -> None:
        """Calls it when the client leaves; None: nobody wants to know any more."""
        self._on_leave = on_leave
        if on_leave is None and self._watcher:
            self._watcher.cancel()
        elif on_leave and self._whole and self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch(on_leave))

    async def _watch(self, on_leave: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        on_leave()

    def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Goes out with the first piece."""
        self._head = {"type": "http.response.start", "status": status, "headers": list(headers)}

    def flush_soon(self) -> None:
        """The head stays for the first piece."""

    def write(self, piece: bytes, more: bool) -> Awaitable[None] | None:
        sending = self._write(piece, more).__await__()
        try:
            return _Rest(sending, next(sending))
        except StopIteration:
            return None

    async def _write(self, piece: bytes, more: bool) -> None:
        if self._head:
            head, self._head = self._head, None
            await self._send(head)
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})


class _Rest:
    """Of something that was begun outside a task, up to its first wait. No coroutine: nobody may come to await it."""

    def __init__(self, begun: Generator[Any, None, None], waiting_for: Any) -> None:
        self._begun, self._waiting_for = begun, waiting_for

    def __await__(self) -> Generator[Any, None, None]:
        yield self._waiting_for
        yield from self._begun
