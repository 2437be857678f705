"""What a list may be narrowed down to, parsed from the three syntaxes of the wire. Pure. `sql.py` makes SQL of it.

JSON     filter={"name": {"$like": "llama"}, "$or": [{...}, {...}]}
bracket  filter[status]=READY&filter[name][$like]=llama     (a '$' may be left out)
text     filter=name~"llama" AND -status:READY              (text.py)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct
from msgspec.structs import fields as struct_fields

from nimhost.errors import BadRequest
from nimhost.filters.text import DEPTH_LIMIT, PART_LIMIT, text_to_json
from nimhost.kinds import Kind

Op = Literal["eq", "like", "lt", "lte", "gt", "gte", "in", "nin", "exists"]
OPS = frozenset(get_args(Op))
COLUMNS = ("id", "name", "workspace", "created_at", "updated_at")
ENTITY_TYPE = "entity_type"
EVERYWHERE = (*COLUMNS, ENTITY_TYPE, "project")
"""Fields that every kind can be filtered by, whether or not it has them."""
TIMES = ("created_at", "updated_at")
DATA = "data."
"""Begins a path into what the client set: `data.executor_config.gpu`."""
_DATA_PATH = re.compile(r"data(\.[A-Za-z_][\w-]*)+")


class Compare(Struct, frozen=True):
    field: str
    op: Op
    value: Any


class Group(Struct, frozen=True):
    """`and`: every part holds; `or`: one of them; `not`: none of them."""

    how: Literal["and", "or", "not"]
    parts: tuple[Filter, ...]


Filter = Compare | Group
EVERYTHING = Group("and", ())


def valid_fields(kind: Kind) -> list[str]:
    return sorted({*EVERYWHERE, *kind.filterable})


def parse_filter(query: Iterable[tuple[str, str]], kind: Kind) -> tuple[Filter, dict[str, Any] | None]:
    """The filter in a query string (pairs in order), and the same as the JSON that the reply repeats.

    Raises BadRequest, with the valid fields, for an unknown field and for anything that cannot be read.
    """
    wanted: dict[str, Any] = {}
    for key, value in query:
        if key == "filter" and value:
            wanted |= _from_json(value) if value.lstrip()[:1] in ("{", "[") else text_to_json(value)
        elif key.startswith("filter["):
            _put(wanted, key, value)
    if not wanted:
        return EVERYTHING, None
    filter = _parse(wanted, kind, 0)
    if _size(filter) > PART_LIMIT:
        raise BadRequest(f"The filter has more than {PART_LIMIT} comparisons.")
    return filter, wanted


def names_field(filter: Filter, field: str) -> bool:
    if isinstance(filter, Compare):
        return filter.field == field
    return any(names_field(part, field) for part in filter.parts)


def _from_json(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except RecursionError as e:
        raise BadRequest("The filter is nested too deeply.") from e
    except msgspec.DecodeError as e:
        raise BadRequest(
            f"The filter cannot be read: {e}",
            hint='Write it as JSON, filter={"name": "x"}, or with brackets, filter[name]=x.',
        ) from e


def _put(wanted: dict[str, Any], key: str, value: str) -> None:
    """`filter[name][$like]` = x  ->  {"name": {"$like": "x"}}"""
    *path, last = key.removeprefix("filter[").removesuffix("]").split("][")
    if not key.endswith("]") or not all((*path, last)) or len(path) > 2:
        raise BadRequest(f"The filter '{key}' cannot be read. Write filter[field]=value or filter[field][$op]=value.")
    steps = [_op_name(step) if number else step for number, step in enumerate((*path, last))]
    inner = wanted
    for step in steps[:-1]:
        inner = inner.setdefault(step, {})
        if not isinstance(inner, dict):
            raise BadRequest(f"The filter for '{steps[0]}' is given twice.")
    inner[steps[-1]] = value.split(",") if steps[-1] in ("$in", "$nin") else value


def _op_name(step: str) -> str:
    return f"${step}" if step in OPS or step == "not" else step


def _parse(node: object, kind: Kind, depth: int) -> Filter:
    if not isinstance(node, dict):
        raise BadRequest(f"The filter '{str(node)[:100]}' cannot be read: an object is needed here.")
    if depth > DEPTH_LIMIT:
        raise BadRequest("The filter is nested too deeply.")
    logical = [key for key in node if key in ("$and", "$or", "$not")]
    if logical and len(node) > 1:
        raise BadRequest(f"'{logical[0]}' cannot stand beside other keys in a filter.")
    if logical:
        return _group(logical[0], node[logical[0]], kind, depth + 1)
    return Group("and", tuple(part for field, value in node.items() for part in _compare(field, value, kind)))


def _group(key: str, value: object, kind: Kind, depth: int) -> Filter:
    parts = value if isinstance(value, list) else [value]
    how: Literal["and", "or", "not"] = "and" if key == "$and" else "or" if key == "$or" else "not"
    return Group(how, tuple(_parse(part, kind, depth) for part in parts))


def _size(filter: Filter) -> int:
    if isinstance(filter, Compare):
        return len(filter.value) if isinstance(filter.value, tuple) else 1
    return sum(map(_size, filter.parts))


def _compare(field: str, value: object, kind: Kind) -> list[Filter]:
    if not _is_valid(field, kind):
        raise BadRequest(f"Unknown filter field '{field[:100]}'. Valid fields: {[*valid_fields(kind), 'data.*']}")
    if not isinstance(value, dict):
        return [_equal(field, value, kind)]
    if nested := [key for key in value if f"{field}.{key}" in kind.nested]:
        if len(value) > 1:
            raise BadRequest(f"'{nested[0]}' cannot stand beside other keys in the filter for '{field}'.")
        return _compare(kind.nested[f"{field}.{nested[0]}"], value[nested[0]], kind)
    return [_operation(field, key.removeprefix("$"), operand, kind, 0) for key, operand in value.items()]


def _is_valid(field: str, kind: Kind) -> bool:
    if field in EVERYWHERE or field in kind.filterable or field in kind.nested.values():
        return True
    parts = field.split(".")
    return (
        _DATA_PATH.fullmatch(field) is not None
        and len(field) <= 200
        and parts[1] not in (*kind.secret, *kind.hidden)
        and parts[-1] != "api_key"
    )


def _equal(field: str, value: object, kind: Kind) -> Filter:
    asked = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if field in kind.presence and isinstance(asked, bool):
        return Compare(field, "exists", asked)
    return Compare(field, "eq", _scalar(field, value, kind))


def _operation(field: str, op: str, value: object, kind: Kind, depth: int) -> Filter:
    if depth > DEPTH_LIMIT:
        raise BadRequest("The filter is nested too deeply.")
    if op == "not":
        items = value.items() if isinstance(value, dict) else ()
        inner = [_operation(field, k.removeprefix("$"), v, kind, depth + 1) for k, v in items]
        return Group("not", tuple(inner) or (_equal(field, value, kind),))
    if op not in OPS:
        known = ", ".join(sorted(OPS | {"not"}))
        raise BadRequest(f"Unknown filter operator '${op[:100]}' for '{field}'. Known: {known}")
    if op == "eq":
        return _equal(field, value, kind)
    if field in kind.related and op != "exists":
        raise BadRequest(f"'{field}' can only be compared for equality.")
    if op in ("in", "nin"):
        values = value if isinstance(value, list) else [value]
        return Compare(field, op, tuple(_scalar(field, v, kind) for v in values))  # type: ignore[arg-type]
    return Compare(field, op, _scalar(field, value, kind, exact=op != "like"))  # type: ignore[arg-type]


def _scalar(field: str, value: object, kind: Kind, exact: bool = True) -> object:
    if isinstance(value, list | dict):
        raise BadRequest(f"The filter for '{field}' needs a plain value.")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        raise BadRequest(f"The number in the filter for '{field}' is too large.")
    if field in TIMES and exact and value is not None:
        return _time(field, value)
    if isinstance(value, str) and value in ("true", "false") and _is_flag(field, kind):
        return value == "true"
    return value


def _is_flag(field: str, kind: Kind) -> bool:
    return any(f.name == field and f.type is bool for f in struct_fields(kind.wish))


def _time(field: str, value: object) -> str:
    """A time as the rows have it, so that texts compare as times do."""
    try:
        time = datetime.fromisoformat(str(value))
    except ValueError as e:
        raise BadRequest(
            f"'{str(value)[:100]}' in the filter for '{field}' is not a time such as 2026-01-31T12:00:00Z."
        ) from e
    try:
        utc = time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except OverflowError as e:
        raise BadRequest(f"'{str(value)[:100]}' in the filter for '{field}' is out of range.") from e
    return utc.isoformat(timespec="microseconds").replace("+00:00", "Z")
