"""Filters and sorts as SQL over the entity table. Pure. No text of a client ever becomes SQL."""

from __future__ import annotations

from typing import Any

from msgspec.structs import fields as struct_fields

from nimhost.filters import COLUMNS, DATA, ENTITY_TYPE, Compare, Filter
from nimhost.kinds import Kind

_SQL_OPS = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
_YES = (True, "true", "1", 1)
_RELATED = {
    "adapters": ("adapters", "$.model", None),
    "adapters.finetuning_type": ("adapters", "$.model", "$.finetuning_type"),
    "lora_enabled": ("deployment-configs", "$.model_entity_id", "$.model_spec.lora_enabled"),
}
"""Fields of a model that are kept in other rows: their kind, where they name the model, and what is compared there."""


def to_sql(filter: Filter, kind: Kind) -> tuple[str, list[Any]]:
    """A condition over the table called `entities`, and its parameters."""
    if isinstance(filter, Compare):
        return _compare_sql(filter, kind)
    parts = [to_sql(part, kind) for part in filter.parts]
    if not parts:
        return "1", []
    glue = " AND " if filter.how == "and" else " OR "
    text = f"({glue.join(sql for sql, _ in parts)})"
    return (f"NOT coalesce({text}, 0)" if filter.how == "not" else text), [p for _, params in parts for p in params]


def order_by(sort: str, kind: Kind) -> tuple[str, list[Any]]:
    """`-created_at` as SQL. Rows of one instant keep the order in which they came."""
    column, params = column_of(sort.removeprefix("-"), kind)
    way = "DESC" if sort.startswith("-") else "ASC"
    return f"{column} {way}, rowid {way}", params


def column_of(field: str, kind: Kind) -> tuple[str, list[Any]]:
    """The SQL that reads a field, and the parameters it needs."""
    if field in COLUMNS:
        return field, []
    if field == ENTITY_TYPE:
        return "?", [kind.id_prefix.replace("-", "_")]
    if field.startswith(DATA):
        return "json_extract(wish, ?)", ["$" + "".join(f'."{part}"' for part in field.split(".")[1:])]
    in_status = field in {f.name for f in struct_fields(kind.status)}
    return f"json_extract({'status' if in_status else 'wish'}, ?)", [f"$.{kind.json_paths.get(field, field)}"]


def _compare_sql(filter: Compare, kind: Kind) -> tuple[str, list[Any]]:
    if kind.key == "models" and filter.field in _RELATED:
        return _related_sql(filter)
    column, path = column_of(filter.field, kind)
    text = column if filter.field in COLUMNS else f"CAST({column} AS TEXT)"  # a bare column can use its index
    value = filter.value
    if filter.op == "exists":
        return f"{column} IS {'NOT ' if value in _YES else ''}NULL", path
    if filter.op in ("in", "nin"):
        marks = ",".join("?" * len(value))
        membership = f"coalesce({text} IN ({marks}), 0)"
        return f"{'NOT ' if filter.op == 'nin' else ''}{membership}", [*path, *map(_text, value)]
    if value is None:
        return f"{column} IS NULL", path
    if filter.op == "like":
        return f"{text} LIKE '%' || ? || '%'", [*path, _text(value)]
    if filter.op == "eq":
        return f"{text} = ?", [*path, _text(value)]
    return f"{column} {_SQL_OPS[filter.op]} ?", [*path, value]


def _related_sql(filter: Compare) -> tuple[str, list[Any]]:
    kind, path, compared = _RELATED[filter.field]
    named = f"json_extract(r.wish, '{path}')"
    # It depends on no row of the outside, so that it is read once, not once for each model.
    rows = f"SELECT {named} FROM entities r WHERE r.kind = '{kind}' AND {named} IS NOT NULL"
    model = "entities.workspace || '/' || entities.name"
    if filter.field == "adapters.finetuning_type":
        return f"{model} IN ({rows} AND json_extract(r.wish, '{compared}') = ?)", [_text(filter.value)]
    also = f" AND json_extract(r.wish, '{compared}')" if compared else ""
    return f"{model} {'' if filter.value in _YES else 'NOT '}IN ({rows}{also})", []


def _text(value: object) -> str:
    """What SQLite's json_extract makes of a value, as text: a query string has no types."""
    return str(int(value)) if isinstance(value, bool) else str(value)
