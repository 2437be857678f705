"""`nimhost tokens`"""

from __future__ import annotations

from typing import Any

import click

from nimhost.cli.options import address_options, format_option, open_client, output_format, settings
from nimhost.cli.output import FORMATS, age, print_table, print_value
from nimhost.client.settings import is_loopback
from nimhost.client.wire import Request, segment
from nimhost.errors import Unreachable
from nimhost.tokens import SCOPES

PATH = "/apis/nimhost/v1/tokens"


@click.group()
def tokens() -> None:
    """Make, list and revoke API tokens.

    On a loopback address nobody needs one. To let other machines in, make yourself one while nimhost is stopped, start
    it for them, and make theirs. Scopes: inference (talk to models), read (look at everything but secrets), admin
    (everything).

    \b
    Examples:
      nimhost tokens create me --scope admin
      nimhost serve --host 0.0.0.0
      nimhost tokens create laptop --scope inference
      nimhost tokens list
      nimhost tokens revoke laptop
    """


@tokens.command()
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, type=click.Choice(SCOPES), help="May be repeated.")
@format_option(*FORMATS)
@address_options
def create(name: str, scopes: tuple[Any, ...]) -> None:
    """Make an API token. It is shown once, and only its hash is kept.

    Where no daemon answers, it is written into the data directory of this machine, for the next start.

    \b
    Examples:
      nimhost tokens create laptop --scope inference
      nimhost tokens create dashboard --scope inference --scope read
    """
    try:
        with open_client() as client:
            made = client.send(Request(method="POST", path=PATH, body={"name": name, "scopes": list(scopes)}))
    except Unreachable:
        if not is_loopback(settings().base_url):
            raise
        made = _write(name, scopes)
    wanted = output_format(*FORMATS)
    if wanted == "table":
        click.echo(made["token"])
        click.echo("Keep it: it is not shown again. The command line uses it after:", err=True)
        click.echo("  nimhost config set --access-token -   (and paste it)", err=True)
    else:
        print_value(made, wanted)


def _write(name: str, scopes: tuple[Any, ...]) -> dict[str, Any]:
    from nimhost.daemon import create_token

    token, text, directory = create_token(name, scopes)
    click.echo(f"No nimhost answers at {settings().base_url}: written into {directory} for its next start.", err=True)
    return {"name": token.name, "scopes": token.scopes, "created_at": token.created_at, "token": text}


@tokens.command("list")
@format_option(*FORMATS)
@address_options
def list_() -> None:
    """List API tokens, by name and by how they begin.

    \b
    Example:
      nimhost tokens list
    """
    with open_client() as client:
        rows = client.send(Request(path=PATH))["data"]
    wanted = output_format(*FORMATS)
    if wanted != "table":
        print_value(rows, wanted)
    elif rows:
        print_table(("NAME", "SCOPES", "TOKEN", "AGE", "KEPT IN"), [_cells(row) for row in rows])
    else:
        click.echo("There are no API tokens. Make one with: nimhost tokens create NAME --scope inference")


def _cells(row: Any) -> tuple[str, ...]:
    prefix = f"{row['prefix']}…" if row["prefix"] else "-"
    created = age(row["created_at"]) if row["created_at"] else "-"
    return (row["name"], ",".join(row["scopes"]), prefix, created, row["source"])


@tokens.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@address_options
def revoke(names: tuple[str, ...]) -> None:
    """Revoke API tokens, at once: replies under way end too.

    \b
    Examples:
      nimhost tokens revoke laptop
    """
    with open_client() as client:
        for name in names:
            client.send(Request(method="DELETE", path=f"{PATH}/{segment(name)}"))
            click.echo(f"{name} is revoked.")
