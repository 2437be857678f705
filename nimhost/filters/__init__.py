"""What a list may be narrowed down to: parsed from the two syntaxes of the wire, and turned into SQL. Pure.

JSON     filter={"name": {"$like": "llama"}, "$or": [{...}, {...}]}
bracket  filter[status]=READY&filter[name][$like]=llama     (a '$' may be left out)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct
from msgspec.structs import fields as struct_fields

from nimhost.entities import Kind
from nimhost.errors import BadRequest

Op = Literal["eq", "like", "lt", "lte", "gt", "gte", "in", "nin", "exists"]
OPS = frozenset(get_args(Op))
_SQL_OPS = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
COLUMNS = ("id", "name", "workspace", "created_at", "updated_at")


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
    return sorted({*COLUMNS, *kind.filterable})


def parse_filter(query: Iterable[tuple[str, str]], kind: Kind) -> tuple[Filter, dict[str, Any] | None]:
    """The filter in a query string (pairs in order), and the same as the JSON that the reply repeats.

    Raises BadRequest, with the valid fields, for an unknown field and for anything that cannot be read.
    """
    wanted: dict[str, Any] = {}
    for key, value in query:
        if key == "filter":
            wanted |= _from_json(value)
        elif key.startswith("filter["):
            _put(wanted, key, value)
    return (_parse(wanted, kind), wanted) if wanted else (EVERYTHING, None)


def names_field(filter: Filter, field: str) -> bool:
    if isinstance(filter, Compare):
        return filter.field == field
    return any(names_field(part, field) for part in filter.parts)


def _from_json(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as e:
        raise BadRequest(
            f"The filter cannot be read: {e}",
            hint='Write it as JSON, filter={"name": "x"}, or with brackets, filter[name]=x.',
        ) from e


def _put(wanted: dict[str, Any], key: str, value: str) -> None:
    """`filter[name][$like]` = x  ->  {"name": {"$like": "x"}}"""
    field, *ops = key.removeprefix("filter[").removesuffix("]").split("][")
    if not key.endswith("]") or not field or len(ops) > 1:
        raise BadRequest(f"The filter '{key}' cannot be read. Write filter[field]=value or filter[field][$op]=value.")
    if not ops:
        wanted[field] = value
        return
    op = ops[0] if ops[0].startswith("$") else f"${ops[0]}"
    inner = wanted.setdefault(field, {})
    if not isinstance(inner, dict):
        raise BadRequest(f"The filter for '{field}' is given twice.")
    inner[op] = value.split(",") if op in ("$in", "$nin") else value


def _parse(node: object, kind: Kind) -> Filter:
    if not isinstance(node, dict):
        raise BadRequest(f"The filter '{node}' cannot be read: an object is needed here.")
    logical = [key for key in node if key in ("$and", "$or", "$not")]
    if logical and len(node) > 1:
        raise BadRequest(f"'{logical[0]}' cannot stand beside other keys in a filter.")
    if logical:
        return _group(logical[0], node[logical[0]], kind)
    return Group("and", tuple(part for field, value in node.items() for part in _compare(field, value, kind)))


def _group(key: str, value: object, kind: Kind) -> Filter:
    parts = value if isinstance(value, list) else [value]
    how: Literal["and", "or", "not"] = "and" if key == "$and" else "or" if key == "$or" else "not"
    return Group(how, tuple(_parse(part, kind) for part in parts))


def _compare(field: str, value: object, kind: Kind) -> list[Filter]:
    known = valid_fields(kind)
    if field not in known:
        raise BadRequest(f"Unknown filter field '{field}'. Valid fields: {known}")
    if not isinstance(value, dict):
        return [Compare(field, "eq", _scalar(field, value))]
    return [_operation(field, key.removeprefix("$"), operand) for key, operand in value.items()]


def _operation(field: str, op: str, value: object) -> Filter:
    if op == "not":
        inner = [_operation(field, k.removeprefix("$"), v) for k, v in value.items()] if isinstance(value, dict) else []
        return Group("not", tuple(inner) or (Compare(field, "eq", _scalar(field, value)),))
    if op not in OPS:
        raise BadRequest(f"Unknown filter operator '${op}' for '{field}'. Known: {sorted(OPS | {'not'})}")
    if op in ("in", "nin"):
        values = value if isinstance(value, list) else [value]
        return Compare(field, op, tuple(_scalar(field, v) for v in values))  # type: ignore[arg-type]
    return Compare(field, op, _scalar(field, value))  # type: ignore[arg-type]


def _scalar(field: str, value: object) -> object:
    if isinstance(value, list | dict):
        raise BadRequest(f"The filter for '{field}' needs a plain value.")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        raise BadRequest(f"The number in the filter for '{field}' is too large.")
    return value


# --- SQL -----------------------------------------------------------------------------------------------------------


def to_sql(filter: Filter, kind: Kind) -> tuple[str, list[Any]]:
    """A condition over the entity table and its parameters. No text of a client ever becomes SQL."""
    if isinstance(filter, Compare):
        return _compare_sql(filter, kind)
    parts = [to_sql(part, kind) for part in filter.parts]
    if not parts:
        return "1", []
    glue = " AND " if filter.how == "and" else " OR "
    text = f"({glue.join(sql for sql, _ in parts)})"
    return (f"NOT coalesce({text}, 0)" if filter.how == "not" else text), [p for _, params in parts for p in params]


def _compare_sql(filter: Compare, kind: Kind) -> tuple[str, list[Any]]:
    column, path = column_of(filter.field, kind)
    value = filter.value
    if filter.op == "exists":
        return f"{column} IS {'NOT ' if value in (True, 'true', '1', 1) else ''}NULL", path
    if filter.op in ("in", "nin"):
        marks = ",".join("?" * len(value))
        membership = f"coalesce(CAST({column} AS TEXT) IN ({marks}), 0)"
        return f"{'NOT ' if filter.op == 'nin' else ''}{membership}", [*path, *map(_text, value)]
    if value is None:
        return f"{column} IS NULL", path
    if filter.op == "like":
        return f"CAST({column} AS TEXT) LIKE '%' || ? || '%'", [*path, _text(value)]
    if filter.op == "eq":
        return f"CAST({column} AS TEXT) = ?", [*path, _text(value)]
    return f"{column} {_SQL_OPS[filter.op]} ?", [*path, value]


def _text(value: object) -> str:
    """What SQLite's json_extract makes of a value, as text: a query string has no types."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def column_of(field: str, kind: Kind) -> tuple[str, list[Any]]:
    """The SQL that reads a field, and the parameters it needs."""
    if field in COLUMNS:
        return field, []
    in_status = field in {f.name for f in struct_fields(kind.status)}
    return f"json_extract({'status' if in_status else 'wish'}, ?)", [f"$.{kind.json_paths.get(field, field)}"]


def order_by(sort: str, kind: Kind) -> tuple[str, list[Any]]:
    """`-created_at` as SQL. Rows of one instant keep the order in which they came."""
    column, params = column_of(sort.removeprefix("-"), kind)
    way = "DESC" if sort.startswith("-") else "ASC"
    return f"{column} {way}, rowid {way}", params
