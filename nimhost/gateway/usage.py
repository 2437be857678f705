"""How many tokens a reply says it took, pure: found in its bytes, without decoding them."""

from __future__ import annotations

import re

LOOKED_AT_BYTES = 4096
"""Of the end of a reply, and of its begin where the end does not say all (Anthropic's streams)."""
_OBJECT_BYTES = 1024
_NUMBER = re.compile(rb"\s*:\s*(\d{1,12})(?!\d)")

Usage = tuple[int | None, int | None]
"""Tokens of the request and of the reply. None: it does not say."""
UNKNOWN: Usage = (None, None)


def find_usage(first: bytes, before_last: bytes, last: bytes) -> Usage:
    """From a reply's first piece and its last two. Text that a model wrote is never taken for it: quotes are escaped
    there.
    """
    tail = last if len(last) >= LOOKED_AT_BYTES else before_last[-LOOKED_AT_BYTES:] + last
    at = tail.rfind(b'"usage"', max(0, len(tail) - LOOKED_AT_BYTES))
    if at == -1:
        return UNKNOWN
    given = _number(tail, at, b'"prompt_tokens"', b'"input_tokens"')
    made = _number(tail, at, b'"completion_tokens"', b'"output_tokens"')
    if given is None and made is not None and (at := first.find(b'"usage"', 0, LOOKED_AT_BYTES)) != -1:
        given = _number(first, at, b'"prompt_tokens"', b'"input_tokens"')
    return given, made


def _number(text: bytes, at: int, name: bytes, other_name: bytes) -> int | None:
    end = at + _OBJECT_BYTES
    found = text.find(name, at, end)
    if found == -1:
        name = other_name
        found = text.find(name, at, end)
    number = _NUMBER.match(text, found + len(name)) if found != -1 else None
    return int(number[1]) if number else None
