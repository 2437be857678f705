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
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNPRINTED = re.compile(r"[\x7f-\x9f\u2028\u2029\ufeff]")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


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
        click.echo(to_yaml(value))
    elif output_format == "raw":
        click.echo(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    else:
        click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their content; on a terminal the last one is cut at the edge. Statuses are coloured."""
    table = [list(headers), *([clean(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    room = shutil.get_terminal_size().columns - sum(widths[:-1]) - 2 * (len(headers) - 1)
    for row in table:
        last = row[-1]
        if sys.stdout.isatty() and len(last) > room > 10:
            last = f"{last[: room - 1]}…"
        cells = [_coloured(cell.ljust(width)) for cell, width in zip(row[:-1], widths, strict=False)]
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


def to_yaml(value: Any, indent: str = "") -> str:
    """Block YAML of what JSON can hold. Strings that could be read as something else are quoted as JSON."""
    if isinstance(value, dict) and value:
        return "\n".join(f"{indent}{_scalar(key)}:{_nested(item, indent)}" for key, item in value.items())
    if isinstance(value, list | tuple) and value:
        return "\n".join(f"{indent}- {to_yaml(item, indent + '  ').removeprefix(indent + '  ')}" for item in value)
    return f"{indent}{_scalar(value)}"


def _nested(item: Any, indent: str) -> str:
    if isinstance(item, dict | list | tuple) and item:
        return "\n" + to_yaml(item, indent + "  ")
    return f" {_scalar(item)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _YAML_WORDS:
        return value
    return _UNPRINTED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
