"""Replies that come bit by bit: text, events, chat. A decoder is fed bytes and gives what is complete."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from nimhost.client.wire import Record
from nimhost.errors import UpstreamError


class Decoder(Protocol):
    def feed(self, data: bytes) -> list[Any]: ...

    def end(self) -> list[Any]:
        """What is left when the reply is over."""
        ...


MakeDecoder = Callable[[str], Decoder]
"""Content type of the reply -> a decoder for it."""


class Text:
    """Pieces of text, as they come; a character that is cut in two waits for its other half."""

    def __init__(self, content_type: str) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> list[str]:
        text = self._decoder.decode(data)
        return [text] if text else []

    def end(self) -> list[str]:
        text = self._decoder.decode(b"", final=True)
        return [text] if text else []


class Bytes:
    """The reply as it is."""

    def __init__(self, content_type: str) -> None:
        pass

    def feed(self, data: bytes) -> list[bytes]:
        return [data]

    def end(self) -> list[bytes]:
        return []


class Part(NamedTuple):
    content_type: str
    data: bytes


class Parts:
    """The reply as it is, each piece with the content type of the whole; an empty reply is one empty piece."""

    def __init__(self, content_type: str) -> None:
        self._content_type = content_type
        self._fed = False

    def feed(self, data: bytes) -> list[Part]:
        self._fed = True
        return [Part(self._content_type, data)]

    def end(self) -> list[Part]:
        return [] if self._fed else [Part(self._content_type, b"")]


class Event(NamedTuple):
    name: str
    data: str


class Events:
    """Server-sent events. Lines are split as bytes: JSON may hold characters that `str.splitlines` would split at."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[Event]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [event for line in lines if (event := self._line(line.removesuffix(b"\r")))]

    def _line(self, line: bytes) -> Event | None:
        if not line:
            event = Event(self._name, "\n".join(self._data)) if self._data else None
            self._name, self._data = "", []
            return event
        field, _, value = line.decode(errors="replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        return None


class Records:
    """One JSON object per event."""

    def __init__(self, content_type: str) -> None:
        self._events = Events()

    def feed(self, data: bytes) -> list[Record]:
        return [_record(event.data) for event in self._events.feed(data)]

    def end(self) -> list[Record]:
        return []


class Chunks:
    """Chunks of a chat completion. A whole completion, from an upstream that does not stream, comes as one chunk.

    Raises UpstreamError for an error inside the stream.
    """

    def __init__(self, content_type: str) -> None:
        self._streams = not content_type.startswith("application/json")
        self._events = Events()
        self._whole = b""

    def feed(self, data: bytes) -> list[Record]:
        if not self._streams:
            self._whole += data
            return []
        events = self._events.feed(data)
        return [_chunk(e) for e in events if e.name in ("", "error") and e.data.strip() != "[DONE]"]

    def end(self) -> list[Record]:
        if self._streams:
            return []
        whole = _checked(_record(self._whole.decode(errors="replace")))
        choices = [Record(choice, delta=choice.get("message") or {}) for choice in whole.get("choices", [])]
        return [Record(whole, choices=choices)]


def _chunk(event: Event) -> Record:
    if event.name == "error":
        try:
            raise UpstreamError(_reason(json.loads(event.data)))
        except ValueError:
            raise UpstreamError(event.data) from None
    return _checked(_record(event.data))


def _checked(chunk: Record) -> Record:
    if chunk.get("error"):
        raise UpstreamError(_reason(chunk))
    return chunk


def _reason(said: Any) -> str:
    inner = said.get("error", said) if isinstance(said, dict) else said
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)


def _record(text: str) -> Record:
    try:
        found = json.loads(text, object_hook=Record)
    except ValueError:
        found = None
    if not isinstance(found, Record):
        raise UpstreamError(f"Expected a JSON object in the stream, got: {text[:200]}")
    return found
