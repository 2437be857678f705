"""`nimhost gpus`"""

from __future__ import annotations

from typing import Any

import click

from nimhost.cli.options import address_options, format_option, open_client, output_format
from nimhost.cli.output import FORMATS, print_table, print_value

GIB = 1024**3
HEADERS = ("GPU", "NAME", "MEMORY", "USED", "FREE", "RESERVED", "USED BY")


@click.command()
@format_option(*FORMATS)
@address_options
def gpus() -> None:
    """List the GPUs of this machine: how full they are, and which deployment or process fills them.

    \b
    Examples:
      nimhost gpus
      nimhost gpus -f json | jq '.[].uuid'
    """
    from nimhost.client.wire import Request

    with open_client() as client:
        found: list[dict[str, Any]] = client.send(Request(path="/apis/nimhost/v1/gpus"))["data"]
        why = "" if found else _why_none(client.send(Request(path="/status")))
    wanted = output_format(*FORMATS)
    if wanted != "table":
        print_value(found, wanted)
    elif found:
        print_table(HEADERS, [row for gpu in found for row in rows_of(gpu)])
    else:
        click.echo(f"There are no GPUs{why}. To deploy without one: --gpu 0")


def _why_none(status: dict[str, Any]) -> str:
    said = [one["message"] for one in status["services"]["not_ready"] if one["name"] == "gpus"]
    return f": {said[0].rstrip('.')}" if said else ""


def rows_of(gpu: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for the GPU with its first user, one for each further user."""
    users = users_of(gpu)
    sizes = (gib(gpu["memory_bytes"]), gib(gpu["used_bytes"]), gib(gpu["free_bytes"]), _reserved(gpu))
    first = (str(gpu["index"]), gpu["name"], *sizes, users[0] if users else "-")
    return [first, *(("", "", "", "", "", "", user) for user in users[1:])]


def _reserved(gpu: dict[str, Any]) -> str:
    """What deployments have been given of it, whether they use it by now or not."""
    if gpu["holder"]:
        return "all"
    shared = sum(share["memory_bytes"] for share in gpu["shares"])
    return gib(shared) if shared else "-"


def users_of(gpu: dict[str, Any]) -> list[str]:
    """Deployments first, with their processes' memory; then everybody else by pid, name and user."""
    if gpu["problem"]:
        return [gpu["problem"]]
    left_out = [] if gpu.get("usable", True) else ["left out by [gpus] devices"]
    lines = [f"{share['holder']} (share of {gib(share['memory_bytes'])})" for share in gpu["shares"]]
    if gpu["holder"]:
        lines.insert(0, gpu["holder"])
    return left_out + lines + [_process(p) for p in gpu["processes"]]


def _process(p: dict[str, Any]) -> str:
    who = ", ".join(part for part in (f"pid {p['pid']}", p["user"] and f"user {p['user']}") if part)
    size = f" {gib(p['used_bytes'])}" if p["used_bytes"] else ""
    owner = f" of {p['deployment']}" if p["deployment"] else ""
    return f"{p['name'] or 'a process'} ({who}){size}{owner}"


def gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
