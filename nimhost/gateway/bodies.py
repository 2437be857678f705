"""Request bodies, pure: read the model's name, replace it, merge extras; every other value keeps its bytes.

A body is scanned once: the same members that tell the model are put together again under the name it is served by.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec
from msgspec import Raw

from nimhost.errors import BadRequest
from nimhost.gateway.routes import Target

JSON_NEEDED = "The body must be a JSON object or a form; other bodies (audio, images) go to the provider route."
MAX_MODEL_BYTES = 1024
_MODEL_NEEDED = "Put a model's name into the body."

_members = msgspec.json.Decoder(dict[str, Raw])
_name = msgspec.json.Decoder(str)
_encode = msgspec.json.Encoder().encode
_BOUNDARY = re.compile(rb'boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))', re.IGNORECASE)
_MODEL_PART = re.compile(rb'content-disposition:[^\r\n]*;\s*name="?model"?\s*(?:[;\r]|$)', re.IGNORECASE)


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

    @property
    def streams(self) -> bool:
        return False

    def for_target(self, target: Target) -> bytes:
        if target.served_json is None or self.model == target.served_name:
            return self.raw
        return b"".join((self.raw[: self.start], target.served_name.encode(), self.raw[self.end :]))


def read_json(body: bytes) -> JsonBody:
    """Raises BadRequest if it is no JSON object."""
    try:
        return JsonBody(body, _members.decode(body), None)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"Invalid request body: {error}", JSON_NEEDED) from None


def read_model(body: bytes) -> JsonBody:
    """A JSON body that names its model. Raises BadRequest."""
    try:
        members = _members.decode(body)
        model = _name.decode(members["model"])
    except KeyError:
        raise BadRequest("Could not extract model from openai request: 'model'", _MODEL_NEEDED) from None
    except msgspec.ValidationError as error:
        raise BadRequest(f"Could not extract model from openai request: {error}", JSON_NEEDED) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"Invalid request body: {error}", JSON_NEEDED) from None
    return JsonBody(body, members, model)


def read_form(body: bytes, content_type: bytes) -> FormBody:
    """A form that names its model; its files are passed over, not read. Raises BadRequest."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise BadRequest("Invalid request body: a form without a boundary.", "Let your HTTP library write the header.")
    dash = b"--" + (found[1] or found[2])
    at = 0 if body.startswith(dash) else body.find(b"\r\n" + dash)
    while at != -1:
        head_end = body.find(b"\r\n\r\n", at)
        part_end = body.find(b"\r\n" + dash, head_end + 2)
        if head_end == -1 or part_end == -1:
            break
        if head_end - at < MAX_MODEL_BYTES and _MODEL_PART.search(body, at, head_end + 2):
            return _form(body, head_end + 4, part_end)
        at = part_end
    raise BadRequest("Could not extract model from openai request: 'model'", "Put a field 'model' into the form.")


def _form(body: bytes, start: int, end: int) -> FormBody:
    try:
        if end - start > MAX_MODEL_BYTES:
            raise ValueError
        return FormBody(body, body[start:end].decode(), start, end)
    except ValueError:  # UnicodeDecodeError is one
        raise BadRequest("Could not extract model from openai request: its value is no name") from None
