"""Reading JSON that others wrote: a value of the wrong type is the client's mistake, and is named. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from nimhost.errors import BadRequest
from nimhost.gateway.bodies import UNREADABLE

Json = dict[str, Any]

INVALID_JSON = "INVALID_JSON"
"""Anthropic's tool inputs are objects; what a model wrote instead stands under this key, as their manual has it."""
_encode = msgspec.json.Encoder().encode


class Asked(NamedTuple):
    """A request in the other format."""

    body: Json
    ignored: tuple[str, ...] = ()
    """Fields that have no counterpart there and only tune or label: they were left out."""


def as_object(value: object, where: str) -> Json:
    if isinstance(value, dict):
        return value
    raise _wrong(value, "an object", where)


def as_list(value: object, where: str) -> list[Any]:
    if isinstance(value, list):
        return value
    raise _wrong(value, "a list", where)


def as_text(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    raise _wrong(value, "a string", where)


# --- an upstream's reply is taken as it is: what is missing or odd in it counts as absent


def as_dict(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def as_dicts(value: object) -> list[Json]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def as_str(value: object) -> str:
    return value if isinstance(value, str) else ""


def as_int(value: object) -> int:
    return value if isinstance(value, int) else 0


# --- requests


def given(body: Json) -> Json:
    """Without what is null: that means "not set" in both formats."""
    return {key: value for key, value in body.items() if value is not None}


def refusal(where: str, why: str, instead: str | None = None) -> BadRequest:
    """For what the other format cannot express, and what the client would miss."""
    return BadRequest(f"{where}: {why}", instead)


def read_arguments(text: str) -> Json:
    """The arguments of a tool call as an object, whatever a model wrote."""
    try:
        found = msgspec.json.decode(text or "{}")
    except UNREADABLE:
        return {INVALID_JSON: text}
    return found if isinstance(found, dict) else {INVALID_JSON: text}


def write_arguments(arguments: Json) -> str:
    """The other way round."""
    if list(arguments) == [INVALID_JSON]:
        return str(arguments[INVALID_JSON])
    return _encode(arguments).decode()


def _wrong(value: object, wanted: str, where: str) -> BadRequest:
    found = "missing" if value is None else f"not {wanted}"
    return BadRequest(f"{where}: is {found}", f"It has to be {wanted}.")
