"""Request bodies, pure: read the model's name, replace it, merge extras; every other value keeps its bytes.

A body is scanned once: the same members that tell the model are put together again under the name it is served by.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import msgspec
from msgspec import Raw

from nimhost.errors import BadRequest, BodyTooLarge
from nimhost.gateway.routes import Target

JSON_NEEDED = "The body must be a JSON object or a form; other bodies go to the route of a model or a provider."
MAX_MODEL_BYTES = 1024
MOST_PARTS = 1000
"""Of a form: so many are looked at. 50 MB could be three million."""
MOST_MEMBERS = 1000
"""Of a JSON body, at its top level: 50 MB could be six million, and the loop would stand still for seconds."""
COUNTED_BYTES = 65_536
"""From here on members are counted; a shorter body is read within a millisecond or two, whatever is in it."""
MOST_VALUES = 200_000
"""Of a JSON body that is translated, at all its levels: each can take thirty times its bytes in memory."""
LOOKED_AT_BYTES = 4096
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that others wrote."""
_EMPTY = "Could not extract model from openai request: 'model' is empty"
_MODEL_NEEDED = "Put a model's name into the body."

_members = msgspec.json.Decoder(dict[str, Raw])
_name = msgspec.json.Decoder(str)
_NAMED = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.){1,1024}")')
_encode = msgspec.json.Encoder().encode
_MODEL_HEAD = b'\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|([,\[{])', re.DOTALL)
"""Of JSON: its texts are passed over, and before each value stands one of the others."""
_BOUNDARY = re.compile(rb'boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))', re.IGNORECASE)
_MODEL_PART = re.compile(rb'content-disposition:[^\r\n]*;\s*name="?model"?\s*(?:[;\r]|$)', re.IGNORECASE)


class _Name(str):
    """Of a member that was counted."""

    __slots__ = ()


class PlainBody(NamedTuple):
    """Goes out as it came, whatever it is."""

    raw: bytes

    @property
    def streams(self) -> bool:
        return False

    def for_target(self, target: Target) -> bytes:
        return self.raw


class JsonBody(NamedTuple):
    raw: bytes
    members: dict[str, Raw]
    model: str | None
    """None: not looked at."""

    @property
    def streams(self) -> bool:
        """The client asked for a stream of events."""
        return bytes(self.members.get("stream", b"")) == b"true"

    def for_target(self, target: Target) -> bytes:
        """With the route's extras merged in (shallow), under the name by which the model is known there."""
        route, name = target.route, target.served_json
        if not route.merges and (name is None or self.model == target.served_name):
            return self.raw
        merged = {**route.default_body, **self.members, **route.required_body} if route.merges else self.members.copy()
        if name is not None:
            merged["model"] = name
        return _encode(merged)


class FormBody(NamedTuple):
    """`multipart/form-data`: files, and fields such as `model`, whose value is `raw[start:end]`."""

    raw: bytes
    model: str
    start: int
    end: int
    before: bytes = b""
    """Where the form has no such field: what makes the name one, if a line's end follows."""

    @property
    def streams(self) -> bool:
        return False

    def for_target(self, target: Target) -> bytes:
        if target.served_json is None or self.model == target.served_name:
            return self.raw
        name = target.served_name.encode()
        field = self.before + name + b"\r\n" if self.before else name
        return b"".join((self.raw[: self.start], field, self.raw[self.end :]))


def read_json(body: bytes) -> JsonBody:
    """Raises BadRequest if it is no JSON object, BodyTooLarge if it has too many members."""
    try:
        return JsonBody(body, _read_members(body), None)
    except UNREADABLE as error:
        raise unreadable(error) from None


def name_in(body: JsonBody) -> str:
    """The model that it names; "" where that is no text."""
    try:
        return _name.decode(body.members.get("model", b'""'))
    except UNREADABLE:
        return ""


def name_within(raw: bytes) -> str:
    """The model that bytes name which are not decoded for it; "" where it is not near their begin or end. Text that
    somebody wrote is never taken for it: quotes are escaped there.
    """
    found = _NAMED.search(raw, 0, LOOKED_AT_BYTES) or _NAMED.search(raw, max(0, len(raw) - LOOKED_AT_BYTES))
    try:
        return _name.decode(found[1]) if found else ""
    except UNREADABLE:
        return ""


def read_model(body: bytes) -> JsonBody:
    """A JSON body that names its model. Raises BadRequest; BodyTooLarge if it has too many members."""
    try:
        members = _read_members(body)
        model = _name.decode(members["model"])
    except KeyError:
        raise BadRequest("Could not extract model from openai request: 'model'", _MODEL_NEEDED) from None
    except msgspec.ValidationError as error:
        raise BadRequest(f"Could not extract model from openai request: {error}", JSON_NEEDED) from None
    except UNREADABLE as error:
        raise unreadable(error) from None
    if not model:
        raise BadRequest(_EMPTY, _MODEL_NEEDED)
    return JsonBody(body, members, model)


def _read_members(body: bytes) -> dict[str, Raw]:
    """Raises UNREADABLE; BodyTooLarge at the first member that is too many, so that the rest is not even read."""
    if len(body) < COUNTED_BYTES:
        return _members.decode(body)
    numbers = itertools.count(1)

    def count(kind: type[_Name], name: str) -> _Name:
        if next(numbers) > MOST_MEMBERS:
            raise BodyTooLarge(
                f"The body has more than {MOST_MEMBERS:,} fields at its top level.", "Put them into fewer objects."
            )
        return kind(name)

    members: dict[str, Raw] = msgspec.json.Decoder(dict[_Name, Raw], dec_hook=count).decode(body)  # type: ignore[assignment]
    return members


def check_values(body: JsonBody) -> None:
    """Before it is decoded at all its levels. Raises BodyTooLarge if it has too many values. Slow for large bodies."""
    raw = body.raw
    if len(raw) <= MOST_VALUES or sum(map(raw.count, (b",", b"[", b"{"))) <= MOST_VALUES:
        return
    values = (found for found in _STRUCTURE.finditer(raw) if found.lastindex)
    if next(itertools.islice(values, MOST_VALUES, None), None):
        raise BodyTooLarge(f"The body has more than {MOST_VALUES:,} values.", "Put what is for the model into texts.")


def unreadable(error: Exception) -> BadRequest:
    """What a client is told about one of UNREADABLE."""
    if isinstance(error, RecursionError):
        return BadRequest("Invalid request body: it is nested too deeply.", "Send fewer brackets inside brackets.")
    return BadRequest(f"Invalid request body: {error}", JSON_NEEDED)


def read_form(body: bytes, content_type: bytes) -> FormBody:
    """A form that names its model; its files are passed over, not read. Raises BadRequest."""
    dash = _dash(content_type)
    if not dash:
        raise BadRequest("Invalid request body: a form without a boundary.", "Let your HTTP library write the header.")
    if form := _find_model(body, dash):
        return form
    raise BadRequest("Could not extract model from openai request: 'model'", "Put a field 'model' into the form.")


def read_form_for_model(body: bytes, content_type: bytes) -> FormBody | PlainBody:
    """A form for a model that the path has named: it need not say it too, but it will. Raises BadRequest."""
    dash = _dash(content_type)
    at = _first_part(body, dash) if dash else -1
    if at == -1:
        return PlainBody(body)  # whoever is asked knows best what is wrong with it
    at += 2 if at else 0
    return _find_model(body, dash) or FormBody(body, "", at, at, dash + _MODEL_HEAD)


def _dash(content_type: bytes) -> bytes:
    """What stands before every part; b"": the header does not say."""
    found = _BOUNDARY.search(content_type)
    return b"--" + (found[1] or found[2]) if found else b""


def _first_part(body: bytes, dash: bytes) -> int:
    return 0 if body.startswith(dash) else body.find(b"\r\n" + dash)


def _find_model(body: bytes, dash: bytes) -> FormBody | None:
    at, count = _first_part(body, dash), 0
    while at != -1 and (count := count + 1) <= MOST_PARTS:
        head_end = body.find(b"\r\n\r\n", at)
        part_end = body.find(b"\r\n" + dash, head_end + 2)
        if head_end == -1 or part_end == -1:
            break
        if head_end - at < MAX_MODEL_BYTES and _MODEL_PART.search(body, at, head_end + 2):
            return _form(body, head_end + 4, part_end)
        at = part_end
    return None


def _form(body: bytes, start: int, end: int) -> FormBody:
    try:
        if end - start > MAX_MODEL_BYTES:
            raise ValueError
        return FormBody(body, body[start:end].decode(), start, end)
    except ValueError:  # UnicodeDecodeError is one
        raise BadRequest("Could not extract model from openai request: its value is no name") from None
