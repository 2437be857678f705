"""Server-sent events from bytes that come in any pieces. Pure."""

from __future__ import annotations

from nimhost.errors import UpstreamError

MAX_EVENT_BYTES = 16_000_000


class Events:
    """`feed` gives the data of every event that is complete by now. The names of events are not needed: the data of
    both formats say what they are.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._held = b""
        """A carriage return, whose line feed may still come."""

    def feed(self, piece: bytes) -> list[bytes]:
        """Raises UpstreamError for an event that is too large to be one."""
        if self._held or b"\r" in piece:
            piece = self._with_line_feeds(piece)
        start = max(len(self._rest) - 1, 0)
        self._rest += piece
        end = self._rest.rfind(b"\n\n", start)
        if end == -1:
            if len(self._rest) > MAX_EVENT_BYTES:
                raise UpstreamError("The upstream sent an event that is too large.")
            return []
        whole = bytes(self._rest[:end])
        del self._rest[: end + 2]
        return [data for event in whole.split(b"\n\n") if (data := _data(event))]

    def _with_line_feeds(self, piece: bytes) -> bytes:
        piece, self._held = self._held + piece, b""
        if piece.endswith(b"\r"):
            piece, self._held = piece[:-1], b"\r"
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _data(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event:  # as nearly always
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)
