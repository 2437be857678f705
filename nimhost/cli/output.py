"""How results are printed: tables for people, JSON and YAML for programs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

FORMATS = ("table", "json", "yaml", "raw")
COLOURS = {
    "READY": "green", "ERROR": "red", "LOST": "red", "UNKNOWN": "magenta", "STOPPED": "bright_black",
    **dict.fromkeys(("PENDING", "CREATED", "DELETING", "NO KEY"), "yellow"),
}  # fmt: skip
LEAST_ROOM = 10
"""For the last column of a table, in characters."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """`text` without what could steer a terminal: messages and answers come from other programs."""
    return _CONTROL.sub("", re.sub(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])", "", text))


def first_sentence(message: str) -> str:
    """What a table has room for; the rest is in `-f json`."""
    first = re.match(r".*?[.!?](?=\s|$)", message) or re.match(r".*", message)
    return first[0] if first else ""


def print_value(value: Any, output_format: str) -> None:
    """One object or list: `json` indented, `yaml`, or `raw` (JSON on one line)."""
    if output_format == "yaml":
        from nimhost.cli.structures import to_yaml

        click.echo(to_yaml(value))
    elif output_format == "raw":
        click.echo(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    else:
        click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, whole: bool = False) -> None:
    """Columns as wide as their content; on a terminal the last one is cut at the edge, or at the end of the next line
    where the others leave it no room, unless it is wanted `whole`. Statuses are coloured."""
    from rich.cells import cell_len, set_cell_size  # characters may be two columns wide

    table = [list(headers), *([clean(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(cell_len(row[i]) for row in table) for i in range(len(headers))]
    line = shutil.get_terminal_size().columns
    room = line - sum(widths[:-1]) - 2 * (len(headers) - 1)
    while room <= LEAST_ROOM:
        room += line
    for row in table:
        last = row[-1]
        if not whole and sys.stdout.isatty() and cell_len(last) > room:
            last = f"{set_cell_size(last, room - 1)}…"
        cells = [_coloured(set_cell_size(cell, width)) for cell, width in zip(row[:-1], widths, strict=False)]
        click.echo("  ".join([*cells, last]).rstrip())


def _coloured(cell: str) -> str:
    colour = COLOURS.get(cell.strip())
    return click.style(cell, fg=colour) if colour else cell


def age(created_at: str, now: datetime | None = None) -> str:
    """How long ago, in one unit: `42s`, `7m`, `3h`, `12d`. Times without a zone are UTC."""
    born = datetime.fromisoformat(created_at)
    born = born if born.tzinfo else born.replace(tzinfo=UTC)
    seconds = max(0, int(((now or datetime.now(UTC)) - born).total_seconds()))
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size or (unit == "d" and seconds >= size):
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
