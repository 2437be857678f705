"""`nimhost requests`"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import datetime
from typing import Any

import click

from nimhost.cli.options import (
    address_options,
    complete_names,
    flag_given,
    format_option,
    open_client,
    output_format,
    retyped,
    settings,
    stopped_error,
)
from nimhost.cli.output import FORMATS, clean, print_table, print_value

PATH = "/apis/nimhost/v1/requests"
HEADERS = ("TIME", "STATUS", "PATH", "MODEL", "ADAPTER", "PROVIDER", "TOTAL", "FIRST BYTE", "TOKENS", "ID", "ERROR")
WIDTHS = (8, 6, 20, 32, 0, 24, 9, 10, 12, 20, 20)
"""While following: columns cannot be fitted to what has not come yet; a model's name has that of its adapter in it."""
LEAST = ("PROVIDER", "PATH", "ID", "FIRST BYTE")
"""Columns that go first where a terminal is too narrow."""
ERROR_WIDTH = 20
"""So much of an error is worth a column."""


@click.command()
@click.option("--follow", is_flag=True, help="Keep printing what comes, until Ctrl-C.")
@click.option("-n", "--limit", type=click.IntRange(0, 2000), default=20, show_default=True, help="How many at first.")
@click.option("--model", metavar="NAME", shell_complete=complete_names("models"), help="Only those to this model.")
@click.option(
    "--provider",
    metavar="NAME",
    shell_complete=complete_names("providers"),
    help="Only those that went to this provider or deployment.",
)
@click.option("--failed", is_flag=True, help="Only those that failed.")
@format_option(*FORMATS)
@address_options
def requests(follow: bool, limit: int, model: str | None, provider: str | None, failed: bool) -> None:
    """Show the last requests to models: who answered, how long it took, how many tokens, what went wrong.

    The daemon remembers the last 2000, in memory. With --workspace only those of that workspace are shown.

    \b
    Examples:
      nimhost requests --follow
      nimhost requests --failed --model qwen-qwen3-1-7b
      nimhost requests -f json | jq '.[] | select(.first_byte_ms > 1000) | .id'
    """
    from nimhost.client.streams import Records
    from nimhost.client.wire import Request

    workspace = settings().workspace if flag_given("workspace") else None
    given = {"workspace": workspace, "limit": str(limit), "failed": str(failed), "model": model, "provider": provider}
    query = {key: value for key, value in given.items() if value is not None}
    with open_client() as client:
        if follow:
            asked = Request(path=PATH, query=query | {"follow": "true"}, quiet_s=math.inf)
            stream: Any = client.stream(asked, Records)
            with closing(stream) as records:
                _print_as_they_come(records)
            raise stopped_error(client)
        found = client.send(Request(path=PATH, query=query))
    wanted = output_format(*FORMATS)
    if wanted != "table":
        print_value(found["data"], wanted)
    elif found["data"]:
        _print_all([_cells(one) for one in found["data"]])
    else:
        click.echo(retyped("There were no such requests. Ask a model: nimhost chat MODEL"))


def _print_all(rows: list[tuple[str, ...]]) -> None:
    """Without columns in which nothing is."""
    longest = [max(len(cell) for cell in column) for column in zip(HEADERS, *rows, strict=True)]
    widths = [width * any(row[at] != "-" for row in rows) for at, width in enumerate(longest)]
    shown = fitting([*widths[:-1], min(widths[-1], ERROR_WIDTH)], _room())
    print_table([HEADERS[at] for at in shown], [[row[at] for at in shown] for row in rows])


def _room() -> float:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf


def fitting(widths: Sequence[int], room: float) -> list[int]:
    """Which of HEADERS fit into a line of `room` characters, by their place; those of width 0 are not wanted. Pure."""
    shown = [at for at, width in enumerate(widths) if width]
    for header in LEAST:
        if sum(widths[at] + 2 for at in shown) - 2 <= room:
            break
        shown = [at for at in shown if HEADERS[at] != header]
    return shown


def _print_as_they_come(records: Iterable[Any]) -> None:
    wanted = output_format(*FORMATS)
    shown = fitting(WIDTHS, _room())
    if wanted == "table":
        _print_row(HEADERS, shown)
    for one in records:
        if wanted != "table":
            print_value(one, "raw" if wanted == "json" else wanted)
        elif "missed" in one:
            click.echo(f"({one['missed']} more that came too fast)", err=True)
        else:
            _print_row(_cells(one), shown)


def _print_row(cells: Sequence[str], shown: Sequence[int]) -> None:
    click.echo("  ".join(clean(cells[at]).ljust(WIDTHS[at]) for at in shown).rstrip())


def _cells(one: Any) -> tuple[str, ...]:
    at = datetime.fromisoformat(one["time"]).astimezone().strftime("%H:%M:%S")
    tokens = "-" if one["completion_tokens"] is None else f"{one['prompt_tokens'] or '?'} > {one['completion_tokens']}"
    return (
        at, str(one["status"]), one["path"].rpartition("/-/")[2].removeprefix("/"), one["model"] or "-",
        one["adapter"] or "-", one["provider"] or "-", _time(one["total_ms"]), _time(one["first_byte_ms"]), tokens,
        one["id"], ": ".join(filter(None, (one["error"], one.get("error_message")))) or "-",
    )  # fmt: skip


def _time(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1000:.1f} s"
