"""A reply's head leaves together with its first bytes.

The server is handed head and body one after the other, and each would be a system call and a packet of its own: a third
of the cost of a short reply.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Joining:
    """A transport that holds a head back until the next write, or until the loop's next turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held = b""
        self._write = transport.write
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._held:
            data, self._held = self._held + data, b""
        elif data.endswith(b"\r\n\r\n") and data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 1"):
            self._held = data
            self._loop.call_soon(self.flush)
            return
        self._write(data)

    def flush(self) -> None:
        if self._held:
            data, self._held = self._held, b""
            self._write(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()
