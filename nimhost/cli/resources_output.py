"""How entities are printed: one as JSON, several as a table for people and as the daemon's page for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from nimhost.cli.options import asked, output_format, retyped, settings
from nimhost.cli.output import FORMATS, age, first_sentence, print_table, print_value
from nimhost.cli.stages import brief

DELETED = "✓ Deleted successfully"
Columns = tuple[tuple[str, str], ...]
COLUMNS: dict[str, Columns] = {
    "secrets": (("DESCRIPTION", "description"),),
    "workspaces": (("DESCRIPTION", "description"),),
    "projects": (("DESCRIPTION", "description"),),
    "filesets": (("STORAGE", "storage.type"), ("SOURCE", "storage.repo_id"), ("PURPOSE", "purpose")),
    "models": (("FILESET", "fileset"), ("FAMILY", "spec.family"), ("PROVIDERS", "model_providers")),
    "adapters": (("MODEL", "model"), ("NAME TO USE", "served_name"), ("FILESET", "fileset"), ("ENABLED", "enabled"),
                 ("LOADED ON", "loaded_on"), ("MESSAGE", "status_message")),
    "deployment-configs": (
        ("ENGINE", "engine"),
        ("MODEL", "model_entity_id"),
        ("GPUS", "executor_config.gpu"),
        ("VERSION", "entity_version"),
    ),
    "deployments": (("CONFIG", "config"), ("VERSION", "entity_version"), ("STATUS", "status"),
                    ("MESSAGE", "status_message")),
    "providers": (("HOST", "host_url"), ("STATUS", "status"), ("MESSAGE", "status_message")),
    "virtual-models": (("MODEL", "default_model_entity"),),
    "files": (("PATH", "path"), ("SIZE", "size"), ("CACHE", "cache_status")),
    "served": (("MODEL", "id"), ("OWNER", "owned_by")),
}  # fmt: skip
"""What a table shows of each row beside name and age, as paths into it."""


def print_entity(value: Any) -> None:
    """One entity: as JSON unless something else was asked for; as a table it has a row for each field."""
    wanted = output_format("json", "yaml", "raw", "table")
    if wanted != "table":
        print_value(value, wanted)
        return
    texts = [(key, _text(one)) for key, one in value.items() if one is not None]
    print_table(("FIELD", "VALUE"), texts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tell_adapter(row: Any) -> None:
    """What can be done with an adapter now, beside the reply: to the person, not into a pipe."""
    if row.get("loaded_on"):
        click.echo(retyped(f"Chat with it: nimhost chat {row['served_name']}"), err=True)
    elif row.get("status_message"):
        click.echo(retyped(f"Not loaded: {brief(row['status_message'])}"), err=True)


def list_format() -> str:
    """What was asked for; else a table on a terminal, and JSON in a pipe, as the reference's own command has it."""
    wanted = settings().output_format
    if wanted in FORMATS:
        return wanted
    return "table" if sys.stdout.isatty() else "json"


def print_list(key: str, value: Any, rows: Sequence[Any]) -> None:
    """`value` is what a program gets, `rows` what a table shows."""
    wanted = list_format()
    if wanted != "table":
        print_value(value, wanted)
    elif not rows:
        click.echo("Nothing.")
    else:
        headers, cells = table_of(key, rows, asked("output_columns") or "default")
        print_table(headers, cells, whole=bool(asked("no_truncate")))


def table_of(key: str, rows: Sequence[Any], columns: str) -> tuple[list[str], list[list[str]]]:
    """`columns`: `default`, `all`, or paths into the rows with commas."""
    if columns == "default":
        return _usual(key, rows)
    every = dict.fromkeys(name for row in rows for name in row)
    paths = [*every] if columns == "all" else [path.strip() for path in columns.split(",")]
    return [path.upper() for path in paths], [[_cell(row, path) or "-" for path in paths] for row in rows]


def _usual(key: str, rows: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """Columns that are empty in all rows are left out."""
    columns: Columns = (("WORKSPACE", "workspace"), ("NAME", "name"), *COLUMNS.get(key, ()))
    if len({row.get("workspace") for row in rows}) == 1:
        columns = columns[1:]
    filled = [column for column in columns if any(_cell(row, column[1]) for row in rows)]
    headers = [header for header, _ in filled]
    cells = [[_cell(row, path) or "-" for _, path in filled] for row in rows]
    if all("created_at" in row for row in rows):
        at = len(headers) - 1 if headers[-1] in ("MESSAGE", "DESCRIPTION") else len(headers)
        headers.insert(at, "AGE")
        for row, line in zip(rows, cells, strict=True):
            line.insert(at, age(row["created_at"]))
    return headers, cells


def _cell(row: Any, path: str) -> str:
    for part in path.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    if isinstance(row, list):
        return ", ".join(map(_text, row))
    if isinstance(row, bool):
        return "yes" if row else "no"
    if path == "status_message":
        return first_sentence(row or "")
    return "" if row is None else _text(row)
