"""The third way to write a filter, for people: `name:"x" AND -status:READY`, as the JSON it stands for. Pure.

name:"x"  name:x  project:null    equal            fileset IN ["a", "b"]  NOT IN [...]
name~"abc"                        contains         created_at >= "2026-01-01"   > < <= too
AND (may be left out)  OR  -term  (...)  data.a.b:1
"""

from __future__ import annotations

import re
from typing import Any

from nimhost.errors import BadRequest

Json = dict[str, Any]
DEPTH_LIMIT = 30
PART_LIMIT = 200
"""So many values are compared with."""
SHORTEST_SUBSTRING = 3
_BLANKS = re.compile(r"\s*")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_WORD = re.compile(r"[^\s()\[\],:~<>\"]+")
_NUMBER = re.compile(r"-?\d{1,18}(\.\d{1,18})?")
_OPS = {":": "$eq", "~": "$like", ">=": "$gte", "<=": "$lte", ">": "$gt", "<": "$lt"}
_WORDS = {"true": True, "false": False, "null": None}


def text_to_json(text: str) -> Json:
    """Raises BadRequest, with the place, for what cannot be read."""
    return _Parser(text).whole()


class _Parser:
    """One method per rule of the grammar; each reads from `_at` on and leaves it behind what it read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._values_read = 0

    def whole(self) -> Json:
        node = self._alternatives()
        if self._next():
            raise self._wrong("an end, AND or OR")
        return node

    def _alternatives(self) -> Json:
        parts = [self._conjunction()]
        while self._take_word("OR"):
            parts.append(self._conjunction())
        return parts[0] if len(parts) == 1 else {"$or": parts}

    def _conjunction(self) -> Json:
        parts = [self._term()]
        while self._take_word("AND") or (self._next() not in ("", ")") and not self._at_word("OR")):
            parts.append(self._term())
        return parts[0] if len(parts) == 1 else {"$and": parts}

    def _term(self) -> Json:
        self._depth += 1
        if self._depth > DEPTH_LIMIT:
            raise BadRequest("The filter is nested too deeply.")
        if self._take("-"):
            node: Json = {"$not": self._term()}
        elif self._take("("):
            node = self._alternatives()
            if not self._take(")"):
                raise self._wrong("')'")
        else:
            node = self._comparison()
        self._depth -= 1
        return node

    def _comparison(self) -> Json:
        field = self._match(_WORD, "the name of a field")[0]
        for sign, op in _OPS.items():
            if self._take(sign):
                return {field: {op: self._operand(op)}}
        if self._take_word("IN"):
            return {field: {"$in": self._values()}}
        if self._take_word("NOT") and self._take_word("IN"):
            return {field: {"$nin": self._values()}}
        raise self._wrong(f"':', '~', '>', '<', IN or NOT IN after '{field}'")

    def _operand(self, op: str) -> Any:
        value = self._value()
        if op == "$like" and len(str(value)) < SHORTEST_SUBSTRING:
            raise BadRequest(f"'~' needs at least {SHORTEST_SUBSTRING} characters to look for.")
        return value

    def _values(self) -> list[Any]:
        if not self._take("["):
            raise self._wrong("'['")
        values = [self._value()]
        while self._take(","):
            values.append(self._value())
        if not self._take("]"):
            raise self._wrong("',' or ']'")
        return values

    def _value(self) -> Any:
        self._values_read += 1
        if self._values_read > PART_LIMIT:
            raise BadRequest(f"The filter has more than {PART_LIMIT} comparisons.")
        self._next()
        if quoted := _STRING.match(self._text, self._at):
            self._at = quoted.end()
            return re.sub(r"\\(.)", r"\1", quoted[1], flags=re.DOTALL)
        word = self._match(_WORD, "a value")[0]
        if word in _WORDS:
            return _WORDS[word]
        if _NUMBER.fullmatch(word):
            return float(word) if "." in word else int(word)
        return word

    # --- steps

    def _next(self) -> str:
        """The next character that is no blank; empty at the end."""
        blanks = _BLANKS.match(self._text, self._at)
        assert blanks
        self._at = blanks.end()
        return self._text[self._at : self._at + 1]

    def _take(self, sign: str) -> bool:
        self._next()
        found = self._text.startswith(sign, self._at)
        self._at += len(sign) if found else 0
        return found

    def _at_word(self, word: str) -> bool:
        self._next()
        found = _WORD.match(self._text, self._at)
        return found is not None and found[0] == word

    def _take_word(self, word: str) -> bool:
        found = self._at_word(word)
        self._at += len(word) if found else 0
        return found

    def _match(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        self._next()
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._wrong(what)
        self._at = found.end()
        return found

    def _wrong(self, wanted: str) -> BadRequest:
        self._next()
        near = self._text[self._at : self._at + 20]
        return BadRequest(
            f"The filter cannot be read at {f'«{near}»' if near else 'its end'}: {wanted} is needed there.",
            hint='Write name:"x" AND project:y, or JSON, filter={"name": "x"}, or brackets, filter[name]=x.',
        )
