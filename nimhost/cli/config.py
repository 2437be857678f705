"""`nimhost config` and `nimhost version`"""

from __future__ import annotations

import os

import click

from nimhost import __version__
from nimhost.cli.options import format_option, output_format, read_secret, settings
from nimhost.cli.output import FORMATS, print_table, print_value
from nimhost.client import settings as client_settings


@click.group()
def config() -> None:
    """Show or change where this command finds the daemon.

    Settings are stored in client.toml. Environment variables win over them (NIMHOST_BASE_URL, NIMHOST_WORKSPACE,
    NIMHOST_ACCESS_TOKEN, NIMHOST_OUTPUT_FORMAT), and flags over both.

    \b
    Examples:
      nimhost config set --base-url http://gpu-box:8080
      nimhost config view
    """


@config.command("set")
@click.option("--base-url", metavar="URL", help="Where nimhost listens.")
@click.option("-w", "--workspace", metavar="NAME", help="Workspace to work in.")
@click.option("--access-token", metavar="TOKEN", help="API token; '-' asks for it, or reads a pipe.")
@click.option("-f", "--output-format", type=click.Choice(FORMATS), help="How to print results.")
def set_(**given: str | None) -> None:
    """Store settings; an empty value removes one.

    \b
    Examples:
      nimhost config set --base-url http://gpu-box:8080
      nimhost config set --access-token - < token.txt
    """
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise click.UsageError("Nothing to set. See: nimhost config set --help")
    if changes.get("base_url"):
        changes["base_url"] = client_settings.check_url(changes["base_url"])
    if changes.get("access_token") == "-":
        changes["access_token"] = read_secret("API token").strip()
    path = client_settings.settings_path(os.environ)
    client_settings.write_stored(path, changes)
    click.echo(f"Stored in {path}")


@config.command()
@format_option(*FORMATS)
def view() -> None:
    """Show the settings in force, wherever they come from. The token is masked.

    \b
    Examples:
      nimhost config view
      nimhost config view -f json
    """
    chosen = settings()
    shown = {**chosen._asdict(), "access_token": mask(chosen.access_token)}
    wanted = output_format(*FORMATS)
    if wanted == "table":
        print_table(("SETTING", "VALUE"), [(name, value or "-") for name, value in shown.items()])
    else:
        print_value(shown, wanted)


def mask(token: str | None) -> str | None:
    """Enough of a token to tell two apart, and no more."""
    if not token:
        return None
    shown = 12 if token.startswith("nimhost_") else 4
    return f"{token[:shown]}…" if len(token) >= shown + 12 else "…"


@click.command()
def version() -> None:
    """Print the version.

    \b
    Example:
      nimhost version
    """
    click.echo(f"nimhost {__version__}")
