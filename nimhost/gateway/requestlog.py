"""The last requests, in memory: a ring that is written to without waiting, and forgets the oldest when it is full.

It is one block of memory, and what many requests have in common is kept once: two thousand requests as objects would
push all that a request needs out of the processor's cache, which was measured to cost more than all other metrics.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from struct import Struct
from typing import Any

from nimhost.gateway.metrics import Series
from nimhost.gateway.usage import UNKNOWN

KEPT = 2000
KEPT_WITH_BODIES = 500
BODY_BYTES = 16_384
"""So much of a body is kept, where bodies are kept at all: at most 16 MB in all."""
SHOWN_LENGTH = 300
WORDS = 1000
"""So many different ones are kept once; with more of them it begins anew."""
_NUMBERS = Struct("<ddddd qqH? 128s")
"""Time, total, first byte, overhead, tokens per second; tokens in and out; status, whether it was streamed, its id.
Negative: not known."""


Words = tuple[str, str, Series | None, str, str, str]
"""Method, path, series, the model that was asked for if there is no series, the error's kind and its message."""


class Record:
    """One request, as far as it has come. `*_at_s`: of the performance counter; 0: not yet."""

    __slots__ = ("asked", "began_at_s", "ended_at_s", "error", "first_at_s", "head_at_s", "method", "overhead_s",
                 "path", "reason", "reply_body", "request_body", "request_id", "sent_at_s", "series", "status",
                 "streamed", "time_s", "tokens_per_s", "usage", "waited_s")  # fmt: skip

    def __init__(self, method: str, path: str, request_id: bytes, began_at_s: float) -> None:
        self.method, self.path, self.request_id, self.began_at_s = method, path, request_id, began_at_s
        self.sent_at_s = self.head_at_s = self.first_at_s = self.overhead_s = 0.0
        self.waited_s = 0.0
        """For the client's body, before the upstream was asked."""
        self.asked = self.error = self.reason = ""
        """The model that the client named; the error's kind and what it said, if there was one of ours."""
        self.series: Series | None = None
        self.streamed = False
        self.usage = UNKNOWN
        self.tokens_per_s = -1.0
        """Negative: not known."""
        self.request_body: bytes | None = None
        self.reply_body: bytearray | None = None
        """None: bodies are not kept."""
        self.ended_at_s = self.time_s = 0.0
        self.status = 0
        """Of the reply, once it is over; what the client was told in its place, if it was cut off before."""

    def overhead_ms(self, now_s: float) -> float:
        """Of ours, once the upstream's head is here: up to the asking, and from then on."""
        self.overhead_s = self.sent_at_s - self.began_at_s - self.waited_s + now_s - self.head_at_s
        return self.overhead_s * 1000

    def measure_speed(self) -> None:
        """Of the reply: from its first byte on if it was streamed."""
        since_s = self.first_at_s if self.streamed else self.sent_at_s
        if (made := self.usage[1]) and 0 < since_s < self.ended_at_s:
            self.tokens_per_s = made / (self.ended_at_s - since_s)


class RequestLog:
    def __init__(self, size: int = KEPT) -> None:
        self._size = size
        self._numbers = bytearray(size * _NUMBERS.size)
        self._words: list[Words | None] = [None] * size
        self._bodies: dict[int, tuple[bytes, bytes]] = {}
        self._known: dict[Words, Words] = {}
        self._news: asyncio.Event | None = None
        self.count = 0
        """Of all that ever came; each has its number, from 1 on."""

    @property
    def dropped(self) -> int:
        """So many have been forgotten."""
        return max(0, self.count - self._size)

    def add(self, record: Record) -> None:
        at = self.count % self._size
        self.count += 1
        given, made = record.usage
        _NUMBERS.pack_into(
            self._numbers, at * _NUMBERS.size, record.time_s, record.ended_at_s - record.began_at_s,
            record.first_at_s - record.began_at_s, record.overhead_s if record.head_at_s else -1.0,
            record.tokens_per_s, -1 if given is None else given, -1 if made is None else made, record.status,
            record.streamed, record.request_id,
        )  # fmt: skip
        self._words[at] = self._once(record)
        if record.reply_body is not None:
            self._bodies[at] = (record.request_body or b"", bytes(record.reply_body))
        elif self._bodies:
            self._bodies.pop(at, None)
        if self._news:
            self._news.set()
            self._news = None

    def _once(self, record: Record) -> Words:
        words = (
            record.method,
            record.path[:SHOWN_LENGTH],
            record.series,
            "" if record.series else record.asked,
            record.error,
            record.reason,
        )
        known = self._known.get(words)
        if known is None:
            if len(self._known) >= WORDS:
                self._known.clear()
            known = self._known[words] = words
        return known

    def after(self, number: int, most: int = KEPT) -> list[dict[str, Any]]:
        """Those that are kept and came after that one, as the API tells them, the oldest first; `most` of them."""
        return self.between(number, min(max(number, self.dropped) + most, self.count))

    def between(self, number: int, last: int) -> list[dict[str, Any]]:
        """Those that came after the one and up to the other."""
        return [self._shown(one) for one in range(max(number, self.dropped) + 1, last + 1)]

    async def wait(self, number: int) -> None:
        """Returns when one came after that one."""
        while self.count <= number:
            if self._news is None:
                self._news = asyncio.Event()
            await self._news.wait()

    def _shown(self, number: int) -> dict[str, Any]:
        at = (number - 1) % self._size
        words, bodies = self._words[at], self._bodies.get(at)
        time_s, total_s, first_s, overhead_s, speed, given, made, status, streamed, id = _NUMBERS.unpack_from(
            self._numbers, at * _NUMBERS.size
        )
        assert words
        method, path, series, asked, error, reason = words
        labels = series.labels if series else None
        return {
            "number": number,
            "time": datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds"),
            "id": id.rstrip(b"\0").decode(),
            "method": method,
            "path": path,
            "model": (labels.model if labels else "") or asked or None,
            "provider": labels.provider if labels else None,
            "adapter": (labels.adapter if labels else "") or None,
            "status": status,
            "error": error or None,
            "error_message": reason or None,
            "streamed": streamed,
            "total_ms": round(total_s * 1000, 3),
            "first_byte_ms": _known(round(first_s * 1000, 3)),
            "overhead_ms": _known(round(overhead_s * 1000, 3)),
            "prompt_tokens": _known(given),
            "completion_tokens": _known(made),
            "tokens_per_second": _known(round(speed, 1)),
            **({"request_body": _text(bodies[0]), "reply_body": _text(bodies[1])} if bodies else {}),
        }


def _known(number: float) -> float | None:
    return None if number < 0 else number


def _text(body: bytes) -> str:
    return body.decode("utf-8", "replace")
