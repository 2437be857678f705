"""The shape of a body: keys and types, with nulls; ids, times and texts aside. And how two shapes differ."""

from __future__ import annotations

import json
from typing import Any

Shape = Any
"""A type's name; a dict of shapes; or a list of the different shapes that the items of a list have."""


def shape(value: object) -> Shape:
    match value:
        case dict():
            return {key: shape(inner) for key, inner in value.items()}
        case list():
            found: list[Shape] = []
            for item in map(shape, value):
                if item not in found:
                    found.append(item)
            return found
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
    return "text"


def body_shape(content_type: str, body: bytes) -> Shape:
    if content_type == "text/event-stream":
        events = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
        return {"events": shape([json.loads(event) for event in events[:-1]]), "last": events[-1]}
    if content_type == "application/json" and body:
        return shape(json.loads(body))
    return f"{len(body)} bytes"


def differences(expected: Shape, found: Shape, at: str = "$") -> list[str]:
    """`- $.a`: it is missing; `+ $.a`: nobody expected it; `$.a: x, not y`: it is an x instead."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"- {at}.{key}" for key in expected if key not in found]
        lines += [f"+ {at}.{key}" for key in found if key not in expected]
        for key in expected:
            if key in found:
                lines += differences(expected[key], found[key], f"{at}.{key}")
        return lines
    if isinstance(expected, list) and isinstance(found, list):
        return _in_lists(expected, found, f"{at}[]")
    return [] if expected == found else [f"{at}: {_kind(found)}, not {_kind(expected)}"]


def _in_lists(expected: list[Shape], found: list[Shape], at: str) -> list[str]:
    """Every shape of an item is compared with the one of the other side that is most like it."""
    if not expected or not found:
        return [] if expected == found else [f"{at}: {'items' if found else 'no items'}"]
    nearest = [min((differences(other, item, at) for other in expected), key=len) for item in found]
    missed = [item for item in expected if item not in found]
    nearest += [min((differences(item, other, at) for other in found), key=len) for item in missed]
    return list(dict.fromkeys(line for lines in nearest for line in lines))


def _kind(shape: Shape) -> str:
    return "object" if isinstance(shape, dict) else "list" if isinstance(shape, list) else str(shape)
